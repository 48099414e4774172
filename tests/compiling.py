"""Ways to compile a pipeline's UNet, when, and a back end that counts."""

import torch


class GraphCounter:
    """A back end for torch.compile that counts the graphs and runs them as they are, so that it is quick."""

    def __init__(self):
        self.frame_count = 0

    def __call__(self, graph, example_inputs):
        self.frame_count += 1
        return graph.forward


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
