"""Signatures of a bank: who vouches for it. By OpenSSF's `model-signing`; install `sepme-diffusers[sign]`.

The manifest is what is signed. It holds the SHA-256 of every file and the digest of every increment. The reader checks
each file that it loads, and the numbers that it copies out of it; so a signature also covers a bank that was pulled in
part, and files that somebody replaces after they were loaded.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from sepme_diffusers.bank.disk.files import write_file
from sepme_diffusers.bank.disk.folder import BankFolder
from sepme_diffusers.bank.disk.layout import MANIFEST, SIGNATURE
from sepme_diffusers.bank.errors import BankError

# Signatures of one manifest take a few kilobytes.
_MAX_BYTES = 2**20


def sign(folder: str | Path, private_key: str | Path, password: str | None = None) -> Path:
    """Sign the bank in a folder. Saving another bank there makes the signature void.

    Args:
        folder: The bank's.
        private_key: PEM file of an elliptic-curve key (NIST P-256, P-384 or P-521).
        password: Of the key, if it has one.

    Returns:
        The signature's file: a Sigstore bundle, beside the manifest.

    Raises:
        BankError: If the folder holds no bank.
        ValueError: If the key cannot be used.
        ImportError: If `model-signing` is not installed.
    """
    from model_signing import signing

    BankFolder(Path(folder)).manifest_bytes()
    manifest = Path(folder) / MANIFEST
    config = signing.Config().use_elliptic_key_signer(
        private_key=Path(private_key), password=password.encode() if password else None
    )
    signature = manifest.with_name(SIGNATURE)
    config.sign(manifest, signature)
    return signature


def verify_signature(folder: str | Path, public_key: str | Path) -> bytes:
    """Refuse a bank whose manifest is not signed with this key's private half.

    Args:
        folder: The bank's.
        public_key: PEM file.

    Returns:
        The manifest's bytes that were verified. Parse these, not the file, which may have been replaced since.

    Raises:
        BankError: If it is not signed, signed with another key, or was changed since.
        FileNotFoundError: If there is no such key.
        ImportError: If `model-signing` is not installed.
    """
    from model_signing import verifying

    bank = BankFolder(Path(folder))
    manifest = bank.manifest_bytes()
    if not (bank.folder / SIGNATURE).is_file():
        raise BankError(f"{folder} is not signed: it has no {SIGNATURE}")
    signature = bank.file(SIGNATURE, _MAX_BYTES)
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=Path(public_key))
    with TemporaryDirectory(prefix="sepme-verify-") as private:
        # The library reads files; these copies are ours alone. It also compares the file's name.
        copies = Path(private, MANIFEST), Path(private, SIGNATURE)
        for copy, data in zip(copies, (manifest, signature), strict=True):
            write_file(copy, data)
        try:
            verifier.verify(*copies)
        except Exception as error:
            # Whatever went wrong with somebody else's file, it is no valid signature.
            raise BankError(
                f"{bank.folder / SIGNATURE} is no signature of {MANIFEST} with the key {public_key}: {error!r}"
            ) from error
    return manifest
