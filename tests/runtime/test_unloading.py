import gc
import weakref

from small import latents


def test_nothing_of_an_unloaded_bank_is_held_once_the_next_call_has_its_receipt(pipe, mixed_bank):
    pipe.load_sepme(mixed_bank)
    latents(pipe, "neon cat", erased=["neon", "woodcut"])
    stacks = weakref.ref(pipe.last_call.call.snapshot.stacks)
    pipe.unload_sepme()
    latents(pipe, "neon cat")
    gc.collect()
    assert stacks() is None
    assert pipe._sepme.text_check is None or pipe._sepme.text_check.prompts == []
