"""Fixtures over the pipelines of `small.py`, and over the built-in model for behaviour."""

from __future__ import annotations

import os
from dataclasses import replace

# Read when huggingface_hub is imported: the Hub on loopback (hub.py) stores files by LFS.
os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
# Read when torch is imported, also by processes that tests start: more threads than cores slow every worker down.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import pytest
import torch

from compiling import GraphCounter
from sepme_diffusers import Concept, ConceptBank, SepMEPipeline, SepMETrainer, pocket
from small import CLOSED, CONCEPTS, TRAIN, random_pipeline


@pytest.fixture(scope="session", autouse=True)
def _kept_prompts(tmp_path_factory):
    """What is encoded of regular prompts is kept for one run of the tests, also by processes that they start."""
    os.environ["SEPME_CACHE"] = str(tmp_path_factory.mktemp("regular"))


@pytest.fixture
def pipe() -> SepMEPipeline:
    return random_pipeline()


@pytest.fixture(scope="session")
def text_bank() -> ConceptBank:
    """Three text-side increments for `pipe`."""
    # Nobody holds the pipeline, so whether its denoiser is remembered depends on the garbage collector.
    return replace(SepMETrainer(random_pipeline(), CLOSED, guards=["", "watermark"]).erase(CONCEPTS), denoiser=None)


@pytest.fixture(scope="session")
def mixed_bank(text_bank: ConceptBank) -> ConceptBank:
    """`text_bank` with one more concept, trained: per-module form."""
    trainer = SepMETrainer(random_pipeline(), TRAIN, guards=["", "watermark"])
    return replace(trainer.erase([Concept("woodcut", (("woodcut cat", "a cat"),))], text_bank), denoiser=None)


@pytest.fixture(scope="session")
def pocket_pipe() -> SepMEPipeline:
    """The built-in model; a test that loads a bank unloads it."""
    loaded = SepMEPipeline.from_pretrained(pocket.path())
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def graphs():
    """Counts the graphs that are compiled."""
    torch.compiler.reset()
    yield GraphCounter()
    torch.compiler.reset()


@pytest.fixture(scope="session")
def pocket_trainer() -> SepMETrainer:
    """A trainer of the built-in model with nothing tuned: what a user gets."""
    return SepMETrainer(SepMEPipeline.from_pretrained(pocket.path()))
