import hashlib
import json
from pathlib import Path

import pytest
from jsonschema_rs import Draft202012Validator, meta

import sepme_diffusers
from sepme_diffusers import BankError
from sepme_diffusers.bank.layout import MANIFEST
from sepme_diffusers.bank.manifest import MAX_BYTES, examine, parse, seal
from tiny import tiny_bank


@pytest.fixture
def manifest(tmp_path) -> dict:
    tiny_bank().save_pretrained(tmp_path / "bank")
    return json.loads((tmp_path / "bank" / MANIFEST).read_bytes())


def resealed(manifest: dict) -> bytes:
    return seal({key: value for key, value in manifest.items() if key != "digest"}, Path(MANIFEST))


def faults(data: bytes) -> list[str]:
    return examine(data)[1]


def refused(manifest: dict) -> str:
    with pytest.raises(BankError, match=MANIFEST) as error:
        resealed(manifest)
    return str(error.value)


def test_the_published_schema_is_one_and_holds_for_what_is_written(manifest):
    schema = json.loads(
        (Path(sepme_diffusers.__file__).parent / "bank" / "schema" / "sepme_bank.schema.json").read_text()
    )
    meta.validate(schema)
    assert not list(Draft202012Validator(schema).iter_errors(manifest))
    del manifest["concepts"]["neon"]["guards"]
    assert list(Draft202012Validator(schema).iter_errors(manifest))


def test_the_digest_is_of_the_bytes_with_its_digits_zeroed(manifest):
    """As docs/format.md says it, with nothing but a hash and a replacement."""
    data = resealed(manifest)
    digest = json.loads(data)["digest"].encode()
    assert data.count(digest) == 1
    assert hashlib.sha256(data.replace(digest, b"0" * 64)).hexdigest().encode() == digest


def test_any_changed_byte_of_a_manifest_is_noticed(manifest):
    data = resealed(manifest)
    assert not faults(data)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        assert faults(bytes(changed)), place


def test_every_fault_is_listed_at_once(manifest):
    manifest["base"]["width"] = -1
    manifest["policy"]["always"] = [3]
    manifest["concepts"]["neon"]["config"]["solver"] = "magic"
    message = refused(manifest)
    assert all(word in message for word in ("$.base.width", "$.policy.always", "$.concepts.neon.config.solver"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 20_000, "not JSON"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "not JSON"),
        (b'{"format": "sepme_bank", "metrics": ' + b"[" * 100 + b"]" * 100 + b"}", "nested deeper"),
        (b'{"format": "sepme_bank", "format": "sepme_bank"}', "given twice"),
        (b'{"format": "sepme_bank", "version": NaN}', "NaN is not a number"),
        (b'{"format": "sepme_bank", "version": -Infinity}', "-Infinity is not a number"),
        (b'{"format": "sepme_bank", "version": 1e999}', "not finite"),
        (b'{"format": "sepme_bank", "version": 9007199254740993}', "out of range"),
        (b'{"format": "sepme_bank", "version": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b'{"format": "sepme_bank", "name": "\\ud800"}', "surrogates"),
        (b'\xff\xfe{"format": "sepme_bank"}', "not JSON"),
        (b'{"format": "sepme_bank", "version": 6}', "version 6.*Upgrade"),
        (b'{"format": "sepme_bank", "version": "1"}', "version '1'"),
        (b'{"format": "sepme_bank", "version": true}', "version True"),
        (b'{"format": "other"}', "not the manifest of a concept bank"),
        (b'{"format": "sepme_bank", "version": 1, "a": [' + b"1," * (MAX_BYTES // 2 - 100) + b"1]}", "libraries|'a'"),
        (b"null", "not the manifest of a concept bank"),
        (b" " * (MAX_BYTES + 1), "bytes"),
    ],
    ids=lambda value: "text" if isinstance(value, bytes) else value,
)
def test_hostile_json_is_refused(text, message):
    with pytest.raises(BankError, match=message):
        parse(text, Path(MANIFEST))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["concepts"]["neon"].update(rank=2.0), r"\$.concepts.neon.rank"),
        (lambda m: m["concepts"]["neon"]["config"].update(seed=1.0), r"\$.concepts.neon.config.seed"),
        (lambda m: m["base"].update(width=8.0), r"\$.base.width"),
        (lambda m: m["concepts"]["neon"].update(rank=0), r"\$.concepts.neon.rank"),
        (lambda m: m["concepts"]["neon"].update(rank=9), "rank of 9 exceeds the width 8"),
        (lambda m: m["concepts"]["neon"].update(guards=[]), r"\$.concepts.neon.guards"),
        (lambda m: m["concepts"]["neon"].update(guards=[None]), r"\$.concepts.neon.guards"),
        (lambda m: m["concepts"]["neon"].update(pickle="x.pkl"), "pickle"),
        (lambda m: m["concepts"]["neon"].update(form="module"), "not a file of a concept's folder"),
        (lambda m: m["concepts"]["neon"].update(file="NEON/text_increment.safetensors"), "not a file of a concept's"),
        (lambda m: m["concepts"]["neon"].update(file="cat/text_increment.safetensors"), "'cat' is not named after it"),
        (lambda m: m["concepts"]["neon"].update(file="neon/x.bin"), "not a file of a concept's folder"),
        (lambda m: m["concepts"]["neon"].update(sha256="0" * 64 + "\n"), "sha256"),
        (lambda m: m["concepts"]["neon"].update(beside={"evil.pkl": "0" * 64}), "unknown files beside"),
        (lambda m: m["concepts"]["neon"]["metrics"].update(leakage="none"), "leakage"),
        (lambda m: m["concepts"]["neon"]["config"].update(seed=True), "seed"),
        (lambda m: m["base"]["projections"].update({"../x": [4, 1.0]}), r"\.\./x"),
        (lambda m: m["concepts"].update({"": m["concepts"]["neon"]}), "concepts"),
        (lambda m: m["concepts"].update({"x" * 201: m["concepts"]["neon"]}), "longer than 200"),
        (lambda m: m["policy"].update(always=["ghost"]), "ghost"),
    ],
)
def test_what_does_not_make_sense_is_refused(manifest, edit, message):
    edit(manifest)
    with pytest.raises(BankError, match=message):
        resealed(manifest)


@pytest.mark.parametrize("twin", ["Neon", "ＮＥＯＮ", "nеon", "neοn", " neon"])
def test_look_alike_names_are_refused(manifest, twin):
    manifest["concepts"][twin] = manifest["concepts"]["neon"]
    assert "look alike" in refused(manifest)


def test_two_concepts_cannot_share_a_folder(manifest):
    manifest["concepts"]["neon!"] = manifest["concepts"]["neon"]
    assert "its folder 'neon' is that of 'neon'" in refused(manifest)


def test_version_2_may_hold_records_of_version_1_and_version_1_nothing_newer(manifest):
    del manifest["concepts"]["Van Gogh"]["beside"]
    assert not faults(resealed(manifest))
    manifest["version"] = 1
    assert any("digest" in fault for fault in faults(json.dumps(manifest).encode()))
