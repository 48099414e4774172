"""A call of a pipeline under an erased set: checked before its first step and after its last."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from sepme_diffusers.doors.attachment import ErasureNotInForce
from sepme_diffusers.doors.linears import is_compiled
from sepme_diffusers.doors.registry import denoising_components, drawing_denoisers
from sepme_diffusers.runtime.call_arguments import CallArguments
from sepme_diffusers.runtime.call_sets import sets_of_call
from sepme_diffusers.runtime.calls import Call, opened, record_of_thread
from sepme_diffusers.runtime.checks import check_after, check_before
from sepme_diffusers.runtime.erasures import Erasures
from sepme_diffusers.runtime.host_rules import obey_hosts
from sepme_diffusers.runtime.pipeline_state import PipelineState
from sepme_diffusers.runtime.receipt import Receipt
from sepme_diffusers.runtime.spelled import spelled_by
from sepme_diffusers.text.encoders import text_encoders

# Pipelines that show rows of one prompt to the denoiser beside rows of another, in an order of their own.
_MIXING_ROWS = ("Panorama", "TextToVideoZero")


def erasing_call(plain_call: Callable[..., Any]) -> Callable[..., Any]:
    """Make the `__call__` of a pipeline class: the plain one's parameters, and `erased`.

    Args:
        plain_call: The `__call__` of the plain class.
    """

    @wraps(plain_call)
    def __call__(self: Any, *args: Any, erased: Any = None, **kwargs: Any) -> Any:
        return run_call(self, self._sepme, plain_call, args, kwargs, erased)

    plain = inspect.signature(plain_call)
    last = [p for p in plain.parameters.values() if p.kind is p.VAR_KEYWORD]
    others = [p for p in plain.parameters.values() if p.kind is not p.VAR_KEYWORD]
    mine = inspect.Parameter("erased", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Any)
    # Engines filter a request's arguments by it.
    vars(__call__)["__signature__"] = plain.replace(parameters=[*others, mine, *last])
    __call__.__doc__ = _DOC + (plain_call.__doc__ or "")
    return __call__


_DOC = """Generate under an erased set; refuse to if it would not act.

        The plain pipeline's parameters, and:

        Args:
            erased: What is erased for this call alone: names or {name: strength} for all its prompts, or a list with
                one such set per prompt, None in it standing for the standing set. Default: the standing set.

        Raises:
            ErasureNotInForce: If an erasure that was asked for would not act, or did not.
            ValueError: As `set_erased`, or if there are not as many sets as prompts.
            TypeError: On a keyword that the plain pipeline does not name.
            RuntimeError: If this pipeline object runs a call already.

        The plain pipeline's documentation:

        """


def run_call(
    pipe: Any,
    state: PipelineState,
    plain_call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    erased: Any,
) -> Any:
    """Run a call of the plain pipeline under an erased set; see `erasing_call`.

    Args:
        pipe: The pipeline.
        state: Its state.
        plain_call: The `__call__` of its plain class.
        args: Positional arguments.
        kwargs: Arguments by name.
        erased: What the call erases.
    """
    arguments = CallArguments.of(plain_call, pipe, args, kwargs)
    erasures = state.find(drawing_denoisers(pipe))
    state.remember(erasures)
    if _works_on_the_original(erasures):
        return plain_call(pipe, *args, **kwargs)
    call = _call(pipe, state, erasures, arguments, erased)
    erases = any(call.sets)
    try:
        state.claim(call, erasures)
        with naming(call.names()):
            _prepare(pipe, state, erasures, call, arguments)
            with opened(call):
                output = plain_call(pipe, *args, **kwargs)
                if erases:
                    check_after(pipe, erasures, call)
    finally:
        state.release(call, erasures)
    state.last_call = _receipt(pipe, call, arguments)
    if hasattr(output, "__dataclass_fields__"):
        output.erased = state.last_call
    return output


@contextmanager
def naming(concepts: Iterable[str]) -> Iterator[None]:
    """Name the concepts that should be erased in an `ErasureNotInForce` that leaves the block without any.

    Args:
        concepts: Their names.
    """
    concepts = list(concepts)
    try:
        yield
    except ErasureNotInForce as error:
        if error.concepts or not concepts:
            raise
        raise ErasureNotInForce(str(error), concepts) from error


def _works_on_the_original(erasures: Erasures) -> bool:
    """Whether this thread makes or measures increments, see `erasures.unedited`."""
    record = record_of_thread()
    return record is not None and record.alive and record.unedited and record.attachments is erasures.attachments


def _call(pipe: Any, state: PipelineState, erasures: Erasures, arguments: CallArguments, erased: Any) -> Call:
    """What a call erases, with nothing that acts yet."""
    snapshot = erasures.snapshot
    each = arguments.pictures_per_prompt
    sets, own = sets_of_call(erased, snapshot, state.request, arguments.prompts, each)
    if len(sets) > 1 and any(part in type(pipe).__name__ for part in _MIXING_ROWS):
        raise ValueError(
            f"{type(pipe).__name__} mixes the rows of several prompts, so one erased set per prompt cannot be kept "
            "apart; call once for each set"
        )
    return Call(erasures.attachments, snapshot, sets, None, own, max(arguments.prompts * each, 1))


def _prepare(pipe: Any, state: PipelineState, erasures: Erasures, call: Call, arguments: CallArguments) -> None:
    """Check that what a call erases will act, and let it."""
    keys = {key for strengths in call.sets for key in strengths}
    obey_hosts(pipe, call.snapshot, call.own, bool(keys), arguments)
    text_check = state.text_check_for(call.snapshot)
    settings = arguments.encode_settings(pipe)
    call.least = check_before(pipe, erasures, call.snapshot, keys, text_check, settings)
    call.fixed_shape = any(is_compiled(component) for component in denoising_components(pipe))
    call.spelled = spelled_by(arguments.texts, keys, call.snapshot.banks, arguments.pictures_per_prompt)
    call.active = call.snapshot.active(call.sets, call.pictures, call.fixed_shape, call.least, call.spelled)
    erasures.copy_to_devices(call.active)


def _receipt(pipe: Any, call: Call, arguments: CallArguments) -> Receipt:
    encoder = "not asked"
    if any(call.sets):
        encoder = "verified" if text_encoders(pipe) else "unverified"
    return Receipt(call, encoder, "unknown" if arguments.embeddings else "known", tuple(arguments.image_prompts))
