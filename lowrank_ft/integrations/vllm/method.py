"""How vLLM makes, fills and runs a linear of a compact checkpoint.

One of vLLM's linears holds a :class:`~lowrank_ft.integrations.vllm.pieces.Stored` for each linear of the checkpoint that
it packs. vLLM finds tensors by name, so placeholders named ``U``, ``V``, ``order`` and ``weight`` pass what they are given
on to the right piece. Over several processes::

    column layer (qkv, gate_up)    h = V x      whole V, on every process
                                   y_p = U_p h  rows of U
    row layer (o, down)            h = sum over p of V_p x_p    all-reduce of h, and not of y: rank numbers per token
                                   y = U h      whole U, on every process
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.utils import set_weight_attrs

from lowrank_ft.errors import CheckpointError
from lowrank_ft.integrations.vllm.pieces import Matrix, Stored
from lowrank_ft.integrations.vllm.plan import Split

_PLACE = {"q": 0, "k": 1, "v": 2}


class LowRankLinearMethod(LinearMethodBase):
    """Of one linear, some of whose parts are factored.

    Args:
        config: vLLM's view of the checkpoint, a ``LowRankConfig``.
        prefix: what vLLM calls the linear.
    """

    def __init__(self, config: Any, prefix: str) -> None:
        self.config, self.prefix = config, prefix
        self.dense = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        split = _split(layer, input_size_per_partition, output_partition_sizes, input_size)
        pieces = self.config.plan(self.prefix, split)
        layer.pieces = nn.ModuleList(Stored(piece, params_dtype) for piece in pieces)
        for name in ("U", "V"):
            holder = Matrix((0,), params_dtype)
            self._route(layer, name, holder.weight)
            setattr(layer, name, holder)
        layer.order = nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False)
        # Some models ask a linear for the type or device of its weight.
        layer.weight = nn.Parameter(torch.zeros(1, dtype=params_dtype), requires_grad=False)
        self._route(layer, "order", layer.order)
        self._route(layer, "weight", layer.weight)
        made: Any = layer
        made.sums_middle = _sums_middle(layer)
        if made.sums_middle:
            made.reduce_results = False  # h is summed here, and y is whole then

    def _route(self, layer: nn.Module, part: str, placeholder: nn.Parameter) -> None:
        def load(_: nn.Parameter, tensor: Tensor, shard: str | int | None = None) -> None:
            self.config.refuse_unclaimed()
            self._piece(layer, shard).load(part, tensor)

        set_weight_attrs(placeholder, {"weight_loader": load})

    def _piece(self, layer: Any, shard: str | int | None) -> Stored:
        place = 0 if shard is None and len(layer.pieces) == 1 else _PLACE.get(str(shard), shard)
        if not isinstance(place, int) or place >= len(layer.pieces):
            raise CheckpointError(
                f"{self.prefix} is one tensor for {len(layer.pieces)} linears in the weights, part {shard!r}, and not in "
                "config.json; serve the dense checkpoint that lowrank-ft merge writes"
            )
        return layer.pieces[place]

    def process_weights_after_loading(self, layer: Any) -> None:
        for stored in layer.pieces:
            if missing := stored.missing():
                raise CheckpointError(
                    f"the checkpoint has no {' and no '.join(missing)} of {stored.piece.name}, which config.json lists; "
                    "copy it again, or convert the model again"
                )
            for matrix in stored.matrices.values():
                self.dense.process_weights_after_loading(matrix)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if layer.sums_middle:
            stored = layer.pieces[0]
            h = tensor_model_parallel_all_reduce(stored.middle(x, self.dense.apply))
            y = stored.outputs(h, self.dense.apply)
            # vLLM gives the bias to one process of those whose outputs it would sum.
            bias = None if layer.skip_bias_add else layer.bias
        else:
            parts = [stored(x, self.dense.apply) for stored in layer.pieces]
            y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if bias is None else y + bias


def _split(layer: Any, inputs: int, outputs: list[int], all_inputs: int) -> Split:
    if isinstance(layer, ColumnParallelLinear):
        replicas: tuple[int, ...] = (1,) * len(outputs)
        if isinstance(layer, QKVParallelLinear):
            if len(outputs) != len(_PLACE):
                raise CheckpointError(
                    f"{layer.prefix} is a {type(layer).__name__}, whose parts this plugin does not know; serve the dense "
                    "checkpoint that lowrank-ft merge writes"
                )
            replicas = (1, layer.num_kv_head_replicas, layer.num_kv_head_replicas)
        return Split(tuple(outputs), inputs, all_inputs, layer.tp_size, layer.tp_rank, 0, replicas)
    input_rank = layer.tp_rank if isinstance(layer, RowParallelLinear) else 0
    return Split(tuple(outputs), inputs, all_inputs, input_rank=input_rank)


def _sums_middle(layer: Any) -> bool:
    """Whether h is summed over processes instead of y: the same sum in fewer numbers.

    Not where the model sums later itself, and not with LoRA, whose wrapper adds its own share before the sum.
    """
    if not isinstance(layer, RowParallelLinear) or layer.tp_size == 1 or not layer.reduce_results:
        return False
    config = get_current_vllm_config_or_none()
    return config is None or config.lora_config is None
