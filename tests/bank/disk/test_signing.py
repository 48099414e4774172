import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import hub
from folders import SHARD, reseal, same, tree
from sepme_diffusers import BankError, ConceptBank, Increment
from sepme_diffusers.bank.disk import store
from sepme_diffusers.bank.disk.folder import BankFolder
from sepme_diffusers.bank.disk.layout import MANIFEST, SIGNATURE
from sepme_diffusers.bank.disk.signing import sign, verify_signature
from sepme_diffusers.cli.app import app

pytest.importorskip("model_signing", reason="the extra sepme-diffusers[sign] is not installed")


def key_pair(folder: Path, name: str, password: str | None = None) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem, info = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    locked = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, locked))
    public.write_bytes(key.public_key().public_bytes(pem, info))
    return private, public


@pytest.fixture
def keys(tmp_path) -> tuple[Path, Path]:
    return key_pair(tmp_path, "mine")


@pytest.fixture
def signed(mixed_bank, keys, tmp_path) -> Path:
    mixed_bank.save_pretrained(tmp_path / "bank")
    sign(tmp_path / "bank", keys[0])
    return tmp_path / "bank"


def test_a_signed_bank_loads_for_whoever_requires_it(mixed_bank, signed, keys):
    assert same(mixed_bank, ConceptBank.from_pretrained(signed, require_signature=keys[1]))
    assert list(ConceptBank.from_pretrained(signed, concepts=["cat"], require_signature=str(keys[1]))) == ["cat"]


def test_a_pipeline_requires_it_too(pipe, signed, keys):
    pipe.load_sepme(signed, require_signature=keys[1])
    (signed / SIGNATURE).unlink()
    with pytest.raises(BankError, match="not signed"):
        pipe.load_sepme(signed, name="again", require_signature=keys[1])
    assert pipe.get_bank() is pipe.get_bank("bank")


def test_another_key_is_refused(signed, tmp_path):
    _, public = key_pair(tmp_path, "theirs")
    with pytest.raises(BankError, match="no signature of"):
        ConceptBank.from_pretrained(signed, require_signature=public)


def test_one_key_does_not_lend_its_signature_to_another_bank(text_bank, signed, keys, tmp_path):
    text_bank.save_pretrained(tmp_path / "other")
    shutil.copy(signed / SIGNATURE, tmp_path / "other")
    with pytest.raises(BankError, match="no signature of"):
        ConceptBank.from_pretrained(tmp_path / "other", require_signature=keys[1])


@pytest.mark.parametrize("file", [MANIFEST, SIGNATURE, "increments-*", "woodcut/adapter_model.safetensors"])
def test_no_altered_byte_loads_anything_else(file, mixed_bank, signed, keys):
    """Of the signature's file, a few bytes mean nothing to anyone."""
    [path] = signed.glob(file)
    file, data = path.relative_to(signed).as_posix(), path.read_bytes()
    refused = 0
    for place in range(0, len(data), len(data) // 20):
        (signed / file).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            bank = ConceptBank.from_pretrained(signed, require_signature=keys[1])
        except BankError:
            refused += 1
        else:
            assert file == SIGNATURE
            assert same(bank, mixed_bank)
    assert refused > 10


@pytest.mark.parametrize("moment", ["before", "after"])
def test_what_is_verified_is_what_is_loaded(moment, mixed_bank, signed, keys, tmp_path, monkeypatch):
    """Whoever can write to the folder swaps the manifest while the signature is verified, or right after."""
    from model_signing import verifying

    mixed_bank.subset(["neon"]).save_pretrained(tmp_path / "unsigned")
    verify = verifying.Config.verify

    def swap_and_verify(config, *files):
        if moment == "before":
            shutil.copy(tmp_path / "unsigned" / MANIFEST, signed / MANIFEST)
        verify(config, *files)
        shutil.copy(tmp_path / "unsigned" / MANIFEST, signed / MANIFEST)

    monkeypatch.setattr(verifying.Config, "verify", swap_and_verify)
    assert same(mixed_bank, ConceptBank.from_pretrained(signed, require_signature=keys[1]))


@pytest.mark.parametrize("concept", ["cat", "woodcut"])
def test_what_is_used_is_what_was_signed(concept, signed, keys, monkeypatch):
    """Whoever can write to the folder changes numbers after the bank was loaded, and before they are read."""
    monkeypatch.setattr(store, "_SMALL", 0)  # small files are read at once
    bank = ConceptBank.from_pretrained(signed, require_signature=keys[1])
    [file] = signed.glob("woodcut/*.safetensors" if concept == "woodcut" else "increments-*")
    size = len(file.read_bytes())
    with file.open("r+b") as stream:  # in place, as somebody does who knows that it is mapped
        stream.seek(size // 2)
        stream.write(b"\0" * (size - size // 2))
    with pytest.raises(BankError, match=rf"'{concept}'.*was changed"):
        _ = bank[concept].increment


def test_the_digest_that_is_signed_is_that_of_the_lora(signed, keys):
    """A manifest may not vouch for one increment and bring another: receipts name erasures by their digests."""
    reseal(signed, lambda manifest: manifest["concepts"]["woodcut"].update(digest="0" * 63 + "1"))
    sign(signed, keys[0])
    bank = ConceptBank.from_pretrained(signed, require_signature=keys[1])
    with pytest.raises(BankError, match=r"'woodcut'.*does not hold the increment that its digest is of"):
        _ = bank["woodcut"].increment


def test_a_bank_signed_anew_while_it_is_read_is_read_again(mixed_bank, signed, keys, monkeypatch):
    """The manifest of the old bank was read, and the signature found is that of the new one."""
    new, file = mixed_bank.subset(["neon"]), BankFolder.file
    owners = iter([new])

    def replaced_meanwhile(folder, path, most):
        if path == SIGNATURE:
            for bank in owners:
                bank.save_pretrained(signed)
                sign(signed, keys[0])
        return file(folder, path, most)

    monkeypatch.setattr(BankFolder, "file", replaced_meanwhile)
    assert same(new, ConceptBank.from_pretrained(signed, require_signature=keys[1]))


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\x00", b"[" * 100_000])
def test_what_is_no_signature_is_refused(data, signed, keys):
    (signed / SIGNATURE).write_bytes(data)
    with pytest.raises(BankError, match="no signature of"):
        ConceptBank.from_pretrained(signed, require_signature=keys[1])


def test_saving_something_else_makes_the_signature_void(mixed_bank, signed, keys):
    mixed_bank.save_pretrained(signed)
    assert same(mixed_bank, ConceptBank.from_pretrained(signed, require_signature=keys[1]))
    mixed_bank.subset(["neon"]).save_pretrained(signed)
    with pytest.raises(BankError, match="no signature of"):
        ConceptBank.from_pretrained(signed, require_signature=keys[1])


def test_a_key_that_is_not_there_is_said(signed, tmp_path):
    with pytest.raises(FileNotFoundError, match="ghost"):
        ConceptBank.from_pretrained(signed, require_signature=tmp_path / "ghost.pub")
    with pytest.raises(BankError, match="no concept bank"):
        sign(tmp_path, tmp_path / "ghost.pem")


def test_a_key_may_have_a_password(mixed_bank, signed, tmp_path):
    private, public = key_pair(tmp_path, "locked", password="open")
    before = tree(signed)
    with pytest.raises((TypeError, ValueError), match=r"[Pp]assword"):
        sign(signed, private)
    assert tree(signed) == before
    sign(signed, private, password="open")
    verify_signature(signed, public)


def test_the_librarys_own_command_verifies_it(signed, keys):
    command = [sys.executable, "-m", "model_signing", "verify", "key", signed / MANIFEST]
    options = ["--signature", signed / SIGNATURE, "--public_key", keys[1]]
    assert subprocess.run([*command, *options], check=False).returncode == 0


def test_the_command_line_signs(mixed_bank, tmp_path):
    private, public = key_pair(tmp_path, "locked", password="open")
    mixed_bank.save_pretrained(tmp_path / "bank")
    arguments = ["sign", str(tmp_path / "bank"), "--key", str(private)]
    shown = CliRunner().invoke(app, arguments, env={"SEPME_KEY_PASSWORD": "open"})
    assert shown.exit_code == 0, shown.output
    assert SIGNATURE in shown.output
    verify_signature(tmp_path / "bank", public)
    assert CliRunner().invoke(app, arguments, env={"SEPME_KEY_PASSWORD": "wrong"}).exit_code == 1
    assert CliRunner().invoke(app, ["sign", str(tmp_path), "--key", str(private)]).exit_code == 1


def test_on_the_hub(text_bank, keys, tmp_path):
    """Pushed with its signature and pulled in part; a push without the key takes the void signature away."""
    with hub.running() as server:
        place = {"endpoint": server.endpoint, "token": hub.WRITER}
        text_bank.push_to_hub("me/bank", signing_key=keys[0], **place)

        def pull(**options) -> ConceptBank:
            options = {"cache_dir": tmp_path / "cache", "require_signature": keys[1], **options}
            return ConceptBank.from_pretrained("me/bank", **place, **options)

        assert list(pull(concepts=["cat"])) == ["cat"]
        [shard] = (file for file in server.files("me/bank") if SHARD.fullmatch(file))
        assert sorted(server.fetched) == [shard, MANIFEST, SIGNATURE]
        text_bank.push_to_hub("me/bank", **place)
        pull()
        entry = text_bank["cat"]
        other = replace(entry, increment=Increment(entry.increment.A, B=entry.increment.B * 2))
        bank = pull().with_entries([other])
        bank.push_to_hub("me/bank", **place)
        assert SIGNATURE not in server.files("me/bank")
        with pytest.raises(BankError, match="not signed"):
            pull()
        assert same(pull(require_signature=None), bank)
        bank.push_to_hub("me/bank", signing_key=keys[0], **place)
        assert same(pull(), bank)
