"""Erasers made elsewhere become increments: guarded exactly, restorable, and as close to the original as can be."""

from dataclasses import replace

import pytest
import torch

from sepme_diffusers import Concept, ConceptBank, SepMEConfig, SepMETrainer, export_checkpoint, export_lora, from_lora
from sepme_diffusers.algebra.subspace import leakage
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.doors.registry import door_linears
from sepme_diffusers.text.encoding import encode, encode_doors, rows
from small import CLOSED, CONCEPTS, latents, random_pipeline, random_xl_pipeline

GUARDS = ["watermark", "a dog"]
NEON = CONCEPTS[0]


@pytest.fixture
def edited(pipe) -> dict[str, torch.Tensor]:
    """Weights of an eraser that knows no guards: every text value projection moves, as after UCE or ESD."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.weight": weight.detach() + 0.05 * torch.randn(weight.shape, generator=generator)
        for name, weight in projection_weights(pipe.unet).items()
        if name.endswith("to_v")
    }


@pytest.mark.parametrize("method", ["imitate", "project"])
@pytest.mark.parametrize("format", ["peft", "diffusers", "kohya"])
def test_a_separable_eraser_comes_in_unchanged(format, method, pipe, text_bank, tmp_path):
    """Exported and adopted under its own guards, an increment makes the latents that it made before."""
    path = tmp_path / ("l.safetensors" if format == "kohya" else "l")
    export_lora(text_bank, pipe, ["neon"], path, format=format)
    guards = text_bank["neon"].guards
    adopted = from_lora(path, pipe, [NEON], guards=guards, method=method, config=SepMEConfig.linear(ridge=1e-9))
    pipe.load_sepme(text_bank)
    pipe.set_erased(["neon"])
    ours = latents(pipe, "a cat in the style of neon")
    pipe.unload_sepme()
    pipe.load_sepme(adopted)
    pipe.set_erased(["neon"])
    torch.testing.assert_close(latents(pipe, "a cat in the style of neon"), ours, rtol=0, atol=1e-4)
    metrics = adopted["neon"].metrics
    assert metrics["effect_kept"] == pytest.approx(1, abs=1e-3)
    assert metrics["guard_damage_before"] < 1e-5


@pytest.mark.parametrize("method", ["imitate", "project"])
def test_edited_weights_become_separable(method, edited, pipe, text_bank):
    """The eraser moved the guards; its increment does not, joins a bank, and is taken away bit for bit."""
    concept = Concept("edited elsewhere", NEON.pairs)
    bank = from_lora(edited, pipe, [concept], guards=GUARDS, bank=text_bank, method=method)
    entry = bank["edited elsewhere"]
    assert set(entry.guards) == {"", *GUARDS, *text_bank}
    assert entry.metrics["guard_damage_before"] > 0.05
    assert entry.metrics["guard_damage_after"] < 1e-6
    assert entry.metrics["share_representable"] == 1
    guarded = rows(encode(pipe, entry.guards))
    deltas = entry.increment.delta_weights(projection_weights(pipe.unet))
    for name, weight in projection_weights(pipe.unet).items():
        assert leakage(guarded, deltas[name].detach(), weight.detach()).max() < 1e-5
    original = {prompt: latents(pipe, prompt) for prompt in (*entry.guards, "neon dog")}
    pipe.load_sepme(bank)
    pipe.set_erased(["edited elsewhere"])
    for prompt in entry.guards:
        torch.testing.assert_close(latents(pipe, prompt), original[prompt], rtol=0, atol=1e-4)
    assert (latents(pipe, "neon dog") - original["neon dog"]).abs().max() > 0.1
    pipe.restore("edited elsewhere")
    assert torch.equal(latents(pipe, "neon dog"), original["neon dog"])


@pytest.mark.parametrize("method", ["imitate", "project"])
def test_what_is_kept_is_what_the_keys_and_values_say(method, edited, pipe):
    """Measured without the factors: the share of the wanted change of the concept's tokens that is made."""
    entry = from_lora(edited, pipe, [NEON], guards=GUARDS, method=method)["neon"]
    weights = projection_weights(pipe.unet)
    wanted = torch.cat([(edited[f"{n}.weight"] - w).detach() for n, w in weights.items() if n.endswith("to_v")])
    made = entry.increment.delta_weights(weights)
    made = torch.cat([delta.detach() for name, delta in made.items() if name.endswith("to_v")])
    tokens = rows(encode(pipe, NEON.prompts))
    mine, theirs = tokens @ made.T, tokens @ wanted.T
    kept = float((mine * theirs).sum() / theirs.square().sum())
    assert entry.metrics["effect_kept"] == pytest.approx(kept, rel=1e-3)
    assert 0 < entry.metrics["effect_kept"] < entry.metrics["effect_kept_within_guards"] < 1


def test_imitating_keeps_more_of_an_eraser_than_projecting_it(edited, pipe):
    kept = {
        method: from_lora(edited, pipe, [NEON], guards=GUARDS, method=method)["neon"].metrics["effect_kept"]
        for method in ("imitate", "project")
    }
    assert kept["imitate"] > 1.5 * kept["project"]


def test_soft_guards_hold_regular_prompts(edited, pipe):
    regular = rows(encode(pipe, ["a picture of a tiger", "a pig"]))
    moved = {}
    for soft in ((), ("a picture of a tiger", "a pig")):
        entry = from_lora(edited, pipe, [NEON], regular=soft)["neon"]
        deltas = entry.increment.delta_weights(projection_weights(pipe.unet))
        moved[bool(soft)] = float(sum((regular @ delta.detach().T).square().sum() for delta in deltas.values()))
    assert moved[True] < 0.1 * moved[False]


def test_several_concepts_are_guarded_on_each_other(edited, pipe):
    bank = from_lora(edited, pipe, [NEON, Concept.paper("cat")])
    assert tuple(bank["neon"].guards) == ("", "cat")
    assert tuple(bank["cat"].guards) == ("", "neon")


def test_what_cannot_be_kept_is_counted(edited, pipe):
    """A LoRA or checkpoint that also edits self-attention: its share is said, and without text projections no bank."""
    own = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    elsewhere = {own: pipe.unet.state_dict()[own] + 1.0}
    metrics = from_lora({**edited, **elsewhere}, pipe, [NEON])["neon"].metrics
    assert metrics["parts_outside"] == 1
    inside = sum(
        float((edited[f"{n}.weight"] - w.detach()).square().sum())
        for n, w in projection_weights(pipe.unet).items()
        if n.endswith("to_v")
    )
    whole = inside + elsewhere[own].numel()
    assert metrics["share_representable"] == pytest.approx(inside / whole, rel=1e-3)
    with pytest.raises(ValueError, match=r"nothing of this eraser can be kept.*1 other modules.*attn1\.to_q"):
        from_lora(elsewhere, pipe, [NEON])
    with pytest.raises(ValueError, match="nothing of this eraser can be kept"):
        from_lora({f"{n}.weight": w.detach() for n, w in projection_weights(pipe.unet).items()}, pipe, [NEON])


def test_an_adopted_bank_goes_to_disk_and_back(edited, pipe, tmp_path):
    from_lora(edited, pipe, [NEON], guards=GUARDS).save_pretrained(tmp_path / "bank")
    entry = ConceptBank.from_pretrained(tmp_path / "bank")["neon"]
    assert entry.metrics["source"] == "weights"
    assert entry.increment.form == "module"


def test_bad_requests_are_refused(edited, pipe, text_bank):
    with pytest.raises(ValueError, match="no concept given"):
        from_lora(edited, pipe, [])
    with pytest.raises(TypeError, match=r"\['neon'\]"):
        from_lora(edited, pipe, "neon")
    with pytest.raises(ValueError, match=r"no method 'copy'; choose one of \['imitate', 'project'\]"):
        from_lora(edited, pipe, [NEON], method="copy")
    with pytest.raises(ValueError, match="guard prompts take away all that this eraser does to 'neon'"):
        from_lora(edited, pipe, [NEON], guards=NEON.prompts)


def test_a_bank_of_another_unet_takes_no_increment_for_this_one(edited, pipe, text_bank):
    """Its text-side increments would serve; what is adopted belongs to the weights that the bank does not name."""
    norms = {name: (d_out, 1.1 * norm) for name, (d_out, norm) in text_bank.base.projections.items()}
    other = replace(text_bank, base=replace(text_bank.base, name="other", projections=norms))
    with pytest.raises(ValueError, match=r"made on 'other'.* cannot join it: text projections have other"):
        from_lora(edited, pipe, [Concept("edited elsewhere", NEON.pairs)], bank=other)


def test_a_bank_of_another_text_encoder_takes_no_increment_for_this_one(edited, pipe, text_bank):
    """Its base has the same UNet, so the weights say nothing; how prompts are embedded does."""
    pipe.text_encoder = random_pipeline(text_seed=5).text_encoder
    with pytest.raises(ValueError, match="prompts are embedded in another way"):
        from_lora(edited, pipe, [Concept("edited elsewhere", NEON.pairs)], bank=text_bank)


def test_the_pipeline_is_only_read(edited, pipe):
    before = latents(random_pipeline(), "neon dog")
    from_lora(edited, pipe, [NEON])
    assert torch.equal(latents(pipe, "neon dog"), before)


def test_an_eraser_of_ours_can_be_guarded_afterwards(pipe):
    """Weight differences of an increment that knew no other concept, adopted with two more guards."""
    bank = SepMETrainer(pipe, CLOSED).erase([NEON])
    deltas = bank["neon"].increment.delta_weights(projection_weights(pipe.unet))
    source = {f"{name}.weight": delta.detach() for name, delta in deltas.items()}
    entry = from_lora(source, pipe, [NEON], guards=["cat", "fox"], difference=True)["neon"]
    assert entry.metrics["guard_damage_before"] > 1e-4
    assert entry.metrics["guard_damage_after"] < 1e-6
    assert entry.metrics["effect_kept"] > 0.5


@pytest.fixture(scope="module")
def xl():
    """SDXL at small size, and a bank that acts at both of its doors."""
    pipe = random_xl_pipeline()
    return pipe, SepMETrainer(pipe, replace(CLOSED, rank=3, reserve=0.1, gain=1.0), ["watermark"]).erase(CONCEPTS[:2])


@pytest.mark.parametrize(
    ("format", "method"), [("diffusers", "imitate"), ("kohya", "project"), ("single_file", "imitate")]
)
def test_an_sdxl_eraser_is_adopted_at_both_doors(format, method, xl, tmp_path):
    """A separable one comes in unchanged, with what it does to the pooled embedding; guards stay to the bit."""
    pipe, bank = xl
    path = tmp_path / ("l" if format == "diffusers" else "l.safetensors")
    export = export_checkpoint if format == "single_file" else export_lora
    export(bank, pipe, ["neon"], path, format=format)
    config = SepMEConfig.linear(ridge=1e-9, reserve=0.1, rank=4)
    adopted = from_lora(path, pipe, [NEON], bank["neon"].guards, method=method, config=config)
    own, guards = "a cat in the style of neon", ["", "watermark", "cat"]
    before = latents(pipe, guards)
    made = {}
    for name, loaded in (("ours", bank), ("adopted", adopted)):
        pipe.load_sepme(loaded)
        made[name] = latents(pipe, own, erased=["neon"])
        assert torch.equal(latents(pipe, guards, erased=["neon"]), before)
        pipe.unload_sepme()
    torch.testing.assert_close(made["adopted"], made["ours"], rtol=0, atol=2e-3)
    assert (made["adopted"] - latents(pipe, own)).abs().max() > 1
    metrics = adopted["neon"].metrics
    assert metrics["effect_kept"] == pytest.approx(1, abs=1e-3)
    assert metrics["share_representable"] == 1
    assert metrics["parts_outside"] == 0


def test_an_eraser_of_the_pooled_embedding_is_not_lost_in_silence(xl):
    """It moves the guards too, and the columns that read the picture's sizes, which cannot be kept: metrics say so."""
    pipe, _ = xl
    generator = torch.Generator().manual_seed(0)
    weights = projection_weights(pipe.unet) | dict(door_linears(pipe.unet).values())
    edited = {
        f"{name}.weight": weight.detach() + 0.05 * torch.randn(weight.shape, generator=generator)
        for name, weight in weights.items()
    }
    entry = from_lora(edited, pipe, [NEON], ["watermark"], config=SepMEConfig.linear(reserve=0.1))["neon"]
    assert entry.metrics["guard_damage_before"] > 0.05
    assert entry.metrics["guard_damage_after"] < 1e-5
    assert entry.metrics["leakage"] < 1e-5
    assert entry.metrics["parts_outside"] == 1
    assert 0.5 < entry.metrics["share_representable"] < 1
    # What it does to the Linear's output on the concept's own prompts, by the definition.
    e = encode_doors(pipe, NEON.prompts)["pooled"][:, 0]
    pooled, weight = entry.increment.doors["pooled"], pipe.unet.add_embedding.linear_1.weight.detach()
    wanted = e @ (edited["add_embedding.linear_1.weight"] - weight)[:, :64].T
    done = ((e @ pooled.A.T) @ pooled.B.T) @ weight[:, :64].T
    assert float((done * wanted).sum() / wanted.square().sum()) > entry.metrics["effect_kept"] - 1e-3 > 0.3
