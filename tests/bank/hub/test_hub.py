import hashlib
import json
import re
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from PIL import Image

from folders import SHARD, reseal, same, tree
from hub import NARROW, REPOSITORY, STRANGER, WRITER, Fault
from sepme_diffusers import BankError, Concept, ConceptBank, Increment, Picture, PushConflict, SepMEConfig, pocket
from sepme_diffusers.bank.disk.layout import MANIFEST
from sepme_diffusers.bank.disk.records import TABLES
from sepme_diffusers.bank.entry import BaseModel, Entry
from sepme_diffusers.bank.errors import DownloadError
from sepme_diffusers.bank.fingerprint import Encoding
from sepme_diffusers.bank.guard_sets import GuardSet


def stronger(entry: Entry, factor: float = 2.0) -> Entry:
    return replace(entry, increment=Increment(entry.increment.A, B=entry.increment.B * factor))


def renamed(entry: Entry, name: str) -> Entry:
    return replace(entry, concept=Concept(name, entry.concept.pairs))


def grown(bank: ConceptBank, name: str) -> ConceptBank:
    return bank.with_entries([renamed(stronger(bank["neon"], 3.0), name)])


def shards(files: Iterable[str]) -> set[str]:
    return {file for file in files if SHARD.fullmatch(file)}


@pytest.fixture
def in_shards(text_bank, push, server):
    """Pushes each concept of `text_bank` by itself, so that each has a shard; tells which shard is whose."""

    def pushed() -> dict[str, str]:
        for name in text_bank:
            push(text_bank, concepts=[name])
        records = json.loads(server.files(REPOSITORY)[MANIFEST])["concepts"]
        return {name: record["shard"] for name, record in records.items()}

    return pushed


def test_pushed_and_pulled_is_the_same_bank(mixed_bank, push, pull):
    bank = replace(mixed_bank, always=("cat",))
    info = push(bank)
    back = pull()
    assert same(bank, back)
    assert (back.base, back.always) == (bank.base, bank.always)
    assert info.oid in info.commit_url


def test_what_is_pushed_is_a_banks_folder(mixed_bank, push, server, tmp_path):
    """What `save_pretrained` writes, but for the card, which names the repository."""
    push(mixed_bank)
    mixed_bank.save_pretrained(tmp_path / "bank")
    files, saved = server.files(REPOSITORY), tree(tmp_path / "bank")
    assert set(files) == {*saved, ".gitattributes"}
    assert shards(saved)
    assert all(files[file] == data for file, data in saved.items() if file not in (MANIFEST, "README.md"))
    assert json.loads(files[MANIFEST]) == json.loads(saved[MANIFEST])


def test_adding_one_of_a_hundred_uploads_that_one(push, pull, server):
    push(pocket.bank("objects"))
    before = server.files(REPOSITORY)
    bank = pull()
    server.forget()
    push(bank.with_entries([renamed(stronger(bank["cat"]), "kitten")]))
    [shard] = shards(server.files(REPOSITORY)) - shards(before)
    assert server.commits == [["README.md", shard, MANIFEST]]
    assert len(server.files(REPOSITORY)[shard]) < 2 * sum(t.nbytes for t in bank["cat"].increment.tensors().values())
    assert len(server.uploaded) == 1
    assert len(pull()) == 101


def test_a_bank_that_was_not_pulled_uploads_what_is_new_alone(text_bank, push, pull, server, tmp_path):
    """It is loaded from a folder, added to and pushed; what the Hub has already stays in the shard where it is."""
    push(text_bank)
    text_bank.save_pretrained(tmp_path / "bank")
    before = server.files(REPOSITORY)
    server.forget()
    bank = grown(ConceptBank.from_pretrained(tmp_path / "bank"), "chalk")
    push(bank)
    [shard] = shards(server.files(REPOSITORY)) - shards(before)
    assert server.commits == [["README.md", shard, MANIFEST]]
    assert len(server.files(REPOSITORY)[shard]) < 2 * sum(t.nbytes for t in bank["chalk"].increment.tensors().values())
    assert same(bank, pull())


def test_a_shard_without_a_live_row_is_deleted(text_bank, in_shards, push, pull, server):
    """Replaced and removed concepts leave their shards; a shard of which a row is in use stays."""
    of = in_shards()
    push(grown(grown(text_bank, "chalk"), "crayon"))
    [both] = shards(server.files(REPOSITORY)) - set(of.values())
    push(pull(), remove=["cat", "chalk"])
    assert shards(server.files(REPOSITORY)) == {of["neon"], of["pencil"], both}
    bank = pull()
    push(bank.with_entries([stronger(bank["neon"])]))
    [new] = shards(server.files(REPOSITORY)) - {of["neon"], of["pencil"], both}
    assert shards(server.files(REPOSITORY)) == {of["pencil"], both, new}
    push(pull(), remove=["crayon"])
    assert shards(server.files(REPOSITORY)) == {of["pencil"], new}
    assert same(bank.subset(["pencil"]), pull(concepts=["pencil"]))


class TestPack:
    def test_all_is_put_into_one_shard(self, text_bank, in_shards, push, pull, server):
        of = in_shards()
        bank = pull()
        server.forget()
        push(bank, pack=True)
        [shard] = shards(server.files(REPOSITORY))
        assert shard not in of.values()
        assert server.commits == [sorted([*of.values(), shard, MANIFEST])]
        assert same(text_bank, pull())
        server.forget()
        push(pull(), pack=True)
        assert server.commits == []

    def test_what_others_changed_and_removed_meanwhile_stays_so(self, text_bank, in_shards, push, pull, server):
        of = in_shards()
        mine, theirs = pull(), pull()
        push(theirs.with_entries([stronger(theirs["cat"])]), remove=["pencil"])
        push(grown(mine, "chalk"), pack=True)
        merged = pull()
        assert set(merged) == {"neon", "cat", "chalk"}
        assert torch.equal(merged["cat"].increment.B, theirs["cat"].increment.B * 2)
        assert len(shards(server.files(REPOSITORY))) == 2
        assert not shards(server.files(REPOSITORY)) & set(of.values())

    def test_what_the_bank_lacks_stays_where_it_is(self, in_shards, push, pull, server):
        of = in_shards()
        push(pull(concepts=["neon", "cat"]), pack=True)
        left = shards(server.files(REPOSITORY))
        assert of["pencil"] in left
        assert not {of["neon"], of["cat"]} & left
        assert len(left) == 2


@pytest.mark.slow
def test_one_more_concept_on_ten_thousand_uploads_four_files_and_six_megabytes_at_most(push, pull, server):
    """d 768, rank 1, float16, gates, one wording; every name is damped in one guard set. Seen: 3 files, 3.60 MB."""
    torch.manual_seed(0)
    names = [f"synthetic concept {number}" for number in range(10_000)]
    guards = GuardSet(("", "watermark"), tuple(names))
    config = SepMEConfig(soft_guard_weight=300.0, gain=1.0, gate=0.5)

    def synthetic(name: str) -> Entry:
        a, b = torch.randn(1, 768), torch.randn(768, 1)
        concept = Concept.from_template(name, ["a {concept}", "a picture of {concept}"], without=["", "a picture"])
        return Entry(
            concept, Increment((a / a.norm()).half(), B=b.half(), gate=0.5), config, guards, {"leakage": 0.01}
        )

    base = BaseModel("me/base", {"tokens": Encoding(768, 77)})
    push(ConceptBank(base, {name: synthetic(name) for name in names}))
    bank = pull()
    assert list(bank) == names
    server.forget()
    push(bank.with_entries([synthetic("one more")]))
    [files] = server.commits
    sizes = {file: len(server.files(REPOSITORY)[file]) for file in files}
    assert len(sizes) <= 4, sizes
    assert sum(sizes.values()) <= 6e6, sizes
    assert len(pull()) == 10_001


def test_half_precision_stays_and_is_not_uploaded_again(text_bank, push, pull, server):
    push(text_bank, dtype=torch.float16)
    bank = pull()
    assert bank["neon"].increment.B.dtype == torch.float16
    server.forget()
    push(replace(bank, origin=None))
    assert (server.commits, server.uploaded) == ([], [])


def test_pulling_two_of_a_hundred_fetches_two(push, pull, server):
    bank = pocket.bank("objects")
    push(bank, concepts=[name for name in bank if name not in ("cat", "fox")])
    before = server.files(REPOSITORY)
    push(bank)
    [shard] = shards(server.files(REPOSITORY)) - shards(before)
    server.forget()
    part = pull(concepts=["cat", "fox"])
    assert sorted(server.fetched) == [shard, MANIFEST]
    assert same(bank.subset(["cat", "fox"]), part)


def test_a_lora_is_pulled_without_the_config_that_other_loaders_want(mixed_bank, push, pull, server):
    push(mixed_bank)
    server.forget()
    pull(concepts=["woodcut"])
    assert sorted(server.fetched) == [MANIFEST, "woodcut/adapter_model.safetensors"]


def test_named_concepts_are_pushed_alone(text_bank, push, pull, server):
    push(text_bank)
    before = server.files(REPOSITORY)
    other = text_bank.with_entries(map(stronger, text_bank.values()))
    server.forget()
    push(other, concepts=["cat"])
    [shard] = shards(server.files(REPOSITORY)) - shards(before)
    assert server.commits == [[shard, MANIFEST]]
    assert same(text_bank.with_entries([other["cat"]]), pull())


def test_a_part_that_was_pulled_leaves_the_rest_on_the_hub(text_bank, push, pull):
    push(text_bank)
    push(grown(pull(concepts=["neon"]), "chalk"))
    assert list(pull()) == [*text_bank, "chalk"]


def test_pushing_the_same_bank_again_makes_no_commit(text_bank, push, pull, server):
    push(text_bank)
    server.forget()
    push(text_bank)
    push(pull())
    assert server.commits == []


def test_removal_is_said(mixed_bank, push, pull, server):
    push(mixed_bank)
    push(mixed_bank.subset(["neon"]))
    assert set(pull()) == set(mixed_bank)
    push(mixed_bank.subset(["neon"]), remove=["woodcut", "cat"])
    assert set(pull()) == {"neon", "pencil"}
    assert not [file for file in server.files(REPOSITORY) if file.startswith("woodcut/")]
    with pytest.raises(KeyError, match=r"cannot remove \['ghost'\]"):
        push(mixed_bank, remove=["ghost"])


@pytest.mark.parametrize("option", ["remove", "concepts"])
def test_one_string_is_not_a_list_of_letters(option, text_bank, push, server):
    push(text_bank)
    before = server.files(REPOSITORY)
    with pytest.raises(TypeError, match=r"list of concepts: \['cat'\]"):
        push(text_bank, **{option: "cat"})
    assert server.files(REPOSITORY) == before


def test_another_form_replaces_the_former_files(text_bank, mixed_bank, push, pull, server):
    push(text_bank)
    module = renamed(mixed_bank["woodcut"], "cat")
    push(text_bank.with_entries([module]), concepts=["cat"])
    lora = {"cat/adapter_model.safetensors", "cat/adapter_config.json"}
    assert {file for file in server.files(REPOSITORY) if "/" in file} == lora
    assert pull()["cat"].increment.form == "module"
    push(text_bank, concepts=["cat"])
    assert not [file for file in server.files(REPOSITORY) if "/" in file]
    assert pull()["cat"].increment.form == "text"


def test_names_with_one_slug_do_not_collide_with_what_is_there(mixed_bank, push, pull, server):
    entry = mixed_bank["woodcut"]
    twice = replace(entry, increment=replace(entry.increment, C={m: 2 * c for m, c in entry.increment.C.items()}))
    push(mixed_bank)
    push(mixed_bank.with_entries([renamed(twice, "woodcut?")]), concepts=["woodcut?"])
    bank = pull()
    assert set(bank) == {*mixed_bank, "woodcut?"}
    for name, made in {"woodcut": entry, "woodcut?": twice}.items():
        assert same(mixed_bank.with_entries([renamed(made, name)]).subset([name]), bank.subset([name]))
    push(bank.with_entries([renamed(twice, "woodcut")]))
    assert len({file.split("/")[0] for file in server.files(REPOSITORY) if "/" in file}) == 2


def test_a_new_and_a_pushed_version_of_one_bank_follow_each_other(text_bank, push, pull):
    """A bank knows what it pushed: its next push is no conflict with its last."""
    push(text_bank)
    bank = grown(pull(), "chalk")
    push(bank)
    bank = bank.with_entries([stronger(bank["chalk"])])
    push(bank)
    assert same(bank, pull())


def test_what_one_bank_pushed_is_not_known_to_another_of_the_same_pull(text_bank, push, pull, server):
    """Each knows the Hub as it last saw it itself: the second of two that change one concept is a conflict."""
    push(text_bank)
    pulled = pull()
    first, second = (pulled.with_entries([stronger(pulled["cat"], factor)]) for factor in (2.0, 3.0))
    push(first)
    before = server.files(REPOSITORY)
    with pytest.raises(PushConflict, match=r"\['cat'\] changed on the Hub"):
        push(second)
    with pytest.raises(PushConflict, match=r"\['cat'\] changed on the Hub"):
        push(pulled, remove=["cat"])
    assert server.files(REPOSITORY) == before
    push(first.with_entries([stronger(first["cat"])]))


def based(bank: ConceptBank, **changes) -> ConceptBank:
    return replace(bank, base=replace(bank.base, **changes))


def test_doors_of_two_banks_add_up(text_bank, push, pull):
    doors = text_bank.base.doors
    push(based(text_bank, doors={**doors, "pooled": Encoding(8)}))
    push(grown(based(text_bank, doors={**doors, "other": Encoding(9)}), "chalk"))
    assert pull().base.doors == {**doors, "pooled": Encoding(8), "other": Encoding(9)}


class TestBases:
    def test_one_repository_serves_two_checkpoints_with_the_same_text_encoders(self, text_bank, push, pull):
        """Text-side banks alone: of either checkpoint, and of one whose denoiser nobody had in memory."""
        push(text_bank)
        push(grown(based(text_bank, name="another", projections=other_weights(text_bank)), "chalk"))
        assert (pull().base.name, pull().base.projections) == ("another", other_weights(text_bank))
        push(grown(based(text_bank, name="third", projections=None), "crayon"))
        assert set(pull()) == {*text_bank, "chalk", "crayon"}

    def test_text_side_increments_join_per_module_ones_of_another_checkpoint(self, mixed_bank, text_bank, push, pull):
        push(mixed_bank)
        push(grown(based(text_bank, name="another", projections=other_weights(text_bank)), "chalk"))
        assert set(pull()) == {*mixed_bank, "chalk"}
        assert pull().base == mixed_bank.base

    @pytest.mark.parametrize("there", ["mixed_bank", "text_bank"])
    def test_per_module_increments_of_another_checkpoint_do_not(self, there, mixed_bank, push, server, request):
        push(request.getfixturevalue(there))
        before = server.files(REPOSITORY)
        with pytest.raises(BankError, match="another base"):
            push(based(mixed_bank, projections=other_weights(mixed_bank)), concepts=["woodcut"])
        assert server.files(REPOSITORY) == before

    @pytest.mark.parametrize("change", [{"layer": "penultimate"}, {"n_tokens": 77}, {"template": "say {}"}])
    def test_another_use_of_the_text_encoders_is_another_base(self, change, text_bank, push, server):
        push(text_bank)
        before = server.files(REPOSITORY)
        doors = {name: replace(door, **change) for name, door in text_bank.base.doors.items()}
        with pytest.raises(BankError, match="another base"):
            push(grown(based(text_bank, doors=doors), "chalk"))
        assert server.files(REPOSITORY) == before


def other_weights(bank: ConceptBank) -> dict[str, tuple[int, float]]:
    return {name: (d_out, norm * 1.1) for name, (d_out, norm) in bank.base.projections.items()}


def test_tables_of_both_sides_are_merged_by_what_they_hold(text_bank, push, pull, server):
    """What both have stands there once, what nothing refers to any more is gone."""

    def tables() -> dict[str, dict]:
        manifest = json.loads(server.files(REPOSITORY)[MANIFEST])
        return {table: manifest[table] for table in TABLES}

    push(text_bank)
    assert [len(table) for table in tables().values()] == [1, 3, 1]
    mine, theirs = pull(), pull()
    neon = theirs["neon"]
    other = GuardSet(("a lamp",), extends=neon.guard_set)
    chalk = replace(renamed(neon, "chalk"), guard_set=other, config=replace(neon.config, rank=7))
    push(theirs.with_entries([chalk]))
    push(mine.with_entries([renamed(mine["cat"], "crayon")]))
    assert [len(table) for table in tables().values()] == [2, 5, 2]
    merged = pull()
    assert (merged["chalk"].guard_set, merged["chalk"].config) == (other, chalk.config)
    assert same(text_bank, merged.subset(text_bank))
    push(merged, remove=["chalk", "crayon"])
    assert [len(table) for table in tables().values()] == [1, 3, 1]
    assert same(text_bank, pull())


class TestConcurrency:
    def test_what_others_added_and_changed_since_the_pull_stays(self, text_bank, push, pull):
        push(text_bank)
        mine, theirs = pull(), pull()
        theirs = grown(theirs, "crayon").with_entries([stronger(theirs["cat"])])
        push(theirs)
        push(grown(mine, "chalk"))
        merged = pull()
        assert list(merged) == [*text_bank, "crayon", "chalk"]
        assert torch.equal(merged["cat"].increment.B, theirs["cat"].increment.B)

    @pytest.mark.parametrize("named", [None, ["cat"]])
    def test_two_versions_of_one_concept_are_a_conflict(self, named, text_bank, push, pull, server):
        push(text_bank)
        mine, theirs = pull(), pull()
        push(theirs.with_entries([stronger(theirs["cat"])]))
        before = server.files(REPOSITORY)
        with pytest.raises(PushConflict, match=r"\['cat'\] changed on the Hub"):
            push(mine.with_entries([stronger(mine["cat"], 5.0)]), concepts=named)
        with pytest.raises(PushConflict, match=r"\['cat'\] changed on the Hub"):
            push(mine, remove=["cat"])
        assert server.files(REPOSITORY) == before

    def test_a_bank_that_was_not_pulled_replaces_what_is_named_only(self, text_bank, push, pull):
        push(text_bank)
        other = text_bank.with_entries([stronger(text_bank["cat"])])
        with pytest.raises(PushConflict, match=r"other versions of \['cat'\].*concepts="):
            push(other)
        push(other, concepts=["cat"])
        assert same(other, pull())

    def test_a_concept_that_the_hub_has_and_a_part_lacks_is_not_replaced_unknowingly(self, text_bank, push, pull):
        push(text_bank)
        part = pull(concepts=["neon"])
        part = part.with_entries([stronger(text_bank["cat"])])
        with pytest.raises(PushConflict):
            push(part)
        push(part, concepts=["cat"])
        assert torch.equal(pull()["cat"].increment.B, part["cat"].increment.B)

    def test_a_push_in_the_middle_of_a_push_is_noticed(self, text_bank, push, pull, server):
        """The Hub refuses a commit whose parent is not the head any more; the push is made again on the newer one."""
        push(text_bank)
        banks = [grown(pull(), name) for name in ("chalk", "crayon")]
        server.meet_before_commit(2)
        threads = [threading.Thread(target=push, args=(bank,)) for bank in banks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.refused == 1
        assert set(pull()) == {*text_bank, "chalk", "crayon"}

    def test_two_clients_and_one_concept_in_the_same_moment(self, text_bank, push, pull, server):
        push(text_bank)
        banks = [pull().with_entries([stronger(text_bank["cat"], factor)]) for factor in (2.0, 3.0)]
        server.meet_before_commit(2)
        raised = []

        def client(bank: ConceptBank) -> None:
            try:
                push(bank)
            except PushConflict as error:
                raised.append((bank, error))

        threads = [threading.Thread(target=client, args=(bank,)) for bank in banks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [(loser, _)] = raised
        [winner] = [bank for bank in banks if bank is not loser]
        assert same(winner, pull())


class TestPolicy:
    def test_a_part_cannot_be_pushed_without_what_its_policy_always_erases(self, text_bank, push, server):
        bank = replace(text_bank, always=("cat",))
        with pytest.raises(ValueError, match=r"always erases \['cat'\]"):
            push(bank, concepts=["neon"])
        assert set(server.files(REPOSITORY)) == {".gitattributes"}
        push(bank)
        push(grown(bank, "chalk"), concepts=["chalk"])

    def test_a_part_does_not_weaken_the_policy_on_the_hub(self, text_bank, push, pull):
        push(replace(text_bank, always=("cat",)))
        push(grown(text_bank, "chalk"))
        push(grown(replace(pull(), always=()), "crayon"), concepts=["crayon"])
        assert pull().always == ("cat",)

    def test_policies_of_two_clients_add_up_and_their_owner_can_relax_them(self, text_bank, push, pull):
        push(text_bank)
        mine, theirs = pull(), pull()
        push(replace(theirs, always=("cat",)))
        push(replace(mine, always=("neon",)))
        both = pull()
        assert both.always == ("cat", "neon")
        push(replace(both, always=("neon",)))
        assert pull().always == ("neon",)

    def test_what_is_always_erased_cannot_be_removed(self, text_bank, push, pull):
        push(replace(text_bank, always=("cat",)))
        with pytest.raises(ValueError, match=r"always erases \['cat'\]"):
            push(text_bank.subset(["neon"]), remove=["cat"])


def test_a_pull_request_leaves_main_alone(text_bank, push, pull, server):
    push(text_bank)
    info = push(grown(text_bank, "chalk"), token=STRANGER, create_pr=True)
    assert info.pr_url.endswith(f"{REPOSITORY}/discussions/1")
    assert "chalk" not in pull()
    assert "chalk" in pull(revision="refs/pr/1")
    push(grown(pull(revision="refs/pr/1"), "crayon"), revision="refs/pr/1")
    assert list(pull(revision="refs/pr/1")) == [*text_bank, "chalk", "crayon"]


def test_without_a_namespace_it_is_the_users_own(text_bank, push, pull):
    push(text_bank, "my-bank")
    assert same(text_bank, pull("me/my-bank"))


def test_a_branch_is_made_and_pulled(text_bank, push, pull):
    push(text_bank)
    push(grown(text_bank, "chalk"), revision="next")
    assert "chalk" not in pull()
    assert "chalk" in pull(revision="next")


def test_an_old_commit_can_be_pulled(text_bank, push, pull):
    first = push(text_bank)
    push(grown(text_bank, "chalk"))
    assert same(text_bank, pull(revision=first.oid))


class TestAccess:
    def test_a_private_repository_is_for_its_owner(self, text_bank, push, pull):
        push(text_bank, private=True)
        assert same(text_bank, pull(token=WRITER))
        with pytest.raises(RepositoryNotFoundError) as raised:
            pull(cache="other")
        assert raised.value.response.status_code == 401
        with pytest.raises(RepositoryNotFoundError) as raised:
            pull(cache="other", token=STRANGER)
        assert raised.value.response.status_code == 404

    @pytest.mark.parametrize(("token", "status"), [(STRANGER, 403), (False, 401)])
    def test_a_gated_repository_is_for_whom_it_lets_in(self, token, status, text_bank, push, pull, server):
        push(text_bank)
        server.repositories[REPOSITORY].gated = True
        with pytest.raises(GatedRepoError) as raised:
            pull(token=token)
        assert raised.value.response.status_code == status
        assert same(text_bank, pull(token=WRITER))

    @pytest.mark.parametrize(("token", "status"), [(STRANGER, 403), (NARROW, 403), (False, 401)])
    def test_who_may_not_write_changes_nothing(self, token, status, text_bank, push, server):
        push(text_bank)
        before = server.files(REPOSITORY)
        with pytest.raises(HfHubHTTPError) as raised:
            push(grown(text_bank, "chalk"), token=token)
        assert raised.value.response.status_code == status
        assert server.files(REPOSITORY) == before

    def test_a_private_push_does_not_end_in_public(self, text_bank, push, server):
        push(text_bank)
        server.forget()
        with pytest.raises(ValueError, match="exists and is public"):
            push(grown(text_bank, "secret"), private=True)
        assert (server.commits, server.uploaded) == ([], [])

    def test_what_is_not_there_is_said_by_the_hubs_own_errors(self, text_bank, push, pull):
        with pytest.raises(RepositoryNotFoundError):
            pull("me/ghost")
        push(text_bank)
        with pytest.raises(HfHubHTTPError, match="Revision Not Found"):
            pull(revision="ghost")
        with pytest.raises(KeyError, match="ghost"):
            pull(concepts=["ghost"])

    def test_no_path_and_no_id(self):
        with pytest.raises(BankError, match="neither a folder nor a repository id"):
            ConceptBank.from_pretrained("./not/a/folder")


class TestOtherPeoplesRepositories:
    def test_one_without_a_bank_is_not_written_to(self, text_bank, push, pull, server):
        server.publish(REPOSITORY, {"model.safetensors": b"mine", "README.md": b"mine"})
        with pytest.raises(BankError, match="holds other files and no concept bank"):
            push(text_bank)
        with pytest.raises(BankError, match=MANIFEST):
            pull()

    def test_a_newer_format_is_left_alone(self, text_bank, push, server):
        push(text_bank)
        files = server.files(REPOSITORY)
        manifest = json.loads(files[MANIFEST]) | {"version": 99}
        server.publish(REPOSITORY, {**files, MANIFEST: json.dumps(manifest).encode()})
        with pytest.raises(BankError, match="version 99"):
            push(grown(text_bank, "chalk"))

    def test_a_shard_is_named_by_its_content(self, text_bank, push, pull, server, tmp_path):
        """Otherwise a push would take another file of its name for the one that it means."""
        push(text_bank)
        files = server.files(REPOSITORY)
        [shard] = shards(files)
        renamed = files[MANIFEST].replace(shard.encode(), b"increments-" + b"0" * 16 + b".safetensors")
        (tmp_path / MANIFEST).write_bytes(renamed)
        reseal(tmp_path, lambda manifest: None)
        server.publish(REPOSITORY, {**files, MANIFEST: (tmp_path / MANIFEST).read_bytes()})
        with pytest.raises(BankError, match="not named by their content"):
            push(grown(text_bank, "chalk"))
        with pytest.raises(BankError, match="not named by their content"):
            pull()


class TestTrouble:
    """Whatever happens on the way: the old bank or the new one on the Hub, a whole bank or none on this side."""

    @pytest.mark.parametrize("kind", ["die", "lose"])
    def test_a_push_that_breaks_off_can_be_made_again(self, kind, text_bank, push, pull, server):
        push(text_bank)
        bank = grown(pull(), "chalk")
        before = server.files(REPOSITORY)
        server.faults = [Fault("POST .*/commit/", kind, times=1)]
        with pytest.raises(Exception, match="disconnected"):
            push(bank)
        assert len(server.files(REPOSITORY).keys() - before.keys()) == {"die": 0, "lose": 1}[kind]
        push(bank)
        assert same(bank, pull())

    def test_an_upload_that_breaks_off_once_is_made_again(self, text_bank, push, pull, server):
        server.faults = [Fault("PUT /lfs/", "die", times=1)]
        push(text_bank)
        assert same(text_bank, pull())

    @pytest.mark.parametrize("file", [MANIFEST, "increments-"])
    @pytest.mark.parametrize("kind", ["truncate", "corrupt"])
    def test_damage_on_the_way_is_refused_and_repaired(self, kind, file, text_bank, push, pull, server):
        """The cache trusts what it once stored: a retry with a healthy server must not meet the broken file again."""
        push(text_bank)
        server.faults = [Fault(f"^GET .*/resolve/.*{file}", kind)]
        with pytest.raises(BankError):
            pull()
        server.faults = []
        assert same(text_bank, pull())
        assert same(text_bank, pull(local_files_only=True))

    def test_damage_that_happens_once_is_not_noticed(self, text_bank, push, pull, server):
        push(text_bank)
        server.faults = [Fault("^GET .*/increments-", "corrupt", times=1)]
        assert same(text_bank, pull())

    def test_damage_in_the_cache_is_repaired(self, text_bank, push, pull, tmp_path):
        push(text_bank)
        pull()
        for blob in (tmp_path / "cache").rglob("blobs/*"):
            blob.write_bytes(blob.read_bytes()[:-1] + b"!")
        with pytest.raises(BankError):
            pull(local_files_only=True)
        assert same(text_bank, pull())

    def test_only_damaged_files_are_downloaded_again(self, text_bank, in_shards, pull, server, tmp_path):
        of = in_shards()
        pull()
        (link,) = (tmp_path / "cache").rglob(f"snapshots/*/{of['neon']}")
        link.resolve().write_bytes(b"damaged")
        server.forget()
        assert same(text_bank, pull())
        assert server.fetched == [of["neon"]]

    def test_damage_to_a_lora_is_repaired(self, mixed_bank, push, pull, server, tmp_path):
        push(mixed_bank)
        pull()
        (link,) = (tmp_path / "cache").rglob("snapshots/*/woodcut/*.safetensors")
        link.resolve().write_bytes(link.read_bytes()[:-1] + b"!")
        server.forget()
        assert same(mixed_bank, pull())
        assert server.fetched == ["woodcut/adapter_model.safetensors"]

    @pytest.mark.parametrize("change", [{"version": 99}, {"policy": {"always": ["ghost"]}}])
    def test_what_is_wrong_but_not_damaged_is_not_downloaded_again(self, change, text_bank, push, pull, server):
        """A newer version, or a manifest that breaks the rules, is the same after every download."""
        push(text_bank)
        files = server.files(REPOSITORY)
        manifest = json.loads(files[MANIFEST]) | change | {"digest": "0" * 64}
        blank = json.dumps(manifest).encode()
        sealed = blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)
        server.publish(REPOSITORY, {**files, MANIFEST: sealed})
        server.forget()
        with pytest.raises(BankError, match=r"version 99|ghost"):
            pull()
        assert server.fetched == [MANIFEST]

    def test_a_server_that_dies_in_the_middle(self, text_bank, push, pull, server):
        push(text_bank)
        server.faults = [Fault("^GET .*/increments-", "die", times=2)]
        assert same(text_bank, pull())
        server.faults = [Fault("^GET .*/increments-", "die")]
        with pytest.raises(DownloadError, match=REPOSITORY):
            pull(cache="other")
        server.faults = []
        assert same(text_bank, pull(cache="other"))

    def test_a_slow_server_is_given_up(self, text_bank, push, pull, server, monkeypatch):
        push(text_bank)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
        server.faults = [Fault("^GET .*/increments-", "slow", seconds=2.0)]
        with pytest.raises(DownloadError, match="timed out"):
            pull(cache="other")

    def test_a_push_between_manifest_and_concepts_does_not_mix_two_banks(self, text_bank, push, pull, server):
        """One commit is pulled, whatever the branch does meanwhile."""
        push(text_bank)
        newer = text_bank.with_entries(map(stronger, text_bank.values()))
        server.before["GET .*/resolve/.*/increments-"] = lambda: push(newer, concepts=list(newer))
        assert same(text_bank, pull())
        assert same(newer, pull())


def test_offline_the_cache_is_used(in_shards, pull, server):
    of = in_shards()
    with pytest.raises(FileNotFoundError):
        pull(local_files_only=True)
    part = pull(concepts=["neon"])
    server.forget()
    assert same(part, pull(concepts=["neon"], local_files_only=True))
    with pytest.raises(FileNotFoundError):
        pull(local_files_only=True)
    assert server.fetched == []
    pull()
    assert sorted(server.fetched) == sorted([of["cat"], of["pencil"]])


def test_a_pipeline_pulls_by_name(pipe, mixed_bank, push, server, tmp_path):
    push(mixed_bank)
    pipe.load_sepme(REPOSITORY, concepts=["cat", "woodcut"], endpoint=server.endpoint, cache_dir=tmp_path)
    pipe.set_erased(["woodcut"])
    assert pipe.erasable == ("cat", "woodcut")


def test_the_card_names_the_repository_and_keeps_its_licence(text_bank, push, server):
    push(text_bank, license="mit")
    push(grown(text_bank, "chalk"))
    card = ModelCard(server.files(REPOSITORY)["README.md"].decode())
    assert f'load_sepme("{REPOSITORY}")' in card.text
    assert card.data.license == "mit"


def test_a_base_in_a_folder_does_not_spoil_the_card(text_bank, push, server, tmp_path: Path):
    push(replace(text_bank, base=replace(text_bank.base, name=str(tmp_path))))
    assert "base_model" not in ModelCard(server.files(REPOSITORY)["README.md"].decode()).data.to_dict()


def test_the_snippet_of_a_pushed_card_runs(push, server, monkeypatch, tmp_path):
    """As it stands, with the repository's id in it."""
    bank = pocket.bank("styles")
    push(replace(bank, base=replace(bank.base, name=str(pocket.path()))))
    snippet = re.search(r"```python\n(.*?)```", server.files(REPOSITORY)["README.md"].decode(), re.DOTALL)[1]
    server.use(monkeypatch, tmp_path)
    namespace: dict = {}
    exec(compile(snippet, "card", "exec"), namespace)
    assert namespace["pipe"].erased == (next(iter(bank)),)


def test_pictures_are_pushed_beside_the_bank(text_bank, push, pull, server):
    picture = Picture("cat-before", "a cat (before)", Image.new("RGB", (8, 8), "red"))
    push(text_bank, pictures=[picture])
    push(grown(text_bank, "chalk"))
    push(grown(text_bank, "Assets"), concepts=["Assets"])
    files = server.files(REPOSITORY)
    assert [file for file in files if file.startswith("assets/")] == ["assets/cat-before.png"]
    assert ModelCard(files["README.md"].decode()).data.widget[0]["output"]["url"] == "assets/cat-before.png"
    assert set(pull()) == {*text_bank, "chalk", "Assets"}
