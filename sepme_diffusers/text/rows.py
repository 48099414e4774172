"""Which word of a prompt each row of its embedding stands for."""

from __future__ import annotations

from typing import Any


def words_of_rows(tokenizer: Any, prompt: str, n_rows: int) -> list[str | None]:
    """Return the word of each row of a prompt's embedding; None for start, end and padding, which stand for no word.

    Args:
        tokenizer: Of transformers, or None: then no word is known. One that does not tell words from parts of words
            gives the parts.
        prompt: The prompt.
        n_rows: How many rows the embedding has.

    Example:
        >>> from transformers import CLIPTokenizer
        >>> from sepme_diffusers import pocket
        >>> tokenizer = CLIPTokenizer.from_pretrained(pocket.path(), subfolder="tokenizer")
        >>> words_of_rows(tokenizer, "a caterpillar", 9)
        [None, 'a', 'caterpillar', 'caterpillar', 'caterpillar', 'caterpillar', 'caterpillar', None, None]
    """
    if tokenizer is None:
        return [None] * n_rows
    encoded = tokenizer(
        prompt, padding="max_length", truncation=True, max_length=n_rows, return_special_tokens_mask=True
    )
    words = [
        None if special else _word(tokenizer, encoded, prompt, row)
        for row, special in enumerate(encoded.special_tokens_mask)
    ]
    return (words + [None] * n_rows)[:n_rows]


def _word(tokenizer: Any, encoded: Any, prompt: str, row: int) -> str | None:
    if not encoded.is_fast:
        return tokenizer.decode([encoded.input_ids[row]]).strip() or None
    word = encoded.word_ids(0)[row]
    if word is None:
        return None
    start, end = encoded.word_to_chars(word)
    return prompt[start:end].strip() or None
