"""Loads this low-rank checkpoint where the package lowrank-ft is not installed.

    AutoModel.from_pretrained(..., trust_remote_code=True)

Written by lowrank-ft from its own modules; it needs torch and transformers and touches no network and no other file.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """``y = U (V x) + bias`` with ``V`` of shape ``(rank, in)`` and ``U`` of shape ``(out, rank)``.

    ``U`` and ``V`` are plain ``nn.Linear`` children, so whatever finds linears (LoRA, quantizers, tensor-parallel
    plans, ``torch.compile``) works inside. ``bias`` stays where the dense layer had it.

    The buffer ``weight`` is a tripwire of one element under the dense weight's name. A loader that does not know this
    layer finds a tensor of the wrong shape and stops; without it, transformers would fill the model with random
    weights and go on. It also answers code that peeks at ``.weight.dtype`` or ``.weight.device``.

    Args:
        transposed: the dense layer stored its weight ``(in, out)``, as GPT-2's ``Conv1D`` does; only ``merge`` asks.
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.transposed = transposed
        self.V = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.U = nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))

    @classmethod
    def like(cls, dense: Any, rank: int, device: torch.device | str | None = None) -> "LowRankLinear":
        """A fresh layer with the shape, bias and dtype of a dense ``nn.Linear`` or ``Conv1D``; its device, too."""
        transposed = type(dense).__name__ == "Conv1D"
        rows, columns = dense.weight.shape
        out_features, in_features = (columns, rows) if transposed else (rows, columns)
        device = dense.weight.device if device is None else device
        return cls(in_features, out_features, rank, dense.bias is not None, transposed, device, dense.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.U(self.V(x))
        # Under autocast y is of lower precision than the bias, and a plain sum would be promoted.
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def lowrank_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """Names and modules of all factored linears, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            yield name, module


from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import auto as transformers_registry
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "lowrank"
NEWEST_READABLE_FORMAT = 1


class LowRankQuantizationConfig(QuantizationConfigMixin):
    """The ``quantization_config`` entry of a compact checkpoint.

    Args:
        ranks: module name to rank of every factored linear.
        format_version: version of the checkpoint format.
        base_model: where the dense weights came from.
        base_revision: the commit that they were read from, if that was on the Hub.

    Raises:
        ValueError: the checkpoint is of a newer format than this code reads.
    """

    def __init__(
        self,
        ranks: dict[str, int] | None = None,
        format_version: int = NEWEST_READABLE_FORMAT,
        base_model: str | None = None,
        base_revision: str | None = None,
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

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_dict().items() if v is not None}


class LowRankQuantizer(HfQuantizer):
    """Puts a :class:`LowRankLinear` wherever the checkpoint says that a linear is factored."""

    quantization_config: LowRankQuantizationConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError(
                "a dense checkpoint cannot be factorized by passing a quantization_config to from_pretrained; "
                "convert it first: lowrank-ft convert, or lowrank_ft.convert(model, rank=...)"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self._files = [str(f) for f in kwargs.get("checkpoint_files") or []]
        modules = dict(model.named_modules())
        prefix = model.base_model_prefix
        swapped = 0
        for name, rank in self.quantization_config.ranks.items():
            # A bare AutoModel reads a ForCausalLM checkpoint and the other way round: the prefix comes or goes.
            candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
            found = next((c for c in candidates if c in modules), None)
            if found is None:
                # A part that this class lacks, such as a head, or the decoder of an encoder-only class. A linear that
                # is there and missed would meet its tripwire when weights are read.
                continue
            parent, _, leaf = found.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LowRankLinear.like(modules[found], rank, device="meta"))
            swapped += 1
        if swapped:  # a device map that puts U and V in different places computes with neither
            model._no_split_modules = {*(model._no_split_modules or ()), LowRankLinear.__name__}
        if self.quantization_config.ranks and not swapped:
            first = next(iter(self.quantization_config.ranks))
            raise ValueError(
                f"{type(model).__name__} has none of the factored linears of the checkpoint, such as {first}"
            )

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """None where the checkpoint has the names of the model already, which a conversion could only garble."""
        conversions = super().update_weight_conversions(weight_conversions, model)
        files = [f for f in self._files if f.endswith(".safetensors")]
        stored: set[str] = set()
        for file in files:
            with safe_open(file, framework="pt") as handle:
                stored.update(handle.keys())
        prefix = f"{model.base_model_prefix}."
        wanted = set(model.state_dict()) - set(getattr(model, "all_tied_weights_keys", None) or ())
        own_names = all(k in stored or prefix + k in stored or k.removeprefix(prefix) in stored for k in wanted)
        return [] if files and own_names else conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        _refuse_random_factors(model)
        # From here on this is an ordinary model: with these marks on it, transformers refuses .half(), .to() and
        # training. The entry in its config stays, so that saving it makes a compact checkpoint again.
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        for mark in ("hf_quantizer", "quantization_method"):
            model.__dict__.pop(mark, None)
        model.__dict__.pop("is_quantized", None)
        _forget_shipped_code(model.config)
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
        quantizers[METHOD] = LowRankQuantizer


def _refuse_random_factors(model: PreTrainedModel) -> None:
    """Raise a ValueError where a factored linear got no weights: transformers would fill it at random and go on."""
    # transformers marks what it has read; what stays on the meta device is read from disk later.
    mark = "_is_hf_initialized"
    if not any(hasattr(p, mark) for p in model.parameters()):
        return
    for name, layer in lowrank_layers(model):
        for part in (layer.U, layer.V):
            if not part.weight.is_meta and not getattr(part.weight, mark, False):
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
