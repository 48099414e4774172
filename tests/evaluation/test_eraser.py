"""The evaluation's increments: what their concepts are mapped to."""

from itertools import chain

import pytest

from sepme_diffusers import pocket
from sepme_diffusers.evaluation.protocols.eraser import Eraser


@pytest.mark.parametrize("kind", ["styles", "objects"])
def test_anchors_are_worded_like_their_prompts(kind):
    # Tokens are matched by position: with words at other places what stands beside the concept is lost with it.
    names = {"styles": pocket.styles, "objects": pocket.objects}[kind]
    for name in names:
        concept = Eraser(None).concept(kind, name)
        for prompt, anchors in zip(concept.prompts, concept.anchors, strict=True):
            swapped = {prompt.replace(name, other) for other in names if other != name}
            assert set(anchors) <= swapped
        assert name not in set(chain(*concept.anchors))
