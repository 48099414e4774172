"""Where a pipeline has denoisers."""

import torch
from torch import nn

from sepme_diffusers.doors.family import TOKENS, Door, Family
from sepme_diffusers.doors.registry import _FAMILIES, denoisers_of, family_of, register


class Wrapper(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return x


class Pipe:
    def __init__(self, **components):
        self.components = components


def test_a_denoiser_is_found_inside_what_wraps_it_and_once(pipe):
    unet, other = pipe.unet, nn.Linear(1, 1)
    assert list(denoisers_of(pipe).items()) == [("unet", unet)]
    assert denoisers_of(Pipe(unet=torch.compile(unet), vae=pipe.vae)) == {"unet": unet}
    twice = Wrapper(other, Wrapper(unet), unet)
    assert denoisers_of(Pipe(unet=twice)) == {"unet.parts.1.parts.0": unet}


def test_a_family_that_is_registered_later_is_known_from_then_on(monkeypatch):
    class Later(nn.Module):
        pass

    module = Later()
    assert family_of(module) is None
    monkeypatch.setattr("sepme_diffusers.doors.registry._FAMILIES", dict(_FAMILIES))
    family = register(Family("later", ("Later",), (Door(TOKENS, "encoder_hidden_states"),), entry="x"))
    assert family_of(module) is family
