"""What a bank refuses. A host can map each type to a status code."""

from __future__ import annotations


class BankError(ValueError):
    """A bank on disk or on the Hub cannot be trusted or understood; the message names the file."""


class PolicyError(ValueError):
    """A request leaves out or weakens a concept that a bank's policy always erases."""
