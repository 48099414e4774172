"""ControlNets: copies of a UNet's encoder that read the same text and steer the UNet."""

from sepme_diffusers.doors.family import POOLED, TOKENS, Door, Family

CONTROLNET = Family(
    name="controlnet",
    denoisers=("ControlNetModel", "ControlNetUnionModel", "SparseControlNetModel"),
    doors=(Door(TOKENS, "encoder_hidden_states"), Door(POOLED, "added_cond_kwargs.text_embeds", optional=True)),
    entry="conv_in",
    auxiliary=True,
    reference="arXiv 2302.05543",
)
