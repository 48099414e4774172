"""What a call erases belongs to the call: in other threads, in batches of several calls, and in its receipt."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from torch import nn

from sepme_diffusers import ErasureNotInForce, attach, current_call, mixed_calls
from sepme_diffusers.text.encoding import encode
from small import latents

PAIR = ["neon cat", "pencil cat"]
SETS = [["neon"], ["pencil"]]


@pytest.fixture
def loaded(pipe, text_bank):
    pipe.load_sepme(text_bank)
    return pipe


@pytest.fixture
def gated(pipe, text_bank):
    """The pipeline with increments that act on prompts of their own concept alone."""
    entries = [
        replace(entry, increment=entry.increment.gated(encode(pipe, entry.concept.prompts), 0.5))
        for entry in text_bank.values()
    ]
    pipe.load_sepme(text_bank.with_entries(entries))
    return pipe


def in_another_thread(act):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result()


class Proxy(nn.Module):
    """In the denoiser's place: runs it in its own way."""

    def __init__(self, unet, run):
        super().__init__()
        self.inner, self.run = unet, run
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True, **kwargs):
        found = self.run(self.inner, sample, timestep, encoder_hidden_states)
        return (found,)


def through(pipe, run):
    """A copy of a pipeline whose denoiser is run by `run(unet, sample, timestep, text)`."""
    remote = pipe.for_request()
    remote.unet = Proxy(pipe.unet, run)
    return remote


def passed(unet, sample, timestep, text):
    with torch.no_grad():
        return unet(sample, timestep, text).sample


# --- in another thread


def carried(unet, *inputs):
    call = current_call()

    def work():
        with call:
            return passed(unet, *inputs)

    return in_another_thread(work)


def not_carried(unet, *inputs):
    return in_another_thread(lambda: passed(unet, *inputs))


def test_a_call_is_carried_into_another_thread(loaded):
    here, plain = latents(loaded, "neon cat", erased=["neon"]), latents(loaded, "neon cat", erased=[])
    there = latents(through(loaded, carried), "neon cat", erased=["neon"])
    assert torch.equal(there, here)
    assert not torch.equal(there, plain)
    assert torch.equal(latents(through(loaded, carried), "neon cat", erased=[]), plain)


def test_a_standing_set_is_carried_as_well(loaded):
    loaded.set_erased(["neon"])
    assert torch.equal(latents(through(loaded, carried), "neon cat"), latents(loaded, "neon cat"))


@pytest.mark.parametrize("plain_pipelines", ["refuse", "standing"])
def test_a_pass_in_another_thread_without_the_record_raises(pipe, text_bank, plain_pipelines):
    """Also where passes outside any call are allowed: while a call with a set of its own runs they could be its."""
    pipe.load_sepme(text_bank, plain_pipelines=plain_pipelines)
    with pytest.raises(ErasureNotInForce, match=r"\['neon'\] should be erased.*current_call\(\)"):
        latents(through(pipe, not_carried), "neon cat", erased=["neon"])
    with pytest.raises(ErasureNotInForce, match=r"current_call\(\)"):
        latents(through(pipe, not_carried), "neon cat", erased=[])
    assert current_call_is_refused()


def current_call_is_refused():
    with pytest.raises(ErasureNotInForce, match="no call of an attached pipeline runs in this thread"):
        current_call()
    return True


def test_a_record_is_dead_after_its_call(loaded):
    kept = []
    latents(loaded, "a cat", erased=["neon"], callback_on_step_end=lambda *_: kept.append(current_call()) or {})
    text, noise = encode(loaded, ["neon cat"]), torch.zeros(1, 4, 8, 8)
    with pytest.raises(ErasureNotInForce, match=r"\['neon'\]\] have ended"), kept[0]:
        pass
    opened, ended, errors = threading.Event(), threading.Event(), []

    def outlive(call):
        with call:
            opened.set()
            ended.wait(30)
            with pytest.raises(ErasureNotInForce, match=r"a call that has ended.* erased \['neon'\]") as error:
                passed(loaded.unet, noise, 1, text)
            errors.append(error)

    def carry(*_):
        if not workers:
            workers.append(threading.Thread(target=outlive, args=(current_call(),)))
            workers[0].start()
            opened.wait(30)
        return {}

    workers = []
    latents(loaded, "a cat", erased=["neon"], callback_on_step_end=carry)
    ended.set()
    workers[0].join()
    assert errors


@pytest.mark.parametrize("erased", [["neon"], None])
def test_a_call_whose_denoiser_never_ran_for_it_raises(loaded, erased):
    """A denoiser elsewhere, whose passes this process does not see."""
    loaded.set_erased(["neon"])
    elsewhere = through(loaded, lambda unet, sample, timestep, text: torch.zeros_like(sample))
    with pytest.raises(ErasureNotInForce, match=r"\['neon'\] should be erased, but no pass of the denoiser was seen"):
        latents(elsewhere, "neon cat", erased=erased)
    assert elsewhere.last_call is None
    latents(elsewhere, "neon cat", erased=[])


# --- a batch that a pool of threads splits, as torch.nn.DataParallel does on several devices


def split(*slices):
    def run(unet, sample, timestep, text):
        call = current_call()

        def work(rows):
            with call:
                return passed(unet, sample[rows], timestep, text[rows])

        with ThreadPoolExecutor(len(slices)) as pool:
            return torch.cat(list(pool.map(work, slices)))

    return run


def split_here(*slices):
    return lambda unet, sample, timestep, text: torch.cat(
        [passed(unet, sample[rows], timestep, text[rows]) for rows in slices]
    )


HALVES = slice(0, 2), slice(2, 4)


@pytest.mark.parametrize("slices", [HALVES, (slice(0, 1), slice(1, 4))])
def test_a_split_batch_with_one_set_is_what_it_is_whole(loaded, slices):
    """Bit for bit what the same parts give in the call's own thread."""
    apart = latents(through(loaded, split(*slices)), PAIR, erased=["neon"])
    assert torch.equal(apart, latents(through(loaded, split_here(*slices)), PAIR, erased=["neon"]))
    torch.testing.assert_close(apart, latents(loaded, PAIR, erased=["neon"]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(apart, latents(loaded, PAIR, erased=[]), atol=1e-3)


@pytest.mark.parametrize("slices", [HALVES, ([0, 2], [1, 3]), (slice(0, 3), slice(3, 4)), (slice(0, 4),)])
def test_a_split_batch_with_a_set_for_each_picture_raises(loaded, slices):
    """[neg neg | pos pos] and [neg pos | neg pos] look alike from inside, and the second would get wrong sets."""
    with pytest.raises(ErasureNotInForce, match=r"'neon', 'pencil'. should be erased.*mixed_calls\(\[\(call, picture"):
        latents(through(loaded, split(*slices)), PAIR, erased=SETS)


def test_a_batch_that_is_split_in_the_calls_own_thread_is_right_or_raises(loaded):
    """Parts in the batch's order that each hold every picture begin with the first; others are no multiple."""
    whole = latents(loaded, PAIR, erased=SETS)
    halves = latents(through(loaded, split_here(*HALVES)), PAIR, erased=SETS)
    torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-4)
    for first in (1, 3):
        with pytest.raises(ValueError, match="which is no multiple of the 2 erased sets"):
            latents(through(loaded, split_here(slice(0, first), slice(first, 4))), PAIR, erased=SETS)


def split_by_rows(*parts):
    """Each thread says which picture each of its rows is of."""

    def run(unet, sample, timestep, text):
        call = current_call()

        def work(rows):
            with mixed_calls([(call, row % 2) for row in rows]):
                return passed(unet, sample[rows], timestep, text[rows])

        with ThreadPoolExecutor(len(parts)) as pool:
            found = torch.cat(list(pool.map(work, parts)))
        order = torch.tensor([row for rows in parts for row in rows])
        return found[order.argsort()]

    return run


@pytest.mark.parametrize("parts", [([0, 1], [2, 3]), ([0, 2], [1, 3]), ([3], [0, 1, 2])])
def test_rows_that_are_named_get_their_own_sets_wherever_they_run(loaded, parts):
    whole = latents(loaded, PAIR, erased=SETS)
    apart = latents(through(loaded, split_by_rows(*parts)), PAIR, erased=SETS)
    torch.testing.assert_close(apart, whole, rtol=1e-4, atol=1e-4)
    swapped = latents(loaded, PAIR, erased=SETS[::-1])
    assert (whole - swapped).abs().amax((1, 2, 3)).min() > 1e-3


def test_rows_can_be_named_in_the_calls_own_thread(loaded):
    """By a wrapper that puts the rows of a batch in an order of its own."""

    def by_picture(unet, sample, timestep, text):
        call, order = current_call(), [0, 2, 1, 3]
        with mixed_calls([(call, row % 2) for row in order]):
            return passed(unet, sample[order], timestep, text[order])[order]

    torch.testing.assert_close(
        latents(through(loaded, by_picture), PAIR, erased=SETS), latents(loaded, PAIR, erased=SETS)
    )


# --- a batch whose rows belong to several calls


class Batcher:
    """Waits for several calls and runs their passes as one batch, under the record that `record` makes of the calls.

    Each call's pass has two rows, of guidance; the batch has them side by side.
    """

    def __init__(self, calls, record):
        self.record, self.inputs = record, {}
        self.barrier = threading.Barrier(calls, action=self.work)
        self.found = None

    def __call__(self, unet, sample, timestep, text):
        self.unet, call = unet, current_call()
        self.inputs[call] = sample, timestep, text
        self.barrier.wait(30)
        return self.found[call]

    def work(self):
        # In the order of their prompts, which thread came first or not.
        calls = sorted(self.inputs, key=lambda call: call.names())
        samples, times, texts = zip(*(self.inputs.pop(call) for call in calls), strict=True)
        try:
            in_another_thread(lambda: self.run(calls, torch.cat(samples), times[0], torch.cat(texts)))
        except Exception as error:
            self.error = error
            raise

    def run(self, calls, sample, timestep, text):
        with self.record(calls):
            found = passed(self.unet, sample, timestep, text)
        self.found = dict(zip(calls, found.chunk(len(calls)), strict=True))


def by_two(calls):
    return mixed_calls([(call, 0) for call in calls for _ in range(2)])


def together(pipe, record, prompts, sets):
    """The latents of calls that one batcher serves, and the pipelines that made them."""
    batcher = Batcher(len(prompts), record)
    pipes = [through(pipe, batcher) for _ in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(
            pool.map(lambda job: latents(job[0], job[1], erased=job[2]), zip(pipes, prompts, sets, strict=True))
        )
    return found, pipes


def test_each_row_of_a_mixed_batch_is_edited_as_its_own_call_edits_it(loaded):
    """Guidance included; and bit for bit what the whole batch gives under that call alone."""
    sets, prompts = [["neon"], ["pencil"]], PAIR
    found, _ = together(loaded, by_two, prompts, sets)
    for prompt, erased, other, mine in zip(prompts, sets, sets[::-1], found, strict=True):
        torch.testing.assert_close(mine, latents(loaded, prompt, erased=erased), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(mine, latents(loaded, prompt, erased=other), atol=1e-3)
    text, noise = encode(loaded, ["", *PAIR, "neon"]), torch.randn(4, 4, 8, 8, generator=torch.manual_seed(0))
    with running(loaded, ["neon"]) as neon, running(loaded, []) as none:
        with neon:
            edited = passed(loaded.unet, noise, 1, text)
        with none:
            plain = passed(loaded.unet, noise, 1, text)
        with mixed_calls([(neon, 0), (none, 0), (none, 0), (neon, 0)]):
            both = passed(loaded.unet, noise, 1, text)
    assert torch.equal(both, torch.stack([edited[0], plain[1], plain[2], edited[3]]))
    assert not torch.equal(edited, plain)


@contextmanager
def running(pipe, erased, prompt="a cat", **kwargs):
    """The record of a call that waits in the middle of its first pass until the block ends."""
    records, ready, go = [], threading.Event(), threading.Event()

    def hold(unet, sample, timestep, text):
        records.append(current_call())
        ready.set()
        go.wait(60)
        return passed(unet, sample, timestep, text)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(latents, through(pipe, hold), prompt, erased=erased, **kwargs)
        while not ready.wait(0.05):
            if waiting.done():
                waiting.result()
        try:
            yield records[0]
        finally:
            go.set()
            waiting.result()


def test_another_calls_record_cannot_be_opened_within_one(loaded):
    with running(loaded, ["neon"]) as other:

        def inside(*_):
            with pytest.raises(ErasureNotInForce, match=r"another call's record is open.*mixed_calls\(\["), other:
                pass
            with pytest.raises(ErasureNotInForce, match="another call's record"), mixed_calls([(other, 0)]):
                pass
            seen.append(current_call())
            return {}

        seen = []
        latents(loaded.for_request(), "a cat", erased=["cat"], callback_on_step_end=inside)
        assert [call.names() for call in seen] == [["cat"]] * 3


def test_calls_that_began_with_other_banks_do_not_share_a_batch(loaded, text_bank):
    with running(loaded, ["neon"]) as before:
        loaded.replace_bank("bank", text_bank)
        with (
            running(loaded, ["neon"]) as after,
            pytest.raises(ErasureNotInForce, match="before and after a change of the loaded banks"),
        ):
            mixed_calls([(before, 0), (after, 0)])


def test_calls_that_began_before_and_after_set_erased_share_a_batch(loaded):
    text, noise = encode(loaded, ["neon cat"] * 2), torch.zeros(2, 4, 8, 8)
    with running(loaded, None) as before:
        loaded.set_erased(["neon"])
        with running(loaded, None) as after, mixed_calls([(before, 0), (after, 0)]):
            found = passed(loaded.unet, noise, 1, text)
    assert not torch.equal(found[0], found[1])


def test_dead_calls_do_not_share_a_batch(loaded):
    text, noise = encode(loaded, ["neon cat"] * 2), torch.zeros(2, 4, 8, 8)
    with running(loaded, ["cat"]) as alive:
        with running(loaded, ["neon"]) as dead:
            record = mixed_calls([(alive, 0), (dead, 0)])
        with pytest.raises(ErasureNotInForce, match=r"calls that erase \[\['neon'\]\] have ended"), record:
            pass
        with running(loaded, ["neon"]) as dying:
            record = mixed_calls([(alive, 0), (dying, 0)])
            record.__enter__()
        with pytest.raises(ErasureNotInForce, match=r"those that erase \[\['neon'\]\]"):
            passed(loaded.unet, noise, 1, text)
        record.__exit__()


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_rows_that_do_not_fit_the_batch_raise(loaded, rows):
    """Two rows for a batch of four would give guidance's halves of one call to two calls."""
    batch = 4 if rows < 4 else 2
    text, noise = encode(loaded, ["neon cat"] * batch), torch.zeros(batch, 4, 8, 8)
    with (
        running(loaded, ["neon"]) as call,
        mixed_calls([(call, 0)] * rows),
        pytest.raises(ErasureNotInForce, match=f"given {rows} rows for a batch of {batch}"),
    ):
        passed(loaded.unet, noise, 1, text)


def test_rows_of_no_picture_are_refused(loaded):
    with pytest.raises(ValueError, match="at least one row"):
        mixed_calls([])
    with running(loaded, ["neon"]) as call, pytest.raises(ValueError, match=r"fewer pictures.*\(\['neon'\], 1\)"):
        mixed_calls([(call, 0), (call, 1)])


def test_gates_that_open_in_a_mixed_batch_are_in_each_calls_own_receipt(gated):
    """Each call's prompt opens the gate of its own concept alone, also for the other picture of the same call."""
    both = ["neon", "pencil"]
    _, pipes = together(gated, by_two, PAIR, [both, ["pencil"]])
    opened = {tuple(pipe.last_call.erased[0]): pipe.last_call.opened for pipe in pipes}
    assert opened == {("neon", "pencil"): ({"neon": True, "pencil": False},), ("pencil",): ({"pencil": True},)}


def test_gates_of_very_many_increments_are_in_each_calls_own_receipt(pipe, text_bank):
    """Beyond the embedding's width each call gathers its own increments, and the batch those of all its calls."""
    entry = text_bank["neon"]
    increment = entry.increment.gated(encode(pipe, entry.concept.prompts), 0.5)
    entries = [replace(entry, increment=increment).renamed(f"neon {number}") for number in range(70)]
    pipe.load_sepme(text_bank.subset(["cat"]).with_entries(entries))
    text, noise = encode(pipe, PAIR), torch.zeros(2, 4, 8, 8)
    receipts = [pipe.for_request(), pipe.for_request()]
    with running(receipts[0], ["neon 3"]) as first, running(receipts[1], ["neon 60", "neon 5"]) as second:
        with mixed_calls([(first, 0), (second, 0)]):
            passed(pipe.unet, noise, 1, text)
        seen = [{key[1]: bool(stack.opened.copies()[0][0, index]) for stack in call.active.stacks()
                 for index, key in enumerate(stack.stack.slices)} for call in (first, second)]  # fmt: skip
    assert seen == [{"neon 3": True}, {"neon 5": False, "neon 60": False}]


# --- strict hosts


def test_a_strict_host_refuses_every_pass_without_an_explicit_set(pipe, text_bank):
    pipe.load_sepme(text_bank, strict=True, plain_pipelines="standing")
    text, noise = encode(pipe, ["a cat"]), torch.zeros(1, 4, 8, 8)
    with pytest.raises(ErasureNotInForce, match=r"attach\(pipe\)"):
        passed(pipe.unet, noise, 1, text)
    for call in ({}, {"erased": None}, {"erased": [None]}):
        with pytest.raises(ErasureNotInForce, match="does not say what it erases"):
            latents(pipe, ["a cat"], **call)
    latents(pipe, "a cat", erased=[])
    latents(pipe, ["a cat"], erased=[[]])
    latents(pipe.for_request(erased=[]), "a cat")
    latents(pipe.for_request(erased=[]), ["a cat"], erased=[None])


def test_a_strict_host_sees_a_textual_inversion_on_every_pipeline_that_shares_the_denoiser(pipe, text_bank):
    """Compared with the vocabulary when the strict bank was loaded; loading another bank changes nothing in that."""
    pipe.load_sepme(text_bank, strict=True)
    other = attach(type(pipe)(**pipe.components, requires_safety_checker=False))
    other.set_progress_bar_config(disable=True)
    latents(other, "a cat", erased=["neon"])
    pipe.text_encoder.get_input_embeddings().weight.data[-1] += 1
    pipe.load_sepme(text_bank, name="more")
    for one in (pipe, other):
        with pytest.raises(ErasureNotInForce, match="textual inversion"):
            latents(one, "a fox", erased=["bank/pencil"])
        latents(one, "a fox", erased=[])


# --- ControlNets


@pytest.fixture
def steered(loaded):
    """A pipeline with a ControlNet, and the text that the ControlNet read in each pass."""
    net = ControlNetModel.from_unet(loaded.unet, conditioning_embedding_out_channels=(16,)).eval()
    with torch.no_grad():
        for block in net.controlnet_down_blocks:
            block.weight.normal_()
    pipe = attach(
        StableDiffusionControlNetPipeline(**loaded.components, controlnet=net, requires_safety_checker=False)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def steer(pipe, prompt="neon cat", **kwargs):
    return latents(pipe, prompt, image=torch.zeros(1, 3, 8, 8), **kwargs)


def texts_of(net):
    """What the ControlNet's own forward is given, after every hook."""
    seen, forward = [], net.forward

    def note(*args, **kwargs):
        seen.append(kwargs["encoder_hidden_states"].detach().clone())
        return forward(*args, **kwargs)

    net.forward = note
    return seen


def test_a_controlnet_reads_the_edited_text_inside_a_call_alone(steered):
    net, text = steered.controlnet, encode(steered, ["neon cat"])
    seen = texts_of(net)
    steer(steered, erased=[])
    steer(steered, erased=["neon"])
    assert not torch.equal(seen[0], seen[3])
    with torch.no_grad():
        net(torch.zeros(1, 4, 8, 8), 1, encoder_hidden_states=text, controlnet_cond=torch.zeros(1, 3, 8, 8))
    assert torch.equal(seen[-1], text)


def test_hooks_that_are_removed_from_a_controlnet_in_the_middle_of_a_call_are_noticed(steered):
    def clear(pipe, step, timestep, tensors):
        for module in steered.controlnet.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        return tensors

    with pytest.raises(ErasureNotInForce, match=r"\['neon'\] should be erased, but the hooks on ControlNetModel"):
        steer(steered, erased=["neon"], callback_on_step_end=clear)


def test_a_controlnet_that_runs_without_the_calls_record_is_noticed(steered):
    """It would read the unedited text: from a pass outside any call it cannot be told."""
    net = steered.controlnet
    forward = type(net).__call__

    class Elsewhere(ControlNetModel):
        def __call__(self, *args, **kwargs):
            return in_another_thread(lambda: forward(self, *args, **kwargs))

    net.__class__ = Elsewhere
    with pytest.raises(ErasureNotInForce, match=r"\['neon'\] should be erased, but no pass of Elsewhere was seen"):
        steer(steered, erased=["neon"])
    steer(steered, erased=[])


# --- receipts


def test_a_receipt_has_a_set_for_each_picture_with_strengths_and_gates(gated):
    latents(gated, PAIR, num_images_per_prompt=2, erased=[{"neon": 0.5, "pencil": 1}, {"neon": 2}])
    receipt = gated.last_call
    assert receipt.erased == ({"neon": 0.5, "pencil": 1.0},) * 2 + ({"neon": 2.0},) * 2
    assert receipt.opened == ({"neon": True, "pencil": False},) * 2 + ({"neon": False},) * 2
    assert [picture["gates_opened"] for picture in receipt.to_dict()["pictures"]] == list(receipt.opened)
    latents(gated, PAIR, num_images_per_prompt=2, erased=["pencil"])
    assert gated.last_call.opened == ({"pencil": False},) * 2 + ({"pencil": True},) * 2


def test_receipts_of_a_split_batch_tell_its_pictures_apart(gated):
    remote = through(gated, split_by_rows([0, 1], [2, 3]))
    latents(remote, PAIR, erased=[["neon", "pencil"], ["pencil"]])
    assert remote.last_call.opened == ({"neon": True, "pencil": False}, {"pencil": True})
