"""Pictures from fixed seeds, the prompts of the demonstration, and pages that show them."""

import re

from PIL import Image

from sepme_diffusers.evaluation import report
from sepme_diffusers.evaluation.pictures import generate
from sepme_diffusers.evaluation.protocols import demo
from sepme_diffusers.evaluation.protocols.erasures import concepts_of
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.runtime.changes import largest_change


def flat(value: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (value, value, value))


def test_a_picture_does_not_depend_on_its_batch(pocket_pipe):
    """Prompt i starts from seed + i, however the prompts are batched."""
    prompts = ["a neon cat", "a cat", "woodcut"]
    together, alone = (generate(pocket_pipe, prompts, seed=3, steps=2, batch_size=size) for size in (3, 1))
    assert largest_change(together, alone) <= 1


def test_probes_use_nothing_that_an_edit_saw(pocket_pipe):
    edited = {p for style in concepts_of(pocket_pipe, "styles", demo.ERASED) for pair in style.pairs for p in pair}
    for kind in ("erased", "regular"):
        probe = demo.probes(6)[kind]
        assert not edited & set(probe.prompts)
        assert set(probe.objects) <= set(words.TEST_OBJECTS)
        assert len(probe.prompts) == len(probe.styles) == len(probe.objects)
    assert set(demo.probes(1)["erased"].styles) == set(demo.ERASED)
    assert set(demo.probes(1)["regular"].styles) == {*demo.KEPT, *demo.NEVER_SEEN, words.PLAIN}


def test_page_needs_no_other_file_and_escapes_what_it_shows(tmp_path):
    table = report.Table("ACC <b>", ("", "original"), (("erased & kept", "97.0"),))
    page = report.html_page("Title", "Summary", [table], flat(9), "Caption", "Footer")
    report.write(tmp_path / "new", flat(9), page)
    written = (tmp_path / "new" / "report.html").read_text("utf-8")
    assert "ACC &lt;b&gt;" in written
    assert "erased &amp; kept" in written
    assert re.findall(r'(?:src|href)="(.{5})', written) == ["data:"]
    assert Image.open(tmp_path / "new" / "grid.png").size == (8, 8)
