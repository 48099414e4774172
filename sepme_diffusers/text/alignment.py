"""Which row of one prompt's embedding stands for which row of another's: by words, not by position."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Any


def aligned_rows(tokenizer: Any, prompt: str, anchor: str, n_rows: int) -> list[int | None]:
    """Match the rows of a prompt's embedding with those of an anchor's, token by token.

    Words that both have are matched wherever they stand, and words that take the place of others in order. The words
    that the anchor lacks have no row there. The end token and the padding behind it carry what was said before, and
    are matched with each other.

    Args:
        tokenizer: Of transformers, or None: then rows are matched by position.
        prompt: The prompt.
        anchor: The other prompt.
        n_rows: How many rows an embedding has.

    Returns:
        For each row of the prompt the row of the anchor; None for words that the anchor lacks.
    """
    if tokenizer is None:
        return list(range(n_rows))
    (first, own), (_, others) = (_content(tokenizer, text, n_rows) for text in (prompt, anchor))
    matched: list[int | None] = list(range(first))
    for what, start, end, other_start, other_end in SequenceMatcher(None, own, others, autojunk=False).get_opcodes():
        if what == "delete":
            matched += [None] * (end - start)
        else:
            share = (other_end - other_start) / max(end - start, 1)
            matched += [first + other_start + int(index * share) for index in range(end - start)]
    behind, others_end = len(matched), first + len(others)
    # The end token stands at its own place; padding is matched by position, as far as it is padding in both.
    matched += [min(max(row, others_end) if row > behind else others_end, n_rows - 1) for row in range(behind, n_rows)]
    return matched[:n_rows]


def _content(tokenizer: Any, text: str, n_rows: int) -> tuple[int, list[int]]:
    """Return the row of a text's first token, and its tokens without the special ones."""
    encoded = tokenizer(text, truncation=True, max_length=n_rows, return_special_tokens_mask=True)
    rows = [row for row, special in enumerate(encoded.special_tokens_mask) if not special]
    # Without any, the end token stands there.
    first = rows[0] if rows else len(encoded.input_ids) - 1
    return first, [encoded.input_ids[row] for row in rows]
