"""How transformers loads a compact checkpoint: swap modules on the meta device, before weights are read.

``config.json`` keeps the stock ``model_type`` and says ``"quant_method": "lowrank"``; :func:`register` tells
transformers what that means. The text of this file, with that of the two that it imports, also travels inside every
exported checkpoint, where ``trust_remote_code=True`` finds it: hence no other import of the package.
"""

import warnings
import weakref
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import auto as transformers_registry
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank_ft.checkpoints.second import accept_second_methods, both, second_config, take_marks_off
from lowrank_ft.nn.factored_experts import FactoredExperts, factored_stacks, stored_form
from lowrank_ft.nn.lowrank_linear import LowRankLinear, lowrank_layers

METHOD = "lowrank"
NEWEST_READABLE_FORMAT = 3


class LowRankQuantizationConfig(QuantizationConfigMixin):
    """The ``quantization_config`` entry of a compact checkpoint.

    Args:
        ranks: module name to rank of every factored linear.
        format_version: version of the checkpoint format.
        base_model: where the dense weights came from.
        base_revision: the commit that they were read from, if that was on the Hub.
        pivots: module name to side, ``output`` or ``input``, of those that are pivoted.
        quantized: the entry of another library, in whose form the stored linears are.

    Raises:
        ValueError: the checkpoint is of a newer format than this code reads, or ``quantized`` of an unknown library.
    """

    quantized_when_loading = False

    def __init__(
        self,
        ranks: dict[str, int] | None = None,
        format_version: int = NEWEST_READABLE_FORMAT,
        base_model: str | None = None,
        base_revision: str | None = None,
        pivots: dict[str, str] | None = None,
        quantized: Any = None,
        **kwargs: Any,
    ) -> None:
        if format_version > NEWEST_READABLE_FORMAT:
            raise ValueError(
                f"this checkpoint has lowrank format version {format_version}, and this code reads up to "
                f"{NEWEST_READABLE_FORMAT}; run pip install --upgrade lowrank-ft"
            )
        self.quant_method = METHOD  # type: ignore[assignment]  # a closed enum there
        self.ranks = dict(ranks or {})
        self.format_version = format_version
        self.base_model = base_model
        self.base_revision = base_revision
        self.pivots = dict(pivots) if pivots else None
        self.quantized = None if quantized is None else second_config(quantized)

    def quantize(self, config: Any) -> None:
        """Quantize with ``config`` of another library while the weights are read.

        Raises:
            ValueError: the stored weights are quantized by another library already.
        """
        if self.quantized is None:
            self.quantized, self.quantized_when_loading = config, True
        elif type(self.quantized) is not type(config):
            raise ValueError(
                f"the checkpoint is quantized with {type(self.quantized).__name__} already, and {type(config).__name__} "
                "cannot be added; load it without quantization_config, or quantize the compact checkpoint it came from"
            )
        else:
            warnings.warn("the checkpoint is quantized already, as its config.json says; that is kept", stacklevel=4)

    def to_dict(self) -> dict[str, Any]:
        fields = {k: v for k, v in self.__dict__.items() if k not in ("quantized", "quantized_when_loading")}
        if self.quantized is not None:  # a release that does not know of it must stop
            fields |= {"format_version": NEWEST_READABLE_FORMAT, "quantized": self.quantized.to_dict()}
        return {k: v for k, v in fields.items() if v is not None}


class FactoredLinears(HfQuantizer):
    """Puts a :class:`LowRankLinear` wherever the checkpoint says that a linear is factored."""

    _foreign_prefix = _own_prefix = ""  # of the base model, in the checkpoint and here, where they differ

    def __init__(self, config: LowRankQuantizationConfig, pre_quantized: bool = True, **kwargs: Any) -> None:
        if not pre_quantized:
            raise ValueError(
                "a dense checkpoint cannot be factorized by passing a quantization_config to from_pretrained; "
                "convert it first: lowrank-ft convert, or lowrank_ft.convert(model, rank=...)"
            )
        self.factored = config
        own: Any = config if config.quantized is None else config.quantized
        super().__init__(own, pre_quantized=not config.quantized_when_loading, **kwargs)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        self._files = [str(f) for f in kwargs.get("checkpoint_files") or []]
        # Weak, since transformers copies conversions, and those of bitsandbytes hold the quantizer.
        self._model = weakref.ref(model)
        modules = dict(model.named_modules())
        stacked = {name: None for name, p in model.named_parameters() if p.dim() == 3}  # such as experts
        swapped = 0
        stacks: dict[str, dict[str, Any]] = {}
        for name, found in self._modules_of(model, stacked | modules).items():
            rank = self.factored.ranks[name]
            parent, _, leaf = found.rpartition(".")
            side = (self.factored.pivots or {}).get(name)
            swapped += 1
            if found in stacked:
                stacks.setdefault(parent, {})[leaf] = (rank, side)
                continue
            layer = LowRankLinear.like(modules[found], rank, device="meta", pivot=side)
            setattr(model.get_submodule(parent), leaf, layer)
        for name, parts in stacks.items():
            parent, _, leaf = name.rpartition(".")
            ranks, pivots = ({n: part[i] for n, part in parts.items()} for i in (0, 1))
            experts = FactoredExperts.like(modules[name], ranks, pivots, device="meta")
            setattr(model.get_submodule(parent), leaf, experts)
        if swapped:  # a device map that puts U and V in different places computes with neither
            whole = {LowRankLinear.__name__, FactoredExperts.__name__}
            model._no_split_modules = {*(model._no_split_modules or ()), *whole}
        self._names = set(model.state_dict())
        if self.factored.ranks and not swapped:
            first = next(iter(self.factored.ranks))
            raise ValueError(
                f"{type(model).__name__} has none of the factored linears of the checkpoint, such as {first}"
            )
        return super()._process_model_before_weight_loading(model, **kwargs)

    def _modules_of(self, model: PreTrainedModel, modules: dict[str, Any]) -> dict[str, str]:
        """The checkpoint's names of the factored linears, and what ``model`` calls them.

        A part that this class lacks, such as a head, or the decoder of an encoder-only class, is left out. If a linear of
        the class were left out by mistake, reading its weights would stop at the tripwire.
        """
        names, prefix = self.factored.ranks, model.base_model_prefix
        # A bare AutoModel reads a ForCausalLM checkpoint and the other way round: the prefix comes or goes.
        known = {n: (n, f"{prefix}.{n}", n.removeprefix(f"{prefix}.")) for n in names}
        found = {n: next((c for c in known[n] if c in modules), "") for n in names}
        if not any(found.values()):
            # Another class may have another prefix: LlamaForQuestionAnswering says transformer. where others say model.
            for foreign in dict.fromkeys(".".join(n.split(".")[:depth]) + "." for depth in (1, 2) for n in names):
                tails = {n: n.removeprefix(foreign) for n in names if n.startswith(foreign)}
                found = {n: next((c for c in (f"{prefix}.{t}", t) if c in modules), "") for n, t in tails.items()}
                if any(found.values()):
                    self._foreign_prefix, self._own_prefix = foreign, f"{prefix}."
                    break
        return {n: module for n, module in found.items() if module}

    def get_weight_conversions(self) -> list[Any]:
        """Names of the checkpoint to names of the model, where the two have another prefix."""
        conversions = super().get_weight_conversions()
        if self._foreign_prefix:
            conversions.append(WeightRenaming("^" + self._foreign_prefix.replace(".", r"\."), self._own_prefix))
        return conversions

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Without those of the architecture where the checkpoint has its names already, which they could only garble."""
        given = () if model is None else (model,)
        model = self._model() if model is None else model  # transformers 5.19 does not say which
        files = [f for f in self._files if f.endswith(".safetensors")]
        stored: set[str] = set()
        for file in files:
            with safe_open(file, framework="pt") as handle:
                stored.update(handle.keys())
        for plain, parts in self.serialized_names.items():  # of another library's checkpoint
            stored |= {name.removesuffix(p) + plain for p in parts for name in stored if name.endswith(f".{p}")}
        prefix = f"{model.base_model_prefix}."
        wanted = self._names - set(getattr(model, "all_tied_weights_keys", None) or ())
        own_names = all(k in stored or prefix + k in stored or k.removeprefix(prefix) in stored for k in wanted)
        return super().update_weight_conversions([] if files and own_names else weight_conversions, *given)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        super()._process_model_after_weight_loading(model, **kwargs)
        _refuse_random_factors(model)
        model.config.quantization_config = self.factored
        if self._foreign_prefix:  # saved again, it has its own names, also of weights
            self.factored.ranks, self.factored.pivots = stored_form(model)
            model.__dict__.pop("_weight_conversions", None)
        _forget_shipped_code(model.config)
        return model


class LowRankQuantizer(FactoredLinears):
    """The loader of a checkpoint whose factors are in an ordinary float type."""

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        super()._process_model_after_weight_loading(model, **kwargs)
        # From here on this is an ordinary model. The entry in its config stays, so that saving it makes a compact
        # checkpoint again.
        take_marks_off(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def quantizer(config: LowRankQuantizationConfig, **kwargs: Any) -> FactoredLinears:
    """The loader for a checkpoint, and where it has a second method, for both together."""
    kind = LowRankQuantizer if config.quantized is None else both(FactoredLinears, config.quantized)
    return kind(config, **kwargs)


class LowRankAutoConfig(PreTrainedConfig):
    """What ``auto_map`` of a checkpoint points to: registers the loader, then returns the stock config."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> Any:  # type: ignore[override]
        register(replace=False)
        kwargs["trust_remote_code"] = False
        return AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)


def register(replace: bool = True) -> None:
    """Teach transformers the ``lowrank`` method; calling it again does no harm.

    Args:
        replace: take the place of a loader that is registered already, as the installed package does with the copy
            that a checkpoint brought along.
    """
    configs = transformers_registry.AUTO_QUANTIZATION_CONFIG_MAPPING
    quantizers = transformers_registry.AUTO_QUANTIZER_MAPPING
    if replace or METHOD not in quantizers:
        configs[METHOD] = LowRankQuantizationConfig
        quantizers[METHOD] = quantizer  # type: ignore[assignment]  # called like the class that it makes
    accept_second_methods(METHOD)


def _refuse_random_factors(model: PreTrainedModel) -> None:
    """Raise a ValueError where a factored linear got no weights: transformers would fill it at random and go on."""
    # transformers marks what it has read; what stays on the meta device is read from disk later.
    mark = "_is_hf_initialized"
    if not any(hasattr(p, mark) for p in model.parameters()):
        return
    factors: dict[str, Any] = {name: (layer.U, layer.V) for name, layer in lowrank_layers(model)}
    factors |= {name: (stack.U, stack.V) for name, stack in factored_stacks(model)}
    for name, parts in factors.items():
        for part in parts:
            weight = getattr(part, "weight", part)  # of a linear, or a stack itself
            read = getattr(weight, mark, False) or getattr(part, "frozen", False)  # the latter is quanto's mark
            if not weight.is_meta and not read:
                raise ValueError(
                    f"the checkpoint has no weights for {name} under a name that {type(model).__name__} reads; "
                    "load it with the class that config.json names under architectures"
                )


def _forget_shipped_code(config: PreTrainedConfig) -> None:
    """Drop the pointer to a checkpoint's own copy of this file: ``save_pretrained`` would not copy the file along."""
    auto_map = getattr(config, "auto_map", None) or {}
    kept = {k: v for k, v in auto_map.items() if not str(v).endswith(LowRankAutoConfig.__name__)}
    if kept:
        config.auto_map = kept
    elif auto_map:
        del config.auto_map


# The copy in a checkpoint leaves an installed package its place.
register(replace=__name__ == "lowrank_ft.checkpoints.loader")
