"""The kinds of concepts: in which prompts a style, an object, a person or a content shows."""

from sepme_diffusers.making.kinds.kind import Kind, KnownName, Template
from sepme_diffusers.making.kinds.registry import find_kind, kind_names

__all__ = ["Kind", "KnownName", "Template", "find_kind", "kind_names"]
