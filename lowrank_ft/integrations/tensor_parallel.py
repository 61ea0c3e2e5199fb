"""Tensor parallelism for factored linears: of each, one factor is split over the processes, and the other is whole.

    column layer (q, k, v, gate, up)    h = V x        whole V, on every process
                                        y_p = U_p h    rows of U: this process's part of the output
    row layer (o, down)                 h = sum over p of V_p x_p    columns of V: all-reduce of h, ``(..., rank)``
                                        y = U h        whole U, on every process

The whole factor may be the one that holds the identity of the pivoted form: pivoted on the input side in a column
layer, on the output side in a row layer. Layers that are pivoted on the side that is split become plain factors.

Between the two, each process works on its own heads or its own part of the feed-forward width, as with dense layers.
But what is sent has ``rank`` numbers per token and not the model's width: forward one all-reduce of ``h`` per row
layer, backward one of its gradient per column layer.

    mesh = init_device_mesh("cuda", (8,))
    parallelize_module(model, mesh, tensor_parallel_plan(model, 8))
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from lowrank_ft.errors import ConfigError
from lowrank_ft.nn.forms import plain
from lowrank_ft.nn.guided import guided_layers
from lowrank_ft.nn.lowrank_linear import LowRankLinear

_COLUMN, _ROW = "colwise", "rowwise"
_SPLIT_SIDE = {_COLUMN: "output", _ROW: "input"}
_LEFT_WHOLE = ("colwise_gather_output", "colwise_rep", "embedding_rowwise")  # heads and embeddings: right when whole


class ColumnFactors(ParallelStyle):
    """Whole ``V``; rows of ``U`` and of the bias. Whole input, output split in its last dimension."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer: Any = module
        ColwiseParallel(use_local_output=False)._apply(layer.U, device_mesh)
        if layer.bias is not None:
            layer.bias = nn.Parameter(distribute_tensor(layer.bias.detach(), device_mesh, [Shard(0)]))
        layer.register_forward_hook(_to_local)
        return module


class RowFactors(ParallelStyle):
    """Columns of ``V``; whole ``U`` and bias. Input split in its last dimension, whole output."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer: Any = module
        RowwiseParallel()._apply(layer.V, device_mesh)
        return module


def tensor_parallel_plan(
    model: nn.Module, size: int, roles: Mapping[str, str] | None = None
) -> dict[str, ParallelStyle]:
    """What ``torch.distributed.tensor.parallel.parallelize_module`` takes as its plan.

    In ``model``, layers whose pivoted form cannot be split become plain factors (:func:`lowrank_ft.unpivot`), in place.

    Args:
        model: without guides. Linears that are still dense are split as usual; embeddings and the output head stay
            whole.
        size: how many processes share the model.
        roles: name pattern to ``colwise`` or ``rowwise``, a ``*`` standing for one part of a name; by default what
            transformers knows of the architecture (``model.tp_plan``).

    Raises:
        ConfigError: the roles are not known or not understood, the model has guides, or a width does not divide.
    """
    if any(guided_layers(model)):
        raise ConfigError("the model has guides, which this plan does not split; end guidance first (end_guidance)")
    known: Any = roles if roles is not None else getattr(model, "tp_plan", None)
    if not known:
        raise ConfigError(
            f"transformers has no tensor-parallel plan for {type(model).__name__}; give the roles of its linears, "
            "such as {'model.layers.*.mlp.up_proj': 'colwise', 'model.layers.*.mlp.down_proj': 'rowwise'}"
        )
    _check_heads(model, size)
    plan: dict[str, ParallelStyle] = {}
    for pattern, role in known.items():
        if role in _LEFT_WHOLE:
            continue
        if role not in (_COLUMN, _ROW):
            raise ConfigError(f"{pattern} is to be split as {role!r}; only {_COLUMN} and {_ROW} are supported")
        expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        for name, module in list(model.named_modules()):
            if expression.fullmatch(name):
                plan[name] = _style(name, module, role, size)
                if isinstance(module, LowRankLinear) and module.pivot == _SPLIT_SIDE[role]:
                    model.set_submodule(name, plain(module))
    return plan


def _style(name: str, module: nn.Module, role: str, size: int) -> ParallelStyle:
    layer: Any = module
    if not isinstance(module, LowRankLinear | nn.Linear):
        raise ConfigError(f"{name} is a {type(module).__name__}; linears and factored linears can be split")
    width = layer.out_features if role == _COLUMN else layer.in_features
    if width % size:
        raise ConfigError(f"{name} has {width} features to split, which {size} processes do not divide")
    if isinstance(module, LowRankLinear):
        return ColumnFactors() if role == _COLUMN else RowFactors()
    return ColwiseParallel() if role == _COLUMN else RowwiseParallel()


def _check_heads(model: nn.Module, size: int) -> None:
    config: Any = getattr(model, "config", None)
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, key, None)
        if heads and heads % size:
            raise ConfigError(f"the model has {key}={heads}, which {size} processes do not divide")


def _to_local(module: nn.Module, inputs: Any, output: Any) -> Tensor:
    return output.to_local()
