"""Names that cannot be erased as they are given: a clear error, and a bank that is as it was."""

import pytest

from sepme_diffusers import Concept, SepMETrainer, pocket


@pytest.mark.parametrize("aliases", [[""], ["  "], ["gloss", "gloss"], ["gloss", "GLOSS"], ["neon"], [3]])
def test_aliases_that_are_empty_repeated_or_no_text_are_refused(aliases):
    with pytest.raises((TypeError, ValueError), match=r"alias|names given twice"):
        Concept.style("neon", aliases=aliases)


def test_an_alias_is_no_other_concepts_name(pocket_trainer):
    concepts = [Concept.style("neon", aliases=["pencil"]), Concept.style("pencil")]
    with pytest.raises(ValueError, match=r"\['pencil'\] cannot be aliases of 'neon'"):
        pocket_trainer.erase(concepts)
    concepts = [Concept.style("neon", aliases=["P. E. Ncíl"]), Concept.style("pencil")]  # but for accents and points
    with pytest.raises(ValueError, match=r"\['P\. E\. Ncíl'\] cannot be aliases of 'neon'"):
        pocket_trainer.erase(concepts)
    bank = pocket.bank("styles")
    digest = bank.digest
    with pytest.raises(ValueError, match=r"\['mosaic'\] cannot be aliases of 'chalk'"):
        pocket_trainer.erase([Concept.style("chalk", aliases=["mosaic"])], bank)
    assert bank.digest == digest


def test_a_name_that_the_text_encoder_reads_as_a_guard_is_refused(pocket_pipe):
    with pytest.raises(ValueError, match=r"is to the text encoder the guard 'Neon'.*drop one of them"):
        SepMETrainer(pocket_pipe, guards=["Neon"]).erase(["neon"], kind="style")


def test_a_name_that_is_cut_is_refused_with_why(pocket_trainer):
    name = " ".join(["a house of many rooms"] * 4)
    with pytest.raises(ValueError, match=r"of the templates of kind 'object' the text encoder reads 0 .*too long"):
        pocket_trainer.erase([name], kind="object")


@pytest.mark.parametrize("name", ["", "  ", "\u200b"])
def test_names_of_which_nothing_is_seen_are_refused(pocket_trainer, name):
    with pytest.raises(ValueError, match="name"):
        pocket_trainer.erase([name], kind="style")


def test_regular_prompts_that_all_name_the_concept_are_refused(pocket_pipe):
    about = [f"a neon {name}" for name in pocket.objects[:20]]
    with pytest.raises(ValueError, match="is about 'neon'; give regular ones"):
        SepMETrainer(pocket_pipe, regular=about).erase(["neon"], kind="style")


def test_a_string_is_no_list_of_names(pocket_trainer):
    with pytest.raises(TypeError, match="list"):
        pocket_trainer.erase("neon", kind="style")
