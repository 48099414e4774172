"""Every baseline by name. To add one, write it in a file of its own and list it here."""

from __future__ import annotations

from sepme_diffusers.evaluation.baselines.baseline import Baseline
from sepme_diffusers.evaluation.baselines.uce import UCE

BASELINES: dict[str, Baseline] = {baseline.name: baseline for baseline in (UCE,)}
