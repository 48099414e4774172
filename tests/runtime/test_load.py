"""Many threads and many interrupts: no wrong picture, and `erased` always names what acts."""

import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from interrupts import run_traced
from sepme_diffusers.text.encoding import encode
from small import random_pipeline, wide

CALLS, THREADS, INTERRUPTS = 2000, 8, 500
SCHEDULERS = (DDIMScheduler, EulerDiscreteScheduler)
JOBS = [
    ("neon cat", ["first/neon"]),
    ("neon cat", []),
    ("pencil cat", ["first/cat", "first/pencil"]),
    ("woodcut cat", ["second/woodcut"]),
    ("a neon fox", {"first/neon": 0.5, "second/woodcut": 1.0}),
    (["neon cat", "woodcut cat"], [["first/neon", "first/cat"], ["second/woodcut"]]),
    (["neon cat", "pencil cat"], [[], ["first/pencil"]]),
    ("a dog", None),
]


@pytest.fixture
def one_thread_each():
    """Sums of one thread: the same bits whoever makes them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def often_switched():
    """Threads take turns every few bytecodes."""
    before = sys.getswitchinterval()
    yield lambda: sys.setswitchinterval(1e-6)
    sys.setswitchinterval(before)


def draw(pipe, job, scheduler):
    """Latents of one step by a copy for this request, with a scheduler of the kind."""
    prompt, erased = job
    request = pipe.for_request()
    request.scheduler = scheduler.from_config(pipe.scheduler.config)
    seeds = [torch.Generator().manual_seed(row) for row in range(1 if isinstance(prompt, str) else len(prompt))]
    return request(
        prompt, erased=erased, num_inference_steps=1, guidance_scale=3.0, generator=seeds, output_type="latent"
    ).images


@pytest.mark.slow
def test_eight_threads_while_banks_come_and_go(pipe, text_bank, mixed_bank, one_thread_each, often_switched):
    """2,000 calls on two banks and two schedulers: every picture is bit for bit that of a single thread."""
    pipe.load_sepme(text_bank, name="first")
    pipe.load_sepme(mixed_bank.subset(["woodcut"]), name="second")
    pipe.set_erased(["first/cat"])
    work = list(itertools.product(range(len(JOBS)), SCHEDULERS))
    expected = {(job, scheduler): draw(pipe, JOBS[job], scheduler) for job, scheduler in work}
    for scheduler in SCHEDULERS:
        assert not torch.equal(expected[0, scheduler], expected[1, scheduler])
    done, changes, errors = threading.Event(), itertools.count(), []

    def come_and_go():
        further = itertools.cycle([text_bank, wide(text_bank), mixed_bank])
        try:
            while not done.is_set():
                pipe.load_sepme(next(further), name="third")
                pipe.load_sepme(next(further), name="fourth")
                pipe.replace_bank("third", next(further))
                pipe.unload_sepme("fourth")
                pipe.replace_bank("third", text_bank)
                pipe.unload_sepme("third")
                next(changes)
        except Exception as error:
            errors.append(error)

    def serve(number):
        if number == CALLS // 2:
            often_switched()
        job, scheduler = work[number % len(work)]
        try:
            return torch.equal(draw(pipe, JOBS[job], scheduler), expected[job, scheduler])
        except Exception as error:
            errors.append(error)

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            right = list(pool.map(serve, range(CALLS)))
    finally:
        done.set()
        other.join()
    assert errors == []
    assert right == [True] * CALLS
    assert next(changes) > 20
    assert pipe.erased == ("cat",)


# --- interrupts


def hooks(pipe):
    return [module for module in pipe.unet.modules() if module._forward_hooks or module._forward_pre_hooks]


PROMPT, STANDING = "neon woodcut pencil cat", {"plain_pipelines": "standing"}


class Bench:
    """A pipeline whose passes outside any call show what acts, and what they should show for each erased set."""

    def __init__(self, first, second):
        self.pipe, self.reference, self.first, self.second = random_pipeline(), random_pipeline(), first, second
        self.load(self.reference)
        self.text = encode(self.pipe, [PROMPT])
        self.noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
        self.known = {}

    def load(self, pipe):
        pipe.load_sepme(self.first, name="first", **STANDING)
        pipe.load_sepme(self.second, name="second", **STANDING)

    def ready(self):
        self.pipe.unload_sepme()
        self.load(self.pipe)
        self.pipe.set_erased(["neon", "woodcut"])

    def acts(self, pipe):
        with torch.no_grad():
            return pipe.unet(self.noise, 10, self.text).sample

    def expected(self, names):
        if names not in self.known:
            self.reference.set_erased(names)
            self.known[names] = self.acts(self.reference)
        return self.known[names]

    def draw(self, pipe, **kwargs):
        seed = torch.Generator().manual_seed(0)
        return pipe(PROMPT, num_inference_steps=1, generator=seed, output_type="latent", **kwargs).images


ACTS = {
    "set_erased": lambda b: b.pipe.set_erased(["pencil"]),
    "erase": lambda b: b.pipe.erase("pencil"),
    "restore": lambda b: b.pipe.restore("woodcut"),
    "restore_all": lambda b: b.pipe.restore_all(),
    "load_sepme": lambda b: (b.pipe.unload_sepme(), b.load(b.pipe), b.pipe.set_erased(["woodcut"])),
    "replace_bank": lambda b: b.pipe.replace_bank("second", b.second, erased=["woodcut", "pencil"]),
    "unload_sepme by name": lambda b: b.pipe.unload_sepme("second"),
    "unload_sepme": lambda b: b.pipe.unload_sepme(),
    "for_request": lambda b: b.draw(b.pipe.for_request(always=["pencil"], erased=["neon"])),
    "a call": lambda b: b.draw(b.pipe, erased=["pencil"]),
}


@pytest.mark.slow
def test_five_hundred_interrupts(text_bank, mixed_bank, one_thread_each):
    """At lines spread over every act: `erased` names what acts, and the pipeline can be called again."""
    bench = Bench(text_bank.subset(["neon", "pencil"]), mixed_bank.subset(["woodcut"]))
    pipe, injected = bench.pipe, 0
    plain = bench.expected(())
    for name, act in ACTS.items():
        bench.ready()
        lines, _ = run_traced(lambda act=act: act(bench))
        each = INTERRUPTS // len(ACTS) + 5
        for at in sorted({round(index * (lines - 1) / (each - 1)) for index in range(each)}):
            bench.ready()
            _, interrupt = run_traced(lambda act=act: act(bench), at)  # kept: it holds the frames, as a notebook does
            assert interrupt is not None, (name, at)
            injected += 1
            assert torch.equal(bench.acts(pipe), bench.expected(pipe.erased)), (name, at)
            if "neon" in pipe.erasable:
                alone = bench.draw(pipe, erased=["neon"])
                assert torch.equal(alone, bench.draw(bench.reference, erased=["neon"])), (name, at)
            else:
                bench.draw(pipe, erased=[])
            assert torch.equal(bench.acts(pipe), bench.expected(pipe.erased)), (name, at)
            pipe.unload_sepme()
            assert hooks(pipe) == [], (name, at)
            assert torch.equal(bench.acts(pipe), plain), (name, at)
    assert injected >= INTERRUPTS
