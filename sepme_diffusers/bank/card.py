"""The model card of a bank: what people and the Hub read about it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not declared so
from PIL import Image
from yaml import YAMLError

from sepme_diffusers.bank.disk.layout import ASSETS
from sepme_diffusers.text.encoding import TOKENS

_PICTURE = re.compile(r"(?!.{201})[a-z0-9]+(-[a-z0-9]+)*")
# A card stays small, however large the bank: so many concepts have a row, so many names are in a list, so many
# settings are shown, and so much of a text.
_ROWS, _NAMED, _SETTINGS, _TEXT = 200, 50, 20, 200
_PLACEHOLDER = "path/or/repository/of/this/bank"

_TEMPLATE = """---
{{ card_data }}
---

# Concept bank for {{ title }}

Separable erasures (SepME, arXiv 2402.05947) of {{ count }} concepts. Loading the bank erases nothing by
itself{{ policy }}; any subset can be erased, and restored bit for bit.
{% if gallery %}
<Gallery />
{% endif %}
```python
from sepme_diffusers import SepMEPipeline

pipe = SepMEPipeline.from_pretrained({{ base }})
pipe.load_sepme({{ repository }})
pipe.set_erased([{{ first }}])
```

## Concepts

| concept | form | rank | solver | measured |
|---|---|---|---|---|
{% for row in rows -%}
| {{ row | join(" | ") }} |
{% endfor %}
{% if more %}And {{ more }} more.

{% endif %}Prompts, anchors and every measurement are in `sepme_bank.json`.
{% if adapter %}
## Without this package

{{ adapters }} also PEFT LoRAs, in folders of their own, for one erasure at a time:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({{ adapter.base }})
pipe.unet.load_lora_adapter(
    {{ repository }}, subfolder={{ adapter.folder }}, prefix="base_model.model",
    weight_name="adapter_model.safetensors",
)
```

So does `PeftModel.from_pretrained`. A LoRA has no gate: it acts on every prompt in proportion to what it reads, and in
half precision guards move by about a thousandth of their projections. `adapter leakage` is what was measured of one
that was made without a gate.
{% endif %}
## Guard

An increment leaves the prompts that it guards exactly as they were. Guarded by increments of this bank:
{{ guards }}.
{% if damped %}
These were damped instead, because not all of them fit; they move by what the measurements say:
{{ damped }}.
{% endif %}
## Settings
{% for names, config in settings %}
{{ names }}:

```json
{{ config }}
```
{% endfor %}
{%- if more_settings %}
And {{ more_settings }} more, in `sepme_bank.json`.
{% endif %}
## Limits

- An increment that is not merged into the base can be removed by whoever holds the weights. Erasure is for a host who
  controls the pipeline, not a lock on published weights.
- Guards are exact for the prompts that are listed. Every other prompt is protected softly, and moves a little.
- Erasure acts on what the UNet reads from the text; it does not remove knowledge from the image side. A prompt that
  says a concept in words it was not made with can still draw it.
- The figures are of the base above, measured by whoever made the bank.
"""


@dataclass(frozen=True)
class Picture:
    """A picture on a card.

    Args:
        name: Its file's name, without folder and suffix.
        text: The caption; at least the prompt.
        image: The picture.

    Raises:
        ValueError: If the name has anything but lower-case ASCII letters, digits and hyphens, at most 200.
    """

    name: str
    text: str
    image: Image.Image

    def __post_init__(self) -> None:
        if not _PICTURE.fullmatch(self.name):
            raise ValueError(
                "a picture's name has 1 to 200 lower-case ASCII letters, digits and single hyphens between them, not "
                f"{self.name!r}"
            )

    @property
    def path(self) -> str:
        """Its file in a bank's folder."""
        return f"{ASSETS}/{self.name}.png"

    def png(self) -> bytes:
        """Encode the picture as the content of that file."""
        stream = io.BytesIO()
        self.image.save(stream, "PNG")
        return stream.getvalue()


def model_card(
    manifest: Mapping[str, Any],
    repository: str | None = None,
    license: str | None = None,
    pictures: Sequence[Picture] = (),
    previous: str | None = None,
) -> str:
    """Write the README.md of a bank.

    Args:
        manifest: The bank's.
        repository: Where it is published.
        license: Of the bank. Default: the previous card's.
        pictures: To show, beside those of the previous card.
        previous: The card that this one replaces.
    """
    base, always, concepts = manifest["base"]["name"], manifest["policy"]["always"], manifest["concepts"]
    data, settings = _metadata(base, license, pictures, previous), _settings(manifest)
    widget = data.to_dict().get("widget")  # type: ignore[no-untyped-call]  # huggingface_hub has not typed it
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=_escaped(base),
        base=_quoted(base),
        repository=_quoted(repository or _PLACEHOLDER),
        first=_quoted(next(iter(concepts), "")),
        policy=f", except {_some(always)}, which its policy always erases" if always else "",
        gallery=bool(widget),
        count=len(concepts),
        rows=[_row(name, record, manifest) for name, record in list(concepts.items())[:_ROWS]],
        more=max(len(concepts) - _ROWS, 0),
        **_adapters(manifest),
        guards=_guards(manifest, "exact"),
        damped=_guards(manifest, "damped"),
        settings=settings[:_SETTINGS],
        more_settings=max(len(settings) - _SETTINGS, 0),
    )
    return str(card)


def _metadata(base: str, license: str | None, pictures: Sequence[Picture], previous: str | None) -> ModelCardData:
    kept = _metadata_of(previous)
    new = {picture.path for picture in pictures}
    widget = [entry for entry in kept.get("widget") or [] if entry["output"]["url"] not in new]
    widget += [{"text": picture.text, "output": {"url": picture.path}} for picture in pictures]
    data: dict[str, Any] = {
        "license": license or kept.get("license"),
        "tags": ["sepme", "text-to-image"],
        "pipeline_tag": "text-to-image",
        **({"base_model": base, "base_model_relation": "adapter"} if _is_repository(base) else {}),
        **({"widget": widget} if widget else {}),
    }
    return ModelCardData(library_name="diffusers", **data)


def _metadata_of(card: str | None) -> dict[str, Any]:
    """Read what a card says of its licence and pictures; nothing, if somebody's edits made it unreadable."""
    if card is None:
        return {}
    try:
        data = ModelCard(card, ignore_metadata_errors=True).data.to_dict()  # type: ignore[no-untyped-call]  # as above
        widget = [entry for entry in data.get("widget") or [] if str(entry["output"]["url"]).startswith(f"{ASSETS}/")]
    except (YAMLError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    return {"license": data.get("license"), "widget": widget}


def _is_repository(name: str) -> bool:
    """Tell whether a base model is named by a repository id: the Hub refuses a card that names a folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _row(name: str, record: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    measured = {**record["metrics"], "adapter leakage": record.get("adapter", {}).get("leakage")}
    measured.pop("adapter_leakage", None)  # said once
    figures = [f"{key} {value:.4g}" for key, value in measured.items() if isinstance(value, (int, float))]
    rank = record["rank"] if "rank" in record else record["rows"][TOKENS][1] - record["rows"][TOKENS][0]
    cells = (name, record["form"], rank, manifest["configs"][record["config"]]["solver"])
    return [_escaped(str(cell)) for cell in (*cells, ", ".join(figures))]


def _adapters(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Say which concepts other tools can load, and where the first of them is."""
    concepts = manifest["concepts"].items()
    loras = {
        name: record.get("adapter", record) for name, record in concepts if "folder" in record.get("adapter", record)
    }
    if not loras:
        return {"adapter": None}
    first = next(iter(loras.values()))
    said = {"base": _quoted(first.get("base", manifest["base"]["name"])), "folder": _quoted(first["folder"])}
    subject = "All concepts are" if len(loras) == len(concepts) else f"Of the concepts, {_some(list(loras))} are"
    return {"adapter": said, "adapters": subject}


def _guards(manifest: Mapping[str, Any], how: str) -> str:
    """List the prompts that increments guard, the first of them by name.

    Args:
        manifest: The bank's.
        how: "exact" or "damped".
    """
    sets = manifest["guard_sets"].values()
    prompts = dict.fromkeys(prompt for part in sets for prompt in part.get(how, ()))
    return _some([prompt or "the blank prompt" for prompt in prompts])


def _settings(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pair each config that was used with the concepts that were made with it."""
    names_of: dict[str, list[str]] = {}
    for name, record in manifest["concepts"].items():
        names_of.setdefault(record["config"], []).append(name)
    return [(_some(names), json.dumps(manifest["configs"][config])) for config, names in names_of.items()]


def _some(texts: Sequence[str]) -> str:
    """List texts in their order, and count what is beyond the first."""
    more = f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return ", ".join(_escaped(text if len(text) <= _TEXT else f"{text[:_TEXT]}…") for text in texts[:_NAMED]) + more


def _quoted(text: str) -> str:
    """Quote text as a Python string: JSON's quoting is one, as long as nothing beyond its controls is escaped."""
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """Escape text so that Markdown shows it as it is, on one line."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", " ".join(text.split()))
