"""Layers: the deployed one, and the one that is trained with a guide."""

from lowrank_ft.nn.guided import (
    GUIDES,
    GuidedLowRankLinear,
    GuideLinear,
    compact_state_dict,
    compact_view,
    end_guidance,
    guided_layers,
    set_alpha,
    set_gates,
)
from lowrank_ft.nn.lowrank_linear import LowRankLinear, lowrank_layers

__all__ = [
    "GUIDES",
    "GuideLinear",
    "GuidedLowRankLinear",
    "LowRankLinear",
    "compact_state_dict",
    "compact_view",
    "end_guidance",
    "guided_layers",
    "lowrank_layers",
    "set_alpha",
    "set_gates",
]
