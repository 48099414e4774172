import hashlib
import json
from pathlib import Path

import pytest
from jsonschema_rs import Draft202012Validator, meta

import sepme_diffusers
from sepme_diffusers import BankError, PolicyError
from sepme_diffusers.bank.disk.layout import MANIFEST
from sepme_diffusers.bank.disk.manifest import MAX_BYTES, _values, examine, parse, seal
from sepme_diffusers.bank.guard_sets import LONGEST_CHAIN, content_name
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
        (Path(sepme_diffusers.__file__).parent / "bank" / "disk" / "schema" / "sepme_bank.schema.json").read_text()
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
    manifest["base"]["doors"]["tokens"]["width"] = -1
    manifest["policy"]["always"] = [3]
    (config,) = manifest["configs"]
    manifest["configs"][config]["solver"] = "magic"
    message = refused(manifest)
    places = ("$.base.doors.tokens.width", "$.policy.always", f"$.configs.{config}.solver")
    assert all(place in message for place in places)


HEAD = b'{"format": "sepme_bank", "version": 1, '


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 20_000, "not JSON"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "not JSON"),
        (HEAD + b'"metrics": ' + b"[" * 100 + b"]" * 100 + b"}", "nested deeper"),
        (b'{"format": "sepme_bank", "format": "sepme_bank"}', "a key is given twice: 'format'"),
        (b'{"format": "sepme_bank", "version": NaN}', "not JSON"),
        (b'{"format": "sepme_bank", "version": -Infinity}', "not JSON"),
        (HEAD + b'"a": 1e999}', "not finite"),
        (HEAD + b'"a": 9007199254740993}', "out of range"),
        (HEAD + b'"a": -9007199254740993}', "out of range"),
        (b'{"format": "sepme_bank", "version": ' + b"9" * 10_000 + b"}", "not JSON"),
        (HEAD + b'"name": "\\ud800"}', "not JSON"),
        (HEAD + b'"\\udfff": 1}', "not JSON"),
        (HEAD + b'"a": [{"\\udfff": 1}]}', "not JSON"),
        (b'\xff\xfe{"format": "sepme_bank"}', "not JSON"),
        (b'{"format": "sepme_bank", "version": 2}', "version 2.*Upgrade"),
        (b'{"format": "sepme_bank", "version": "1"}', "version '1'"),
        (b'{"format": "sepme_bank", "version": true}', "version True"),
        (b'{"format": "other"}', "not the manifest of a concept bank"),
        (HEAD + b'"a": [' + b"1," * (MAX_BYTES // 2 - 100) + b"1]}", "required|'a'"),
        (b"null", "not the manifest of a concept bank"),
        (b" " * (MAX_BYTES + 1), "bytes"),
    ],
    ids=lambda value: "text" if isinstance(value, bytes) else value,
)
def test_hostile_json_is_refused(text, message):
    with pytest.raises(BankError, match=message):
        parse(text, Path(MANIFEST))


@pytest.mark.parametrize("space", ["", " ", "\n", "\t", " \r\n"])
@pytest.mark.parametrize("text", ["", ":", '\\":', "a :", "\\n:", '{\\"a\\":1,\\"a\\":2}', ":" * 9])
def test_keys_that_are_there_twice_are_found_whatever_colons_texts_have(space, text):
    """At any depth; and what only looks like a key, inside of a text, is none."""
    once = f'{{"a"{space}:[{{"b"{space}:"{text}"}}],"c":{{"b":1}}}}'
    assert _values(once.encode()) == json.loads(once)
    for key in ("b", "d"):
        twins = f'{{"a"{space}:[{{"{key}"{space}:"{text}","{key}"{space}:2}}]}}'
        with pytest.raises(ValueError, match=f"a key is given twice: '{key}'"):
            _values(twins.encode())


NEON, VAN_GOGH = (lambda m: m["concepts"]["neon"]), (lambda m: m["concepts"]["Van Gogh"])


def only(table: dict) -> dict:
    (value,) = table.values()
    return value


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: VAN_GOGH(m).update(rank=2.0), r"concepts.Van Gogh.rank: 2.0 is not written as an integer"),
        (lambda m: only(m["configs"]).update(seed=1.0), r"\.seed: 1.0 is not written as an integer"),
        (lambda m: only(m["configs"]).update(seed=True), "seed"),
        (lambda m: only(m["configs"]).update(seed=1), "are not named by their content"),
        (lambda m: only(m["guard_sets"]).update(exact=["x"]), "are not named by their content"),
        (lambda m: only(m["wordings"]).update(pairs=[["a", "b"]]), "are not named by their content"),
        (lambda m: m["configs"].clear(), "its config '.*' is not in configs"),
        (lambda m: m["guard_sets"].clear(), "its guards '.*' is not in guard_sets"),
        (lambda m: m["wordings"].clear(), "its wording '.*' is not in wordings"),
        (lambda m: m["shards"].clear(), "its shard '.*' is not in shards"),
        (lambda m: only(m["shards"]).update(bytes=2.0), r"shards.*2.0 is not written as an integer"),
        (lambda m: only(m["shards"]).update(bytes=0), r"\.bytes"),
        (lambda m: only(m["shards"]).update(sha256="0" * 64 + "\n"), "sha256"),
        (lambda m: m["shards"].update({"../x.safetensors": only(m["shards"])}), r"\$\.shards"),
        (lambda m: m["shards"].update({"increments-0.safetensors\n": only(m["shards"])}), r"\$\.shards"),
        (lambda m: m["base"]["doors"]["tokens"].update(width=8.0), "tokens.width: 8.0 is not written as an int"),
        (lambda m: VAN_GOGH(m).update(rank=0), r"\$.concepts.Van Gogh"),
        (lambda m: VAN_GOGH(m).update(rank=9), "a rank of 9 is not from 1 to the width 8"),
        (lambda m: NEON(m)["rows"].update(tokens=[0, 9]), "a rank of 9 is not from 1 to the width 8"),
        (lambda m: NEON(m)["rows"].update(tokens=[1, 1]), "a rank of 0 is not"),
        (lambda m: NEON(m)["rows"].update(tokens=[-1, 1]), r"\$.concepts.neon"),
        (lambda m: NEON(m)["rows"].update(tokens=[0, True]), r"\$.concepts.neon"),
        (lambda m: NEON(m)["rows"].update(tokens=[0, 2**53 + 1]), "out of range"),
        (lambda m: NEON(m)["rows"].update(pooled=[0, 1]), "acts at the door 'pooled', which the base lacks"),
        (lambda m: NEON(m).update(gates={"pooled": 1.0}), r"gates at the doors \['pooled'\], where it does not act"),
        (lambda m: VAN_GOGH(m).update(gates={"pooled": 1.0}), r"gates at the doors \['pooled'\], where it does not"),
        (lambda m: NEON(m).update(gates={"tokens": -1.0}), r"\$.concepts.neon"),
        (lambda m: NEON(m).update(gates={}), r"\$.concepts.neon"),
        (lambda m: NEON(m).update(guards=["", "x"]), r"\$.concepts.neon.guards"),
        (lambda m: NEON(m).update(guards=None), r"\$.concepts.neon.guards"),
        (lambda m: NEON(m).update(pickle="x.pkl"), "pickle"),
        (lambda m: NEON(m).update(folder="neon"), r"\$.concepts.neon"),
        (lambda m: NEON(m).pop("shard"), r"\$.concepts.neon"),
        (lambda m: VAN_GOGH(m).update(form="text"), r"\$.concepts.Van Gogh"),
        (lambda m: VAN_GOGH(m).update(folder="VAN-GOGH"), r"\$.concepts.Van Gogh"),
        (lambda m: VAN_GOGH(m).update(folder="../van-gogh"), r"\$.concepts.Van Gogh"),
        (lambda m: VAN_GOGH(m).update(folder="neon"), "the folder 'neon' is not named after it"),
        (lambda m: VAN_GOGH(m)["files"].update({"evil.pkl": "0" * 64}), r"\$.concepts.Van Gogh"),
        (lambda m: VAN_GOGH(m)["files"].pop("adapter_config.json"), r"\$.concepts.Van Gogh"),
        (lambda m: NEON(m)["metrics"].update(leakage="none"), "leakage"),
        (lambda m: NEON(m)["metrics"].update(leakage_of={"x": "y"}), "leakage_of"),
        (lambda m: m["base"].pop("projections"), "is per-module, and the base has no projections"),
        (lambda m: m["base"]["projections"].update({"../x": [4, 1.0]}), r"\.\./x"),
        (lambda m: m["concepts"].update({"": NEON(m)}), "concepts"),
        (lambda m: m["concepts"].update({"x" * 201: NEON(m)}), "longer than 200"),
        (lambda m: m["concepts"].update({"\0": NEON(m)}), "concepts need printable names"),
        (lambda m: m["concepts"].update({"\u200b": NEON(m)}), "concepts need printable names"),
        (lambda m: m["concepts"].update({"\u2800": NEON(m)}), "concepts need printable names"),
        (lambda m: m["policy"].update(always=["ghost"]), "ghost"),
    ],
)  # fmt: skip
def test_what_does_not_make_sense_is_refused(manifest, edit, message):
    edit(manifest)
    with pytest.raises(BankError, match=message):
        resealed(manifest)


def chained(manifest: dict, *sets: dict) -> None:
    """Put a chain of guard sets, each under its content's name, in the place of the one that is there."""
    manifest["guard_sets"] = {content_name(values): values for values in sets}
    for record in manifest["concepts"].values():
        record["guards"] = content_name(sets[-1])


def chain_of(n: int) -> list[dict]:
    sets: list[dict] = [{"exact": [""]}]
    for i in range(n - 1):
        sets.append({"exact": [str(i)], "extends": content_name(sets[-1])})
    return sets


def test_a_chain_of_guard_sets_may_be_long_and_not_too_long(manifest):
    chained(manifest, *chain_of(LONGEST_CHAIN))
    assert not faults(resealed(manifest))
    chained(manifest, *chain_of(LONGEST_CHAIN + 1))
    assert f"has at most {LONGEST_CHAIN} members" in refused(manifest)


def test_a_guard_set_extends_what_stands_before_it(manifest):
    """Not what follows, nor itself, nor what is not there: chains end."""
    first, second = chain_of(2)
    for wrong in ([second, first], [second]):
        chained(manifest, *wrong)
        assert "which does not stand before it" in refused(manifest)
    chained(manifest, first, second)
    name = content_name(second)
    manifest["guard_sets"][name]["extends"] = name
    message = refused(manifest)
    assert "are not named by their content" in message
    assert f"guard set {name!r} extends {name!r}, which does not stand before it" in message


@pytest.mark.parametrize(
    "sets",
    [
        [{"exact": ["a", "a"]}],
        [{"exact": ["a"], "damped": ["a"]}],
        [{"exact": ["a"]}, {"exact": [], "damped": ["a"], "extends": content_name({"exact": ["a"]})}],
    ],
)
def test_no_prompt_is_guarded_twice(manifest, sets):
    chained(manifest, *sets)
    assert "has these prompts twice: ['a']" in refused(manifest)


def test_prompts_cannot_take_more_memory_than_a_manifest_may_claim(manifest):
    """A wording of a megabyte, with the name a hundred thousand times in it, is shared by thousands of concepts."""
    wording = {"pairs": [["{concept}" * 10_000, str(i)] for i in range(10)]}
    manifest["wordings"] = {content_name(wording): wording}
    record = {**NEON(manifest), "wording": content_name(wording)}
    manifest["concepts"] = {f"neon {i} {'x' * 150}": record for i in range(30)}
    manifest["policy"]["always"] = []
    assert "the concepts' prompts take" in refused(manifest)
    manifest["concepts"] = dict(list(manifest["concepts"].items())[:3])
    assert not faults(resealed(manifest))


def test_each_record_has_a_line_of_its_own(manifest):
    """So that a change of one concept is a change of one line, wherever versions are compared."""
    lines = resealed(manifest).decode().splitlines()
    for table in ("shards", "guard_sets", "wordings", "configs", "concepts"):
        for name, value in manifest[table].items():
            (line,) = [line for line in lines if line.startswith(json.dumps(name, ensure_ascii=False) + ":{")]
            assert json.loads("{" + line.rstrip(",") + "}") == {name: value}


# The last four hide a character that is drawn as nothing, and that Python calls printable.
TWINS = ["Neon", "ＮＥＯＮ", "nеon", "neοn", " neon", "ne\u034fon", "neon\u2800", "ne\ufe00on", "neon\u3164"]


@pytest.mark.parametrize("twin", TWINS)
def test_look_alike_names_are_refused(manifest, twin):
    manifest["concepts"][twin] = manifest["concepts"]["neon"]
    assert "look alike" in refused(manifest)


def test_two_concepts_cannot_share_a_folder(manifest):
    manifest["concepts"]["Van Gogh!"] = VAN_GOGH(manifest)
    assert "its folder 'van-gogh' is that of 'Van Gogh'" in refused(manifest)


def test_of_wanted_concepts_only_what_they_need_is_kept_and_checked(manifest):
    """Whatever is wrong with other records: nobody asked for them."""
    first, second = chain_of(2)
    manifest["guard_sets"] |= {content_name(values): values for values in (first, second)}
    NEON(manifest)["guards"] = content_name(second)
    data = resealed(manifest)
    part = parse(data, Path(MANIFEST), ["neon"])
    assert list(part["concepts"]) == ["neon"]
    assert list(part["guard_sets"]) == [content_name(first), content_name(second)]
    assert len(part["shards"]) == len(part["wordings"]) == 1
    with pytest.raises(KeyError, match="ghost"):
        parse(data, Path(MANIFEST), ["neon", "ghost"])
    with pytest.raises(PolicyError, match="neon"):
        parse(data, Path(MANIFEST), ["Van Gogh"])
