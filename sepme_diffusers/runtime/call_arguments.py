"""The arguments of a pipeline's call, by name."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Arguments that diffusers' pipelines still take out of their **kwargs, with a warning.
_DEPRECATED = {"callback", "callback_steps"}
_PICTURES_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")


@dataclass(frozen=True)
class CallArguments:
    """What a call of a pipeline was given.

    Args:
        values: The arguments by name, positional ones too.
    """

    values: Mapping[str, Any]

    @classmethod
    def of(
        cls, plain_call: Callable[..., Any], pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> CallArguments:
        """Bind arguments to the names that the plain pipeline has for them.

        Raises:
            TypeError: On a keyword that the plain pipeline does not name. It would ignore the keyword in silence.
        """
        signature = inspect.signature(plain_call)
        named = {name for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
        if unknown := sorted(set(kwargs) - named - _DEPRECATED):
            near = difflib.get_close_matches(unknown[0].strip("_").lower(), [*named, "erased"], 1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(
                f"unexpected keyword argument {unknown[0]!r}{hint}. {type(pipe).__name__} takes "
                f"{sorted(named - {'self'})} and 'erased'"
            )
        return cls(signature.bind_partial(pipe, *args, **kwargs).arguments)

    @property
    def prompts(self) -> int:
        """How many prompts there are; 0 where it cannot be seen."""
        prompt = self.values.get("prompt")
        if prompt is None:
            prompt = self.values.get("prompt_embeds")
        if prompt is None:
            return 0
        return 1 if isinstance(prompt, str) else len(prompt)

    @property
    def texts(self) -> list[str]:
        """The text of each prompt, of all text encoders together; none where the caller brings embeddings instead."""
        given = [value for name, value in self.values.items() if re.fullmatch(r"prompt(_\d+)?", name) and value]
        parts = [[value] if isinstance(value, str) else [str(text) for text in value] for value in given]
        return [" ".join(of_prompt) for of_prompt in zip(*parts, strict=False)]

    @property
    def pictures_per_prompt(self) -> int:
        """How many pictures, or videos, are drawn for each prompt."""
        return next((self.values[name] for name in _PICTURES_PER_PROMPT if self.values.get(name)), 1)

    @property
    def embeddings(self) -> list[str]:
        """The arguments by which the caller brings embeddings of its own."""
        return [name for name in self._given() if name.endswith("prompt_embeds")]

    @property
    def image_prompts(self) -> list[str]:
        """The arguments by which the caller brings image prompts."""
        return [name for name in self._given() if name.startswith("ip_adapter_image")]

    def encode_settings(self, pipe: Any) -> dict[str, Any]:
        """Return what of the arguments the pipeline's `encode_prompt` depends on."""
        known = inspect.signature(pipe.encode_prompt).parameters
        scale = (self.values.get("cross_attention_kwargs") or {}).get("scale")
        settings = {"clip_skip": self.values.get("clip_skip"), "lora_scale": scale}
        return {name: value for name, value in settings.items() if value is not None and name in known}

    def _given(self) -> list[str]:
        return [name for name, value in self.values.items() if value is not None]
