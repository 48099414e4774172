"""What a bank refuses. A host can map each type to a status code."""

from __future__ import annotations


class BankError(ValueError):
    """A bank on disk or on the Hub cannot be trusted or understood; the message names the file."""


class PolicyError(ValueError):
    """A request would lift what a bank's policy, or the owner of a request, always erases."""


def short(text: object) -> str:
    """Cut out the middle of a long text that comes from a file: it may be megabytes."""
    text = str(text)
    return text if len(text) <= 240 else f"{text[:120]} ... {text[-120:]}"


class DownloadError(BankError):
    """A bank could not be downloaded whole."""


class PushConflict(RuntimeError):
    """The Hub holds another version of a concept than the one that a push was made from."""
