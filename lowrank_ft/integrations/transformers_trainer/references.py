"""The reference of a preference trainer, such as TRL's DPOTrainer, is what the policy computes before its first step.

A policy with guides computes at alpha = 1 what its dense model does. A reference that the trainer made by itself lacks the
guides: it was read again from the compact checkpoint, or is a second adapter of PEFT whose share of the guide is 0. The
first loss is then not ``ln 2``, and the policy is pulled towards a model that it never was.
"""

import copy
from typing import Any

from torch import Tensor, nn

from lowrank_ft.errors import ConfigError
from lowrank_ft.nn import GuidedLowRankLinear, guided_layers, lowrank_layers
from lowrank_ft.nn.forms import layer_factors
from lowrank_ft.training import fsdp

REFERENCE_ADAPTER = "ref"  # TRL's name for it
_SAME = 0.05  # relative difference of products that may come from pivoting and from 16 bits


def give_reference_guides(trainer: Any, model: nn.Module) -> None:
    """Put the guides of ``model``, fixed at alpha = 1, into the reference that ``trainer`` made of its checkpoint.

    Call it before the first step, and before a checkpoint is read. A reference of other weights, which the caller chose,
    is left alone. A guide that is not trained is shared, not copied; the reference keeps it after the policy's is dropped.

    Raises:
        ConfigError: the reference is sharded by FSDP, and its layers cannot be exchanged.
    """
    for module in model.modules():
        adapted: Any = module
        if hasattr(adapted, "fix_guide"):
            adapted.fix_guide(REFERENCE_ADAPTER)
    reference = getattr(trainer, "ref_model", None)
    if reference is None:
        return
    reference = trainer.accelerator.unwrap_model(reference)
    guided = {name: layer for name, layer in guided_layers(model) if isinstance(layer, GuidedLowRankLinear)}
    bare = dict(lowrank_layers(reference))
    if not guided or set(guided) != set(bare) or any(guided_layers(reference)):
        return
    first = next(iter(guided))
    ours, theirs = _product(guided[first]), _product(bare[first])
    if ours.shape != theirs.shape or (ours - theirs.to(ours.device)).norm() > _SAME * ours.norm():
        return
    if fsdp.uses_fsdp(trainer.accelerator):
        raise ConfigError(
            "the reference model is the compact checkpoint without the guides of the policy, and under FSDP it cannot be "
            "given them; pass ref_model=, the dense model, which is what the policy computes at its first step"
        )
    for name, layer in guided.items():
        reference.set_submodule(name, _fixed(layer).train(bare[name].training))


def _fixed(layer: GuidedLowRankLinear) -> nn.Module:
    guide = layer.guide
    shared = {} if any(p.requires_grad for p in guide.parameters()) else {id(guide): guide}  # type: ignore[union-attr]
    fixed: GuidedLowRankLinear = copy.deepcopy(layer, shared)
    fixed.set_alpha(1.0)
    return fixed.requires_grad_(False)


def _product(layer: Any) -> Tensor:
    left, right = layer_factors(layer)
    return left.float() @ right.float()
