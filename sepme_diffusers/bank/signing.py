"""Signatures of a bank: who vouches for it. By OpenSSF's `model-signing`; install `sepme-diffusers[sign]`.

What is signed is the manifest. It holds the SHA-256 of every concept's file, and the reader checks each one that it
loads; so a signature also covers a bank that was pulled in part.
"""

from __future__ import annotations

from pathlib import Path

from sepme_diffusers.bank.manifest import MANIFEST, BankError

SIGNATURE = f"{MANIFEST}.sig"


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

    manifest = _manifest(folder)
    config = signing.Config().use_elliptic_key_signer(
        private_key=Path(private_key), password=password.encode() if password else None
    )
    signature = manifest.with_name(SIGNATURE)
    config.sign(manifest, signature)
    return signature


def verify_signature(folder: str | Path, public_key: str | Path) -> None:
    """Refuse a bank whose manifest is not signed with this key's private half.

    Args:
        folder: The bank's.
        public_key: PEM file.

    Raises:
        BankError: If it is not signed, signed with another key, or was changed since.
        FileNotFoundError: If there is no such key.
        ImportError: If `model-signing` is not installed.
    """
    from model_signing import verifying

    manifest = _manifest(folder)
    signature = manifest.with_name(SIGNATURE)
    if not signature.is_file():
        raise BankError(f"{folder} is not signed: it has no {SIGNATURE}")
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=Path(public_key))
    try:
        # A download cache holds links, which the library does not follow.
        verifier.verify(manifest.resolve(), signature.resolve())
    except Exception as error:
        # Whatever went wrong with somebody else's file, it is no valid signature.
        raise BankError(f"{signature} is no signature of {MANIFEST} with the key {public_key}: {error!r}") from error


def _manifest(folder: str | Path) -> Path:
    manifest = Path(folder) / MANIFEST
    if not manifest.is_file():
        raise BankError(f"{folder} is no concept bank: it has no {MANIFEST}")
    return manifest
