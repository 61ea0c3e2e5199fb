"""The shape of a training checkpoint for a model that is about to read it: no calibration, no decomposition."""

from pathlib import Path

import torch
from torch import nn

from lowrank_ft.checkpoints.format import describe_in_config
from lowrank_ft.errors import TrainingStateError
from lowrank_ft.factorization.solvers import Factors
from lowrank_ft.factorization.targets import find_linears, is_linear
from lowrank_ft.nn import GuidedLowRankLinear, fold_experts, lowrank_layers, unfold_experts
from lowrank_ft.nn.replace import dense_weight, factorized
from lowrank_ft.reading import kind_of, read_object


def shape_factors(model: nn.Module, checkpoint: Path) -> None:
    """Factors of zeros in the place of every dense linear that is factored in ``checkpoint``, with its ranks.

    Raises:
        TrainingStateError: the config beside the checkpoint has no ranks, or they do not fit the model.
    """
    path = checkpoint / "config.json"
    entry = read_object(path, TrainingStateError).get("quantization_config")
    ranks = entry.get("ranks") if isinstance(entry, dict) else None
    if not isinstance(ranks, dict) or not ranks:
        raise TrainingStateError(f"{path}: ranks of the checkpoint are {kind_of(ranks)}; name one that finetune wrote")
    stacks = {s.name: s.experts for s in find_linears(model) if s.experts and s.name in ranks}
    unfold_experts(model, stacks)
    ranks = {one: rank for name, rank in ranks.items() for one in _each(name, stacks.get(name, 0))}
    modules = dict(model.named_modules())
    for name, rank in ranks.items():
        if (dense := modules.get(name)) is None or not is_linear(dense):
            raise TrainingStateError(f"{path} names {name}, which this model lacks; resume with the same --model")
        rows, columns = dense_weight(dense).shape
        if not isinstance(rank, int) or not 1 <= rank <= min(rows, columns):
            raise TrainingStateError(
                f"{path}: the rank of {name} is {rank!r:.60}, and its linear is {rows} x {columns} in this model; "
                "resume with the same --model"
            )
        zeros = dense_weight(dense).new_zeros
        model.set_submodule(name, factorized(dense, Factors(zeros(rows, rank), zeros(rank, columns))))
    fold_experts(model)
    describe_in_config(model)


def _each(name: str, experts: int) -> list[str]:
    return [f"{name}.{e}" for e in range(experts)] or [name]


def shape_guides(model: nn.Module, guide: str, guide_bits: int | None = None) -> None:
    """Guides of zeros beside all factors. A checkpoint of the guided phase holds their values, packed ones as they are.

    Experts are unfolded, as they are in a run with guides to its end.
    """
    unfold_experts(model)
    for name, layer in list(lowrank_layers(model)):
        zeros = torch.zeros(layer.out_features, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
        model.set_submodule(name, GuidedLowRankLinear.from_lowrank(layer, zeros, guide, guide_bits))
