"""What hosts that load a bank with `strict=True` demand of a call.

Increments act on what a prompt reads like. One inverted token brings a concept back in every picture that was tried.
"""

from __future__ import annotations

from typing import Any

from sepme_diffusers.doors.attachment import ErasureNotInForce
from sepme_diffusers.runtime.call_arguments import CallArguments
from sepme_diffusers.runtime.snapshot import Snapshot
from sepme_diffusers.text.encoders import text_encoders


def obey_hosts(pipe: Any, snapshot: Snapshot, own_set: bool, erases: bool, arguments: CallArguments) -> None:
    """Check a call against the rules of the hosts that loaded a bank with `strict=True`.

    Args:
        pipe: The pipeline that is called.
        snapshot: What is loaded.
        own_set: Whether the call says what it erases.
        erases: Whether it erases anything.
        arguments: What it was given.

    Raises:
        ErasureNotInForce: If a rule is broken, with what would obey it.
    """
    if not snapshot.strict:
        return
    if not own_set:
        raise ErasureNotInForce(
            "a bank was loaded with strict=True, and this call does not say what it erases; give erased=[...], "
            "which may be empty, or use pipe.for_request(erased=[...])"
        )
    if erases and not snapshot.allow_embeddings:
        refuse_callers_embeddings(arguments)
        for vocabularies in snapshot.vocabularies:
            vocabularies.refuse_others(pipe)
        if not text_encoders(pipe):
            raise ErasureNotInForce(
                "a bank was loaded with strict=True, and the pipeline has no text encoder, so what a prompt's "
                "embedding is cannot be seen"
            )
    if erases and not snapshot.allow_images:
        refuse_image_prompts(arguments)


def refuse_callers_embeddings(arguments: CallArguments) -> None:
    """Check that a call brings no embeddings.

    Raises:
        ErasureNotInForce: If it does, with their names.
    """
    if arguments.embeddings:
        raise ErasureNotInForce(
            "the bank was loaded with strict=True, and the call brings embeddings of its own "
            f"({arguments.embeddings}): whether they hold an erased concept cannot be seen. Give a prompt, or "
            "load_sepme(..., allow_embeddings=True)"
        )
    if "prompt_embeds" in (arguments.values.get("callback_on_step_end_tensor_inputs") or ()):
        raise ErasureNotInForce(
            "the bank was loaded with strict=True, and a callback may put embeddings of its own in the place of the "
            "prompt's (callback_on_step_end_tensor_inputs has 'prompt_embeds')"
        )


def refuse_image_prompts(arguments: CallArguments) -> None:
    """Check that a call brings no image prompts, on which increments do not act.

    Raises:
        ErasureNotInForce: If it does, with their names.
    """
    if arguments.image_prompts:
        raise ErasureNotInForce(
            f"the bank was loaded with strict=True, and the call brings image prompts ({arguments.image_prompts}), on "
            "which increments do not act. Leave them out, or load_sepme(..., allow_images=True)"
        )
