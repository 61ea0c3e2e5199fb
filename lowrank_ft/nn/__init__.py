"""Layers: the deployed one, and the one that is trained with a guide."""

from lowrank_ft.nn.factored_experts import FactoredExperts, StackedFactors, factored_stacks, stored_form
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
from lowrank_ft.nn.quantized_guide import GUIDE_BITS, QuantizedGuideLinear, check_guide_bits, guide_label
from lowrank_ft.nn.unfolded import UnfoldedExperts, fold_experts, unfold_experts

__all__ = [
    "GUIDES",
    "GUIDE_BITS",
    "FactoredExperts",
    "GuideLinear",
    "GuidedLowRankLinear",
    "LowRankLinear",
    "QuantizedGuideLinear",
    "StackedFactors",
    "UnfoldedExperts",
    "check_guide_bits",
    "compact_state_dict",
    "compact_view",
    "end_guidance",
    "factored_stacks",
    "fold_experts",
    "guide_label",
    "guided_layers",
    "lowrank_layers",
    "set_alpha",
    "set_gates",
    "stored_form",
    "unfold_experts",
]
