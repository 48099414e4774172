"""UNets: Stable Diffusion 1, 2 and XL, the upscalers, AnimateDiff and text-to-video."""

from sepme_diffusers.doors.family import POOLED, TOKENS, Door, Family
from sepme_diffusers.doors.linears import text_projections

UNET = Family(
    name="unet",
    denoisers=("UNet2DConditionModel", "UNetMotionModel", "UNet3DConditionModel", "UNetControlNetXSModel"),
    doors=(
        Door(TOKENS, "encoder_hidden_states"),
        # The pooled vector of Stable Diffusion XL; other UNets have none.
        Door(POOLED, "added_cond_kwargs.text_embeds", optional=True, linear="add_embedding.linear_1"),
    ),
    entry="conv_in",
    linears=text_projections,
    reference="arXiv 2112.10752, arXiv 2307.01952",
)
