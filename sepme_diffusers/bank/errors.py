"""What a host can map to a status code."""

from __future__ import annotations


class PolicyError(ValueError):
    """A request would lift what a bank's policy, or the owner of a request, always erases."""
