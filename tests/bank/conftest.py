"""A Hub of one's own, and pushes to it and pulls from it."""

from collections.abc import Iterator

import pytest

import hub
from hub import REPOSITORY, WRITER
from sepme_diffusers import ConceptBank


@pytest.fixture
def server() -> Iterator[hub.Hub]:
    with hub.running() as running:
        yield running


@pytest.fixture
def push(server):
    def pushed(bank: ConceptBank, repository: str = REPOSITORY, **options):
        return bank.push_to_hub(repository, **{"endpoint": server.endpoint, "token": WRITER, **options})

    return pushed


@pytest.fixture
def pull(server, tmp_path):
    def pulled(repository: str = REPOSITORY, cache: str = "cache", **options) -> ConceptBank:
        place = {"endpoint": server.endpoint, "cache_dir": tmp_path / cache}
        return ConceptBank.from_pretrained(repository, **{**place, "token": False, **options})

    return pulled
