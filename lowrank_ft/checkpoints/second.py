"""A second method over the factors: a compact checkpoint whose linears, U and V among them, are in 8 or 4 bits.

transformers loads with one quantizer. Here it is a class made of two: the one of the factors, which puts factored layers
where the checkpoint has them, and then that of the other library, which finds ``nn.Linear`` modules inside of them and
everywhere else. ``config.json`` holds the other library's entry inside of ours, under ``quantized``.

The text of this file travels inside every exported checkpoint (see :mod:`.plugin`).
"""

import math
import types
import warnings
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import auto as transformers_registry
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from lowrank_ft.nn.lowrank_linear import lowrank_layers

SECOND_METHODS = ("bitsandbytes", "torchao", "quanto")


def second_config(given: Any) -> Any:
    """The config of the other library, from its entry in ``config.json`` or from what the caller passed.

    Raises:
        ValueError: it is of a library that cannot quantize factors.
    """
    config = transformers_registry.AutoQuantizationConfig.from_dict(given) if isinstance(given, dict) else given
    method = getattr(config.quant_method, "value", config.quant_method)
    if method not in SECOND_METHODS:
        raise ValueError(
            f"{type(config).__name__} ({method}) cannot quantize the factors of a compact checkpoint; "
            f"{', '.join(SECOND_METHODS)} can. For another method, lowrank-ft merge makes a dense checkpoint first"
        )
    return config


def both(factored: type, config: Any) -> type:
    """The quantizer class that does what ``factored`` does, and then what the library of ``config`` does."""
    method = getattr(config.quant_method, "value", config.quant_method)
    if method == "bitsandbytes":
        method += "_8bit" if config.load_in_8bit else "_4bit"
    other = transformers_registry.AUTO_QUANTIZER_MAPPING[method]
    return types.new_class(f"LowRank{other.__name__}", (_OverFactors, factored, other), {}, _of_this_module)


def _of_this_module(namespace: dict[str, Any]) -> None:
    namespace["__module__"] = __name__


class _OverFactors(HfQuantizer):
    """What differs from both parents: names, marks, and a word about factors that the library left as they were."""

    factored: Any  # the config of the factors

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        result = super()._process_model_before_weight_loading(model, **kwargs)
        self._check_groups(model)
        pivoted = any(layer.pivot is not None for _, layer in lowrank_layers(model))
        if pivoted and not self.pre_quantized and (getattr(self, "quantized_element_size", None) or 1) < 1:
            warnings.warn(
                "4 bits harm the pivoted factors of this checkpoint more than plain ones (they move the weights by about "
                "0.3 of their size, instead of 0.13); write plain factors first: lowrank-ft export CHECKPOINT --form factors",
                stacklevel=2,
            )
        return result

    def _check_groups(self, model: PreTrainedModel) -> None:
        """Raise a ValueError where torchao's groups do not divide the rows that they are to cut."""
        name, kind = type(self.quantization_config).__name__, getattr(self.quantization_config, "quant_type", None)
        group = getattr(kind, "group_size", None) or getattr(getattr(kind, "granularity", None), "group_size", None)
        if not isinstance(group, int) or self.pre_quantized:
            return
        widths = {n: part.in_features for n, part in self._parts(model).items()}
        odd = [n for n, width in widths.items() if width % group]
        if odd:
            raise ValueError(
                f"{name} has groups of {group}, which do not divide the rows of {len(odd)} of {len(widths)} factors, such "
                f"as {odd[0]} with {widths[odd[0]]} columns; all rows can be cut into groups of "
                f"{math.gcd(*widths.values())}, or take whole rows: granularity=PerAxis(0)"
            )

    def _parts(self, model: nn.Module) -> dict[str, Any]:
        """The factors that the library is to quantize, by name."""
        parts = {f"{n}.{p}": getattr(layer, p) for n, layer in lowrank_layers(model) for p in ("U", "V")}
        return {n: part for n, part in parts.items() if should_convert_module(n, self._left_alone)}

    def get_modules_to_not_convert(self, model: Any, *args: Any, **kwargs: Any) -> list[str]:  # type: ignore[override]
        names = super().get_modules_to_not_convert(model, *args, **kwargs)
        # Whoever names a linear means its factors.
        kept = [n for n, _ in lowrank_layers(model) if not should_convert_module(n, names)]
        self._left_alone = [*names, *(f"{n}.{part}" for n in kept for part in ("U", "V"))]
        return self._left_alone

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        super()._process_model_after_weight_loading(model, **kwargs)
        _keep_unpacked(model)
        self._tell_what_stays(model)
        # transformers 5.23 reverses every conversion when it saves, and these cannot be reversed. Packed parts are saved
        # under the names that they have, so no conversion is needed.
        loaded: Any = model
        conversions = model.__dict__.get("_weight_conversions") or []
        own = [c for c in conversions if not any(hasattr(op, "hf_quantizer") for op in getattr(c, "operations", ()))]
        if len(own) < len(conversions):
            loaded._weight_conversions = own
        return model

    def _tell_what_stays(self, model: nn.Module) -> None:
        parts = self._parts(model)
        stay = [n for n, p in parts.items() if type(p) is nn.Linear and type(p.weight) is nn.Parameter]
        if stay:
            part = parts[stay[0]]
            warnings.warn(
                f"{len(stay)} of {len(parts)} factors stay in {str(part.weight.dtype).removeprefix('torch.')}, such as "
                f"{stay[0]} ({part.out_features} x {part.in_features}): {type(self.quantization_config).__name__} left them",
                stacklevel=2,
            )

    def remove_quantization_config(self, model: Any) -> None:
        """After :meth:`dequantize` it is a compact model like any other."""
        super().remove_quantization_config(model)
        self.factored.quantized = None
        model.config.quantization_config = self.factored
        take_marks_off(model)


def _keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first pass on a CPU that multiplies in bfloat16.

    It stops at weights whose rows are no multiple of 32, or whose columns are no whole blocks (0.50.2): few ranks fit.
    And repacking rounds the scales, so a model saved or dequantized after a pass would not be the one that was loaded.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def take_marks_off(model: PreTrainedModel) -> None:
    """Make it an ordinary model: with these marks, transformers refuses ``.half()``, ``.to()`` and training."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False
    for mark in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(mark, None)


def accept_second_methods(method: str) -> None:
    """Make ``from_pretrained`` take another library's config for checkpoints of ``method``; done once.

    transformers refuses two configs of different classes before it asks either of them.
    """
    registry = transformers_registry.AutoHfQuantizer
    before = registry.merge_quantization_configs
    if getattr(before, "takes_second_methods", False):
        return

    def merge_quantization_configs(cls: Any, stored: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
        entry = stored if isinstance(stored, dict) else stored.to_dict()
        if given is None or entry.get("quant_method") != method or getattr(given, "quant_method", "") == method:
            return before(stored, given, *args, **kwargs)
        kind: Any = transformers_registry.AUTO_QUANTIZATION_CONFIG_MAPPING[method]
        config = kind.from_dict(entry)
        config.quantize(second_config(given))
        return config

    merge_quantization_configs.takes_second_methods = True  # type: ignore[attr-defined]
    registry.merge_quantization_configs = classmethod(merge_quantization_configs)  # type: ignore[method-assign, assignment]
