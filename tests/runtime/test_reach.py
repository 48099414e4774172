"""An increment that reads less of its concept than the pipeline's precision rounds away would do nothing, unseen."""

from dataclasses import replace

import pytest
import torch

from sepme_diffusers import ErasureNotInForce


@pytest.mark.parametrize(("dtype", "reach"), [(torch.bfloat16, 6e-4), (torch.bfloat16, 3e-4), (torch.float16, 3e-5)])
def test_an_increment_that_rounding_takes_away_is_refused(dtype, reach, pipe, text_bank):
    entry = text_bank["neon"]
    assert entry.metrics["reach"] > 0.01
    bank = text_bank.with_entries([replace(entry, metrics={**entry.metrics, "reach": reach})])
    for precise in (True, False):
        if not precise:
            pipe.unload_sepme()
            pipe.to(dtype)
        pipe.load_sepme(bank)
        pipe.set_erased(["cat"])
        assert pipe.check_erased() == ("cat",)
        pipe.set_erased(["neon", "cat"])
        if precise:
            assert pipe.check_erased() == ("neon", "cat")
    with pytest.raises(ErasureNotInForce, match=rf"'neon' reads {reach:.1e} of its concept, and {dtype} embeddings"):
        pipe.check_erased()
