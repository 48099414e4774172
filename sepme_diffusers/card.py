"""The model card of a bank."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_TEMPLATE = """---
{{ card_data }}
---

# Concept bank for {{ base }}

Separable erasures (SepME, arXiv 2402.05947) of {{ concepts | length }} concepts. Loading the bank erases nothing by
itself{{ policy }}; any subset can be erased, and restored bit for bit.

```python
from sepme_diffusers import SepMEPipeline

pipe = SepMEPipeline.from_pretrained({{ base_literal }})
pipe.load_sepme("path/or/repository/of/this/bank")
pipe.set_erased([{{ first }}])
```

| concept | form | rank | solver | guarded prompts |
|---|---|---|---|---|
{% for name, record in concepts.items() -%}
| {{ name }} | {{ record.form }} | {{ record.rank }} | {{ record.config.solver }} | {{ record.guards | length }} |
{% endfor %}
Prompts, anchors, guards, exact settings and measurements of every concept are in `sepme_bank.json`.

An increment that is not merged into the base can be removed by whoever holds the weights. Erasure acts on what the
UNet reads from the text; it does not remove knowledge from the image side.
"""


def model_card(base: str, manifest: Mapping[str, Any]) -> str:
    """The README.md of a bank, from its manifest."""
    always = manifest["policy"]["always"]
    data = ModelCardData(
        library_name="diffusers", base_model=base, base_model_relation="adapter", tags=["sepme", "text-to-image"]
    )
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        base=base,
        base_literal=json.dumps(base),
        concepts=manifest["concepts"],
        policy=f", except {', '.join(always)}, which its policy always erases" if always else "",
        first=json.dumps(next(iter(manifest["concepts"]), "")),
    )
    return str(card)
