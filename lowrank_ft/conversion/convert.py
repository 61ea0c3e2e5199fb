"""Convert a model in memory: dense linears become factored ones, and back.

    convert          W        -> U, V             (plus a guide that holds what U V dropped, to fine-tune with)
    attach_guides    U, V, W  -> U, V and a guide (a compact checkpoint that goes on training)
    merge            U, V     -> W = U V          (a plain dense model again)

All work in place, linear by linear; all need torch alone. Without calibration data, memory grows by one linear at a
time; with them, see :mod:`lowrank_ft.conversion.blockwise` and :mod:`lowrank_ft.conversion.distill`.
"""

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.checkpoints.format import describe_in_config
from lowrank_ft.conversion.blockwise import METHODS, convert_blocks, truncate_linears
from lowrank_ft.conversion.calibration import Calibration, default_method
from lowrank_ft.conversion.chains import block_of
from lowrank_ft.conversion.distill import distill
from lowrank_ft.conversion.experts import expert_counts, fold_records, one_by_one, plan_spectra, stacks_of
from lowrank_ft.conversion.factor_trainer import factors_of, vectors_of
from lowrank_ft.conversion.processes import ONE, Processes
from lowrank_ft.conversion.record import ConversionRecord
from lowrank_ft.errors import ConfigError, PlanError, require_choice
from lowrank_ft.factorization.allocation import ALLOCATIONS
from lowrank_ft.factorization.plan import Plan, make_plan, reallocate
from lowrank_ft.factorization.ranks import RANK_MULTIPLE
from lowrank_ft.factorization.solvers import singular_values
from lowrank_ft.factorization.targets import (
    LinearSpec,
    Patterns,
    find_linears,
    is_linear,
    refuse_offloaded,
    refuse_tied,
)
from lowrank_ft.nn import GuidedLowRankLinear, check_guide_bits, fold_experts, stored_form, unfold_experts
from lowrank_ft.nn.modes import evaluating
from lowrank_ft.nn.replace import dense_weight

_NO_MEMORY = (
    "end-to-end distillation does not fit into the device's memory; the factors are what block refinement makes them "
    "(try fewer tokens per text, another device, or --distill-epochs 0)"
)


def convert(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    rank: int | float | None = None,
    param_ratio: float | None = None,
    energy: float | None = None,
    rank_pattern: Mapping[str, int | float] | None = None,
    rank_multiple: int = RANK_MULTIPLE,
    target_modules: Patterns | None = None,
    exclude_modules: Patterns | None = None,
    guide: str | None = None,
    guide_bits: int | None = None,
    method: str | None = None,
    calibration: Calibration | None = None,
    allocation: str | None = None,
    record: ConversionRecord | None = None,
    progress: bool = False,
    processes: Processes = ONE,
) -> Plan:
    """Replace linears of ``model`` by their factors, in place.

    Args:
        model: a dense model. Parameters that are not factorized keep their identity, and matrices their values. Scales
            of norms and biases in the converted blocks are trained beside the factors, where factors are trained, and
            no guide is asked for.
        plan: what to do; without one it is made here from ``rank``, ``param_ratio`` or ``energy`` and the patterns.
        guide: None for the deployed layers, or one of ``GUIDES`` to keep a dense branch for fine-tuning. Experts with
            guides stay unfolded, a guided layer for each expert, until they are saved.
        guide_bits: 4 to store a ``residual`` guide in 4 bits; None for the dtype of the model. 4 needs bitsandbytes, on
            the model's device and on the one that it is trained on.
        method: how the factors are found, one of ``METHODS``; by default what the calibration says
            (``activation``), and ``svd`` without one.
        calibration: data and settings for everything but ``svd`` alone: fitting, refinement, distillation.
        allocation: how ranks share the budget of a plan that is made here, one of ``ALLOCATIONS``; by default ``loss``
            for a ``param_ratio`` with calibration data, and ``uniform`` otherwise.
        record: is filled with what was lost in each linear and block.
        progress: show progress bars on stderr; where that is no terminal, a line each minute.
        processes: who shares the work, where there are no calibration data to say so.

    Returns:
        The plan that was carried out.

    Raises:
        RankError, TargetError, PlanError: see :func:`make_plan`; or the plan does not fit this model.
        ConfigError: a method or an allocation needs calibration data, and there are none; or the guide cannot be
            stored in ``guide_bits``, or not on this device.
        MissingPackageError: ``guide_bits`` needs bitsandbytes.
        NonFiniteError: a weight or an activation holds NaN or infinity; the message names it. Modules before it are
            converted already.
        DivergedError: refinement or distillation failed.
    """
    method = method or default_method(calibration)
    require_choice("method", method, METHODS)
    if calibration is None and method != "svd":
        raise ConfigError(f"method {method} needs calibration data; give some, or use method svd, which needs none")
    check_guide_bits(guide, guide_bits, next(model.parameters()).device)
    if stored_form(model)[0]:
        raise PlanError("the model has factored linears already; convert the dense model, or merge this one first")
    if plan is None:
        plan = make_plan(
            model,
            rank=rank,
            param_ratio=param_ratio,
            energy=energy,
            rank_pattern=rank_pattern,
            rank_multiple=rank_multiple,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            spectrum=spectrum_of(model),
        )
        plan = allocate(
            model, plan, allocation or default_allocation(param_ratio, calibration is not None), calibration, progress
        )
    elif any(v is not None for v in (rank, param_ratio, energy, rank_pattern, target_modules, exclude_modules)):
        raise PlanError("a plan already says which linears get which rank; give the plan or the options, not both")
    elif allocation is not None:
        raise PlanError("a plan already says which linears get which rank; leave the allocation out")
    check_plan(plan, model)
    unfold_experts(model, stacks_of(plan))
    each = one_by_one(plan)
    for name in each.ranks:
        refuse_offloaded(model.get_submodule(name), name)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    weights = {n: dense_weight(model.get_submodule(n)) for n in each.ranks} if guide is not None else {}
    if calibration is None:
        truncate_linears(model, each.ranks, record, processes, progress)
    else:
        processes = calibration.processes
        if guide is not None:  # with the dense branch, the layers give exactly what they gave before
            calibration = replace(calibration, train_vectors=False)
        _fit(model, each, method, calibration, record, progress)
    for name in list(weights):
        layer: Any = model.get_submodule(name)
        weight = weights.pop(name)  # the guide is a copy; so only one linear at a time is in memory twice
        model.set_submodule(name, GuidedLowRankLinear.from_lowrank(layer, weight, str(guide), guide_bits))
    _freeze_again(model, frozen)
    if guide is None:
        fold_experts(model)
    if record is not None:
        record.gather(processes, each.ranks)
        record.linears = fold_records(record.linears, expert_counts(plan))
    describe_in_config(model)
    return plan


def _freeze_again(model: nn.Module, frozen: set[str]) -> None:
    """What was frozen before stays so; the factors of a frozen weight are frozen, too."""
    for name, parameter in model.named_parameters():
        dense = re.sub(r"\.(U|V|guide)\.weight$", ".weight", name)
        if name in frozen or dense in frozen:
            parameter.requires_grad_(False)


def default_allocation(param_ratio: float | None, calibrated: bool) -> str:
    """``loss`` for a budget with data to weigh linears by; a rank that was asked for is given to all."""
    return "loss" if calibrated and param_ratio is not None else "uniform"


def allocate(
    model: nn.Module, plan: Plan, allocation: str, calibration: Calibration | None, progress: bool = False
) -> Plan:
    """The plan with its budget spent as ``allocation`` says; ``uniform`` leaves it as it is.

    Raises:
        ConfigError: the allocation needs calibration data.
        RankError: the budget is below what the smallest ranks need.
    """
    require_choice("allocation", allocation, ALLOCATIONS)
    if allocation == "uniform":
        return plan
    if calibration is None:
        raise ConfigError(f"allocation {allocation} needs calibration data; give some, or use allocation uniform")
    with evaluating(model):
        return spend(plan, plan_spectra(model, plan, calibration, allocation, progress))


def spend(plan: Plan, spectra: Mapping[str, Tensor]) -> Plan:
    """The plan with its budget spent by these spectra (:func:`squared_spectra`); a warning says which linears have none.

    Raises:
        RankError: the budget is below what the smallest ranks need.
    """
    names = [p.name for p in plan.linears]
    unreached = [name for name in names if name not in spectra]
    if unreached:
        warnings.warn(
            f"the calibration data do not reach {len(unreached)} of {len(names)} linears (the first is {unreached[0]}), so "
            "their importance is not known; they get ranks by their shapes, and are factorized by plain SVD. Give "
            "data that reach them, or leave them dense with --exclude-modules",
            stacklevel=2,
        )
    return reallocate(plan, spectra)


def _fit(
    model: nn.Module,
    plan: Plan,
    method: str,
    calibration: Calibration,
    record: ConversionRecord | None,
    progress: bool,
) -> None:
    with evaluating(model):  # dropout would be noise in what the factors are fitted to
        alone = calibration.processes.count == 1  # others would wait for one that leaves a stage out
        dense = _copy_for_distillation(model, plan, alone) if calibration.distill_epochs > 0 else None
        convert_blocks(model, plan.ranks, calibration, method, record, progress)
        if dense is None:
            return
        blocks = dict.fromkeys(b for n in plan.ranks if (b := block_of(model, n)))
        vectors = vectors_of(map(model.get_submodule, blocks)) if calibration.train_vectors else []
        accelerator = next(model.parameters()).device.type != "cpu"  # a CPU without memory ends the process instead
        trained = [*factors_of(model), *vectors] if accelerator else []
        fitted = [(p, p.detach().to("cpu", copy=True)) for p in trained]
        try:
            losses = distill(
                model, dense, calibration.distilled, calibration.distill_epochs, calibration.distill_learning_rate,
                calibration.seed, calibration.judging, vectors, progress, calibration.processes,
            )  # fmt: skip
        except torch.OutOfMemoryError:
            if not alone:
                raise
            warnings.warn(_NO_MEMORY, stacklevel=3)
            for parameter, value in fitted:
                parameter.data.copy_(value)
                parameter.grad = None
            return
    if record is not None and losses is not None:
        record.add_distillation(*losses)


def _copy_for_distillation(model: nn.Module, plan: Plan, alone: bool) -> nn.Module | None:
    """The dense model once more; what the conversion does not touch, such as embeddings, is shared."""
    factored = {f"{name}.weight" for name in plan.ranks}
    shared = {id(p): p for n, p in model.named_parameters() if p.dim() > 1 and n not in factored}
    try:
        return copy.deepcopy(model, shared)
    except torch.OutOfMemoryError:
        if not alone:
            raise
        warnings.warn(_NO_MEMORY, stacklevel=4)
        return None


def spectrum_of(model: nn.Module) -> Callable[[LinearSpec], Tensor]:
    """For plans by energy: the singular values of a linear of ``model``."""

    def spectrum(spec: LinearSpec) -> Tensor:
        if spec.experts:
            stack = model.get_parameter(spec.name)
            refuse_offloaded(stack, spec.name)
            values = [singular_values(w, f"{spec.name}[{e}]") for e, w in enumerate(stack.detach())]
            return torch.stack(values).square().sum(0).sqrt()
        module = model.get_submodule(spec.name)
        refuse_offloaded(module, spec.name)
        return singular_values(dense_weight(module), f"{spec.name}.weight")

    return spectrum


def check_plan(plan: Plan, model: nn.Module) -> None:
    """Raise a PlanError unless every linear of the plan is in the model, dense, and of the planned shape."""
    modules = dict(model.named_modules())
    stacks = {s.name: s for s in find_linears(model) if s.experts}
    for p in plan.linears:
        if (stack := stacks.get(p.name)) is not None:
            if (stack.shape, stack.experts) != (p.shape, p.experts):
                raise PlanError(
                    f"{p.name} is {stack.experts} experts of {stack.shape} in the model and {p.experts} of {p.shape} in "
                    "the plan; make the plan from this model"
                )
            continue
        module = modules.get(p.name)
        if module is None or not is_linear(module) or p.experts:
            found = "no such module" if module is None else type(module).__name__
            raise PlanError(f"the plan names {p.name}, but the model has {found} there; make the plan from this model")
        if tuple(dense_weight(module).shape) != p.shape:
            raise PlanError(f"{p.name} is {tuple(dense_weight(module).shape)} in the model and {p.shape} in the plan")
    refuse_tied(model, list(plan.ranks))
