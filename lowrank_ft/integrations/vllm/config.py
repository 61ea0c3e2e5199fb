"""vLLM's quantization config of the method ``lowrank``: what ``config.json`` of a compact checkpoint says.

vLLM asks it, linear by linear, how each is made (:meth:`LowRankConfig.get_quant_method`). It keeps book of the factored
linears that were asked for, so that one that vLLM has no place for is named before any weight is read.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from lowrank_ft.checkpoints.format import QUANT_METHOD
from lowrank_ft.integrations.vllm.entry import check_entry, refuse_transposed, unserved
from lowrank_ft.integrations.vllm.method import LowRankLinearMethod
from lowrank_ft.integrations.vllm.plan import Piece, Split, part_names, plan_layer


@register_quantization_config(QUANT_METHOD)
class LowRankConfig(QuantizationConfig):
    """The ranks and forms of a compact checkpoint, in vLLM's names.

    Args:
        ranks: of every factored linear.
        pivots: the side of those that are pivoted.
    """

    def __init__(self, ranks: dict[str, int], pivots: dict[str, str]) -> None:
        super().__init__()
        self.ranks, self.pivots = ranks, pivots
        self._claimed: set[str] = set()
        self._checked = self._in_stages = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LowRankConfig":
        check_entry(config)
        return cls(dict(config.get("ranks") or {}), dict(config.get("pivots") or {}))

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1  # plain products: whatever vLLM runs on

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.ranks = hf_to_vllm_mapper.apply_dict(self.ranks)
        self.pivots = hf_to_vllm_mapper.apply_dict(self.pivots)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        refuse_transposed(getattr(hf_config, "model_type", None), self.ranks)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if not isinstance(layer, LinearBase):
            if isinstance(layer, VocabParallelEmbedding | RoutedExperts):
                inside = next((n for n in self.ranks if n == prefix or n.startswith(f"{prefix}.")), None)
                if inside:
                    raise unserved(inside, f"it is run by a {type(layer).__name__}")
            return None
        config = get_current_vllm_config_or_none()  # set while vLLM builds the model, not while it reads weights
        self._in_stages = config is not None and config.parallel_config.pipeline_parallel_size > 1
        names = [
            n for n in dict.fromkeys([prefix, *part_names(prefix, self.packed_modules_mapping)]) if n in self.ranks
        ]
        self._claimed.update(names)
        return LowRankLinearMethod(self, prefix) if names else UnquantizedLinearMethod()

    def plan(self, prefix: str, split: Split) -> list[Piece]:
        """The pieces of a linear that has factored ones."""
        pieces = plan_layer(prefix, self.ranks, self.pivots, self.packed_modules_mapping, split)
        assert pieces is not None
        return pieces

    def refuse_unclaimed(self) -> None:
        """Raise a CheckpointError if a factored linear has no place in the model that vLLM has built."""
        if self._checked:
            return
        self._checked = True
        if self._in_stages:
            return  # the other layers are in other processes
        left = [n for n in self.ranks if n not in self._claimed]
        if left:
            raise unserved(left[0], "vLLM's model has no linear of that name")
