"""The names of a bank's files."""

from __future__ import annotations

MANIFEST = "sepme_bank.json"
SIGNATURE = f"{MANIFEST}.sig"
CARD = "README.md"
# The card's pictures. They stand beside the concepts' folders, are no part of the bank and are never read by it.
ASSETS = "assets"

LORA_FILE, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"

LOCK = ".sepme_bank.lock"
# Everything that a save prepares stands here until it is moved into place.
STAGING = ".sepme_bank.writing"
# There: the manifest that is being replaced.
FORMER = "former.json"


def shard_name(sha256: str) -> str:
    """Name a shard by the SHA-256 of its content, so that no other content ever has its name."""
    return f"increments-{sha256[:16]}.safetensors"
