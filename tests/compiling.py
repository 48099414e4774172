"""Ways to compile a pipeline's UNet, and when, beside loading a bank and erasing."""

import torch


def compile_whole(pipe, graphs):
    pipe.unet = torch.compile(pipe.unet, backend=graphs, fullgraph=True)


def compile_in_place(pipe, graphs):
    pipe.unet.compile(backend=graphs)


def compile_blocks(pipe, graphs):
    pipe.unet.compile_repeated_blocks(backend=graphs)


# (how, when) for pytest.mark.parametrize
WAYS = [
    *((compile_whole, when) for when in ("first", "after loading", "after erasing", "after a compiled call")),
    *((way, "after a compiled call") for way in (compile_in_place, compile_blocks)),
]
