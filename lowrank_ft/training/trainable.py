"""Which parameters are trained, for tight memory: what is frozen has no gradient and no optimizer state.

    all       every parameter of the model
    factors   U and V, and nothing else
    lora      a LoRA on every U and V (Hu et al. 2021, arXiv 2106.09685)
    leading   a LoRA on every U and V that starts as their ``lora_r`` leading directions, which are taken out of what is
              frozen (PiSSA: Meng et al. 2024, arXiv 2404.02948)

U and V are plain linears (experts are unfolded for it), so PEFT does the last two, and at the end merges its matrices
into them: the result has the shapes that it would have had without. Factors are balanced, so the leading directions of U
and of V are those of their product.
"""

from typing import Any

import torch
from torch import nn

from lowrank_ft.errors import ConfigError, require_choice
from lowrank_ft.nn import factored_stacks, guided_layers, lowrank_layers, stored_form, unfold_experts

TRAINABLE = ("all", "factors", "lora", "leading")
ADAPTED = ("lora", "leading")
LEAVES = ("U", "V")


def restrict_training(model: nn.Module, trainable: str, r: int = 16, alpha: int = 32, seed: int = 0) -> None:
    """Freeze what ``trainable``, one of ``TRAINABLE``, does not name; put adapters on the factors if it asks for them.

    Args:
        r: rank of the adapters, in ``lora`` and ``leading``.
        alpha: LoRA's ``lora_alpha``; ``leading`` has a scale of 1, as its start is a part of the weight.
        seed: of the adapters' first values. The random state of the caller is left as it is.

    Raises:
        ConfigError: no such mode, a model without factored linears, one with a guide that is trained, or more leading
            directions than a factor has.
    """
    require_choice("trainable", trainable, TRAINABLE)
    if trainable == "all":
        return
    if not stored_form(model)[0]:
        raise ConfigError(f"trainable is {trainable}, and the model has no factored linears; use trainable all")
    if any(p.requires_grad for _, layer in guided_layers(model) for p in layer.guide.parameters()):
        raise ConfigError(
            f"trainable is {trainable}, and a dense guide is trained in full; choose the guide residual or none"
        )
    model.requires_grad_(False)
    if trainable == "factors":
        for _, module in (*lowrank_layers(model), *factored_stacks(model)):
            module.U.requires_grad_(True)
            module.V.requires_grad_(True)
        return
    unfold_experts(model)  # PEFT puts adapters on linears
    layers = dict(lowrank_layers(model))
    smallest = min(layers, key=lambda name: layers[name].rank)
    if trainable == "leading" and r > layers[smallest].rank:
        raise ConfigError(
            f"trainable is leading and lora_r is {r}, and {smallest} has rank {layers[smallest].rank}; "
            f"give --lora-r {layers[smallest].rank} or less, or trainable factors"
        )
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=r, lora_alpha=alpha if trainable == "lora" else r, init_lora_weights="pissa" if trainable == "leading" else True,
        target_modules=[f"{name}.{leaf}" for name in layers for leaf in LEAVES],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def merge_adapters(model: nn.Module) -> int:
    """Multiply the adapters of :func:`restrict_training` into the factors, in place; returns how many there were."""
    from peft.tuners.lora import LoraLayer

    count = 0
    for _, layer in lowrank_layers(model):
        for leaf in LEAVES:
            adapted: Any = getattr(layer, leaf)
            if isinstance(adapted, LoraLayer):
                adapted.merge()
                setattr(layer, leaf, adapted.get_base_layer())
                count += 1
    if count and hasattr(model, "peft_config"):
        del model.peft_config
    return count
