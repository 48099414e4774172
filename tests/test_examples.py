"""The recipe's parts that need no training: licences, techniques, captions."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sepme_diffusers.pocket.vocabulary import OBJECTS, PLAIN, STYLES, held_out_pair

RECIPE = Path(__file__).parents[1] / "examples" / "pocket"


@pytest.fixture(autouse=True)
def recipe_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))


def test_every_fetched_set_is_permissive():
    from fetch import PACKAGES, PERMISSIVE

    assert {licence for _, licence in PACKAGES.values()} <= PERMISSIVE


def test_every_script_of_the_recipe_is_in_its_readme():
    text = (RECIPE / "README.md").read_text()
    scripts = {file.name for file in RECIPE.glob("*.py")} - {"icons.py", "techniques.py", "text.py"}
    assert all(f"examples/pocket/{name}" in text for name in scripts)


def test_techniques_draw_every_style_repeatably():
    from techniques import SIZE, TECHNIQUES

    assert list(TECHNIQUES) == [*STYLES, PLAIN]
    art = Image.new("RGBA", (SIZE, SIZE))
    ImageDraw.Draw(art).ellipse([40, 40, 216, 216], fill=(200, 80, 40, 255), outline=(20, 20, 20, 255), width=8)
    for _, technique in TECHNIQUES.values():
        first, again = (technique(art, np.random.default_rng(1)) for _ in range(2))
        assert first.size == (64, 64)
        assert np.array_equal(first, again)


def test_captions_never_name_a_held_out_pair():
    from rasterise import CLASSES

    from text import training_pairs

    seen = {(CLASSES[style], list(OBJECTS)[object_]) for style, object_ in training_pairs()}
    assert not any(held_out_pair(style, object_) for style, object_ in seen if style != PLAIN)
    assert len(seen) == 110 + sum(not held_out_pair(s, o) for s in STYLES for o in OBJECTS)
