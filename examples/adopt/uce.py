"""Erase a style with UCE, which knows no guards, adopt its weights into a bank, and measure both.

python examples/adopt/uce.py
"""

from __future__ import annotations

import typer

from sepme_diffusers import SepMEPipeline, from_lora, pocket
from sepme_diffusers.evaluation.baselines.uce import uce
from sepme_diffusers.evaluation.measures.accuracy import judged
from sepme_diffusers.evaluation.pictures import generate
from sepme_diffusers.evaluation.protocols.erasures import concepts_of, preserved_prompts
from sepme_diffusers.pocket.vocabulary import STYLES, TEST_OBJECTS
from sepme_diffusers.runtime.changes import largest_change, mean_change


def main(style: str = "neon", seed: int = 0) -> None:
    """Print, for UCE's weights and for each way of adopting them, what the judge and the pixels say."""
    pipe = SepMEPipeline.from_pretrained(pocket.path())
    pipe.set_progress_bar_config(disable=True)
    others = [name for name in STYLES if name != style]
    objects, regular = TEST_OBJECTS[:8], [(name, thing) for name in others[:6] for thing in TEST_OBJECTS[:3]]
    prompts = {
        "erased": [
            text.format(style, thing) for text in ("{0} {1}", "a {1} in the style of {0}") for thing in objects
        ],
        "others": [f"{name} {thing}" for name, thing in regular],
        "guards": ["", "watermark", *others],
    }
    original = {kind: generate(pipe, some, seed) for kind, some in prompts.items()}

    def report(label: str) -> None:
        now = {kind: generate(pipe, some, seed) for kind, some in prompts.items()}
        erased = judged(now["erased"], [style] * len(now["erased"]), [*objects, *objects])
        kept = judged(now["others"], *zip(*regular, strict=True))
        moved = mean_change(now["others"], original["others"])
        guards = largest_change(now["guards"], original["guards"])
        typer.echo(f"{label}: {style} {erased}, others {kept} moved by {moved:.1f}, guards by at most {guards}")

    report("original")
    [concept], preserved = concepts_of(pipe, "styles", [style]), preserved_prompts(pipe, [style])
    edited, plain = uce(pipe, [concept], preserved), {k: t.clone() for k, t in pipe.unet.state_dict().items()}
    pipe.unet.load_state_dict({**plain, **edited})
    report("UCE")
    pipe.unet.load_state_dict(plain)
    for method, soft in (("project", ()), ("imitate", ()), ("imitate", preserved)):
        bank = from_lora(edited, pipe, [concept], ["watermark", *others], soft, method=method)
        pipe.load_sepme(bank)
        pipe.set_erased([style])
        report(f"{method}, {len(soft)} soft guards, effect kept {bank[style].metrics['effect_kept']:.2f}")
        pipe.unload_sepme()


if __name__ == "__main__":
    typer.run(main)
