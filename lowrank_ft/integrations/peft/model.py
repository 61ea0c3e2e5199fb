"""The tuner: puts adapters beside the linears of a model, and takes them out again."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import Tensor, nn

from lowrank_ft.checkpoints.format import describe_in_config
from lowrank_ft.errors import ConfigError, TargetError
from lowrank_ft.factorization.solvers import Factors
from lowrank_ft.factorization.targets import is_linear, pattern_value, refuse_offloaded, select_targets
from lowrank_ft.integrations.peft.config import LowRankConfig
from lowrank_ft.integrations.peft.layer import LowRankAdapterLinear, LowRankLayer
from lowrank_ft.integrations.peft.quantized import dequantized, is_quantized
from lowrank_ft.nn import stored_form
from lowrank_ft.nn.forms import pivoted
from lowrank_ft.nn.replace import factorized


class LowRankModel(BaseTuner):
    """A model whose linears carry low-rank adapters. ``get_peft_model`` and ``PeftModel.from_pretrained`` make it."""

    prefix: str = "lowrank_"
    tuner_layer_cls = LowRankLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's attribute; _prepare_adapter_config decides)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        targets = config.target_modules
        all_linear = isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # PEFT has written the full name of every linear into the config, which would not fit a model of another depth.
        if all_linear:
            config.target_modules = shortest_suffixes(config.target_modules, _module_names(model))

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, LowRankConfig)
        if stored_form(self.model)[0]:
            raise TargetError(
                "the model is compact already, so there is no dense weight to factorize; train its factors as they are, "
                "put LoRA on them, or merge it first"
            )
        if peft_config.target_modules is None:
            names = {spec.name.removesuffix(".base_layer") for spec in select_targets(self.model, counts=_is_target)}
            # On top of an earlier adapter the copies that modules_to_save made are linears of blocks, too.
            names = {n for n in names if not {"modules_to_save", "original_module"} & set(n.split("."))}
            peft_config.target_modules = shortest_suffixes(names, _module_names(self.model))
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, LowRankConfig)
        rank = pattern_value(current_key, peft_config.rank_pattern)
        rank = peft_config.r if rank is None else rank
        if isinstance(target, LowRankLayer):
            target.update_layer(adapter_name, rank, peft_config)
            return
        if not _is_target(target):
            raise TargetError(
                f"Target module {current_key} is {type(target).__name__}, which is not supported; lowrank takes "
                "nn.Linear, Conv1D and bitsandbytes' linears: name others in target_modules, or this one in exclude_modules"
            )
        if hasattr(target, "_hf_hook"):  # of accelerate; a model on the meta device as a whole is filled later
            refuse_offloaded(target, current_key)
        layer = LowRankAdapterLinear(target, current_key, adapter_name, rank, peft_config)
        peft_config.fan_in_fan_out = layer.transposed
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter waits until it is activated
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """PEFT calls this when it saves, before it writes the config: bring that up to date with the layers."""
        assert isinstance(config, LowRankConfig)
        layers = [m for _, m in _adapted(model) if adapter_name in m.lowrank_guide]
        for layer in layers:
            layer.fill_pending()  # in place, so the state dict sees it
        if layers:
            config.alpha = layers[0].lowrank_share[adapter_name]
            config.guide = layers[0].lowrank_guide[adapter_name]
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    def compact_and_unload(self, adapter_name: str | None = None) -> nn.Module:
        """End with the model that fine-tuning was for: the bare model, smaller, with factors instead of ``W``.

        Every adapted linear becomes a :class:`~lowrank_ft.nn.LowRankLinear`, or a dense linear holding ``U @ V``
        where it has full rank. The factors are pivoted, as they are stored; :func:`lowrank_ft.unpivot` undoes that.
        Modules in ``modules_to_save`` are put in place. The result computes what this model computes at alpha 0, and
        its ``save_pretrained`` writes a checkpoint that ``AutoModel`` loads.

        Args:
            adapter_name: which adapter; the active one by default.

        Returns:
            The base model, changed in place. This tuner is used up.

        Raises:
            ConfigError: no such adapter, or several are active and none is named.
            TargetError: an adapted linear shares its weight with another module.
        """
        adapter_name = self._one_adapter(adapter_name)
        layers = [(name, layer) for name, layer in _adapted(self.model) if adapter_name in layer.lowrank_U]
        self._refuse_tied(layers)
        self.set_adapter(adapter_name)  # also unmerges, and tells modules_to_save which copy is meant
        for name, layer in layers:
            layer.fill_pending()
            layer.drop_guide()
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, _compact(layer, adapter_name, _plain_dtype(self.model)))
        # What PEFT wraps beside our layers: modules_to_save, and linears that only other adapters touched.
        self._unload_and_optionally_merge(adapter_names=[adapter_name])
        _leave_quantization(self.model)
        describe_in_config(self.model, self.peft_config[adapter_name].base_model_name_or_path)
        return self.model

    def _one_adapter(self, adapter_name: str | None) -> str:
        if adapter_name is None:
            if len(self.active_adapters) != 1:
                raise ConfigError(
                    f"the active adapters are {self.active_adapters or 'none'}, and a compact model holds the factors "
                    f"of one; name it: compact_and_unload(adapter_name) with one of {', '.join(self.peft_config)}"
                )
            adapter_name = self.active_adapters[0]
        if adapter_name not in self.peft_config:
            raise ConfigError(f"there is no adapter {adapter_name!r}; choose one of {', '.join(self.peft_config)}")
        return adapter_name

    def _refuse_tied(self, layers: list[tuple[str, LowRankLayer]]) -> None:
        owners: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        for name, layer in layers:
            others = [n for n in owners[id(layer.weight)] if not n.startswith(f"{name}.")]
            if others:
                raise TargetError(
                    f"{name} shares its weight with {others[0].removesuffix('.weight')}, so it cannot be factorized "
                    "alone; exclude it from the adapter, or use merge_and_unload"
                )


def shortest_suffixes(names: Iterable[str], all_names: Iterable[str]) -> set[str]:
    """The shortest dotted suffixes that match ``names`` and none of the other names.

    ``{"layers.0.up_proj", "layers.1.up_proj"}`` gives ``{"up_proj"}``, unless another module ends in ``up_proj``, too.
    """
    chosen = set(names)
    others = {suffix for name in set(all_names) - chosen for suffix in _suffixes(name)}
    return {next((s for s in _suffixes(name) if s not in others), name) for name in chosen}


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def _module_names(model: nn.Module) -> set[str]:
    """Names of modules that PEFT would match, without the insides of adapted linears."""
    adapted = tuple(f"{name}." for name, _ in _adapted(model))
    return {name for name, _ in model.named_modules() if name and not (adapted and name.startswith(adapted))}


def _adapted(model: nn.Module) -> Iterator[tuple[str, LowRankLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LowRankLayer):
            yield name, module


def _is_target(module: nn.Module) -> bool:
    return is_linear(module) or is_quantized(module)


def _compact(layer: LowRankLayer, adapter_name: str, dtype: torch.dtype) -> nn.Module:
    u, v = layer.lowrank_U[adapter_name].detach(), layer.lowrank_V[adapter_name].detach()
    base: Any = layer.get_base_layer()
    if is_quantized(base):
        layer.base_layer = dequantized(base, dtype)
    if v.shape[0] < min(layer.out_features, layer.in_features):
        return pivoted(factorized(layer.get_base_layer(), Factors(u, v)))
    layer.merge(adapter_names=[adapter_name])
    return layer.get_base_layer()


def _plain_dtype(model: nn.Module) -> torch.dtype:
    """Of what is neither quantized nor an adapter: embeddings, norms, the head."""
    plain = (p for n, p in model.named_parameters() if p.is_floating_point() and LowRankModel.prefix not in n)
    return next((p.dtype for p in plain), torch.get_default_dtype())


def _leave_quantization(model: nn.Module) -> None:
    """Make a plain model of what bitsandbytes had quantized, for a checkpoint holds one format or the other."""
    left = [(name, module) for name, module in model.named_modules() if is_quantized(module)]
    dtype = _plain_dtype(model)
    for name, module in left:
        model.set_submodule(name, dequantized(module, dtype))
    if left:
        warnings.warn(
            f"{len(left)} quantized linears that the adapter left alone, the first being {left[0][0]}, are {dtype} now; "
            "a compact model is not quantized",
            stacklevel=3,
        )
    # transformers refuses to cast, move or train a model that carries these marks.
    for mark in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(mark, None)
