"""Low-rank from initialization on: a fresh model whose linears never were dense.

    W      as the model's own initialization drew it, N(0, 0.02) as a rule
    U, V   its best approximation of rank r, sqrt(s) in each factor        spectral initialization
    guide  U V, not W: at the start it adds nothing that the factors could not do

This is how Wei et al. begin self-guided training (2024, arXiv 2407.09835). With the guide at ``U V`` the model computes
the same at every alpha, up to rounding, so training starts from one function, whatever the schedule.
"""

import warnings
from collections.abc import Mapping

from torch import nn

from lowrank_ft.checkpoints import format as checkpoint_format
from lowrank_ft.conversion.convert import convert
from lowrank_ft.errors import ConfigError, RankError, TargetError, require_choice
from lowrank_ft.factorization.plan import Plan, make_plan
from lowrank_ft.factorization.solvers import working_dtype
from lowrank_ft.factorization.targets import Patterns, block_index, ffn_linears, select_targets
from lowrank_ft.nn import GuidedLowRankLinear, LowRankLinear, lowrank_layers, unfold_experts

FROM_SCRATCH_GUIDES = ("dense",)
"""Only one that trains: from scratch there is no trained weight that a fixed guide could hold."""


def initialize_lowrank(
    model: nn.Module,
    *,
    rank: int | float | None = None,
    param_ratio: float | None = None,
    rank_pattern: Mapping[str, int | float] | None = None,
    target_modules: Patterns | None = None,
    exclude_modules: Patterns | None = None,
    dense_first_block: bool = True,
    guide: str | None = None,
    progress: bool = False,
) -> Plan:
    """Replace linears of a freshly initialized ``model`` by factors to train from scratch, in place.

    Args:
        model: as its class or ``AutoModelForCausalLM.from_config`` made it, on a real device.
        rank: the same rank for all (int), or a fraction of full rank (float in (0, 1]).
        param_ratio: share of the targeted linears' parameters to keep.
        rank_pattern: pattern to rank, for linears that differ.
        target_modules: PEFT's; None means the feed-forward linears of the blocks, ``"all-linear"`` attention's too.
        exclude_modules: PEFT's.
        dense_first_block: keep what is targeted in the first block dense.
        guide: None, or ``"dense"`` for a trainable branch beside the factors that starts at ``U V``.
        progress: show a progress bar on stderr; where that is no terminal, a line each minute.

    Returns:
        The plan that was carried out. What is of full rank stays dense, with a warning.

    Raises:
        ConfigError: another guide, or the model is on the meta device.
        RankError: not exactly one of ``rank`` and ``param_ratio``, one that is out of range, or one that leaves every
            linear dense.
        TargetError: nothing is left to factorize.
        PlanError: the model has factored linears already.
    """
    if guide is not None:
        require_choice("guide of a model from scratch", guide, FROM_SCRATCH_GUIDES)
    if any(p.is_meta for p in model.parameters()):
        raise ConfigError(f"{type(model).__name__} is on the meta device and has no weights; build it on a real one")
    specs = ffn_linears(model) if target_modules is None else select_targets(model, target_modules)
    names = [s.name for s in specs if not (dense_first_block and block_index(model, s.name) == 0)]
    if not names:
        raise TargetError(
            f"all {len(specs)} targeted linears are in the first block, which stays dense; "
            "pass dense_first_block=False or target more"
        )
    plan = make_plan(
        model,
        rank=rank,
        param_ratio=param_ratio,
        rank_pattern=rank_pattern,
        target_modules=names,
        exclude_modules=exclude_modules,
    )
    _warn_about_dense(plan)
    convert(model, plan, progress=progress)
    if (config := getattr(model, "config", None)) is not None:
        # A config that was read from a checkpoint names it, but the weights are not that checkpoint's.
        config.quantization_config = checkpoint_format.quantization_config(
            plan.ranks, stacked=any(p.experts for p in plan.linears)
        )
    if guide is not None:
        unfold_experts(model)
        for name, layer in list(lowrank_layers(model)):
            model.set_submodule(name, guided_by_product(layer, guide))
    return plan


def guided_by_product(layer: LowRankLinear, guide: str = "dense") -> GuidedLowRankLinear:
    """``layer`` with a guide beside it that starts at the product of its factors."""
    work = working_dtype(layer.U.weight.device)
    product = layer.U.weight.detach().to(work) @ layer.V.weight.detach().to(work)
    return GuidedLowRankLinear.from_lowrank(layer, product, guide)


def _warn_about_dense(plan: Plan) -> None:
    dense = [p for p in plan.linears if p.rank is None]
    if len(dense) == len(plan.linears):
        raise RankError(f"every one of the {len(dense)} targeted linears stays dense; lower the rank")
    if dense:
        warnings.warn(
            f"{len(dense)} of {len(plan.linears)} targeted linears stay dense: {dense[0].name}: {dense[0].note}",
            stacklevel=3,
        )
