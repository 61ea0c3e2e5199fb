"""Experts in a conversion: each is fitted by itself, as a linear, and all of a stack get the same rank.

Inside a conversion, stacks that are factored are unfolded (:mod:`lowrank_ft.nn.unfolded`): a linear for each expert, which
receives the tokens that the router sends it. These may be few, and moments of few tokens are far from those of all text.
So the regression is damped by ``width of the inputs / tokens``, and below an eighth of the width the weight alone decides.
tests/benchmarks/moe.py measures both: with the damping of other linears, experts that were fitted to half as many tokens as
they are wide are worse than by plain SVD, and with this one they are better from an eighth on.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.chains import within
from lowrank_ft.conversion.moments import Moments
from lowrank_ft.conversion.record import LinearRecord
from lowrank_ft.conversion.sensitivity import squared_spectra
from lowrank_ft.factorization.plan import Plan
from lowrank_ft.nn import UnfoldedExperts, fold_experts, unfold_experts

LEAST_SHARE = 0.125
"""Tokens that an expert has to receive to be fitted to them, as a share of the width of its inputs."""


def one_by_one(plan: Plan) -> Plan:
    """The plan with an entry for each expert in place of each stack, ``<stack>.0``, ``<stack>.1``, ..."""
    linears = []
    for p in plan.linears:
        each = [replace(p, name=f"{p.name}.{e}", experts=0) for e in range(p.experts)]
        linears += each or [p]
    return replace(plan, linears=tuple(linears))


def stacks_of(plan: Plan) -> list[str]:
    """Names of the stacks that the plan factorizes."""
    return [p.name for p in plan.linears if p.experts and p.rank is not None]


def expert_counts(plan: Plan) -> dict[str, int]:
    """How many experts each stack of the plan has, by name."""
    return {p.name: p.experts for p in plan.linears if p.experts}


def part_of(plan: Plan, block: str) -> Plan:
    """The plan of what lies in one block."""
    return replace(plan, linears=tuple(p for p in plan.linears if within(p.name, block)))


def is_expert(model: nn.Module, name: str) -> bool:
    """Whether the linear ``name`` is one of an unfolded stack."""
    owner = name.rpartition(".")[0].rpartition(".")[0]
    return isinstance(model.get_submodule(owner), UnfoldedExperts)


def too_few(moments: Moments) -> bool:
    """Whether an expert received too few tokens to be fitted to them."""
    return moments.inputs is not None and moments.tokens < LEAST_SHARE * len(moments.inputs)


def expert_damping(moments: Moments, damping: float) -> float:
    """As a share of the mean input power: what other linears have, or more where the tokens are few."""
    width = 0 if moments.inputs is None else len(moments.inputs)
    return max(damping, width / max(1, moments.tokens))


def warn_of_few(names: Sequence[str], block: str, tokens: int) -> None:
    """Warn that the experts ``names`` of a block are factorized by their weights alone, because each got at most ``tokens``."""
    warnings.warn(
        f"{len(names)} matrices of experts of {block} (the first is {names[0]}) received {tokens} calibration tokens or "
        "less, too few to be fitted to; factorized by plain SVD. Give more text with --calibration-tokens",
        stacklevel=2,
    )


@contextmanager
def unfolded(model: nn.Module, plan: Plan) -> Iterator[Plan]:
    """Inside, all stacks of the plan are linears, named as in the plan that is given out; afterwards they are stacks."""
    unfold_experts(model, [p.name for p in plan.linears if p.experts])
    try:
        yield one_by_one(plan)
    finally:
        fold_experts(model)


def plan_spectra(
    model: nn.Module, plan: Plan, calibration: Calibration, allocation: str, progress: bool = False
) -> dict[str, Tensor]:
    """:func:`squared_spectra` of the linears and stacks of a plan; of a stack, the sum over its experts."""
    with unfolded(model, plan) as each:
        spectra = squared_spectra(model, [p.name for p in each.linears], calibration, allocation, progress)
    return summed(plan, spectra)


def summed(plan: Plan, spectra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Squared spectra by the names of the plan, from those of single experts. What has none is left out."""
    found: dict[str, Tensor] = {}
    for p in plan.linears:
        names = [f"{p.name}.{e}" for e in range(p.experts)] or [p.name]
        known = [spectra[n] for n in names if n in spectra]
        if known:
            found[p.name] = torch.stack(known).sum(0)
    return found


def fold_records(records: Mapping[str, LinearRecord], stacks: Mapping[str, int]) -> dict[str, LinearRecord]:
    """One record for each stack in place of those of its experts: root mean squares over the experts.

    Args:
        stacks: how many experts each has, by name.
    """
    folded = dict(records)
    for stack, experts in stacks.items():
        members = [r for e in range(experts) if (r := folded.pop(f"{stack}.{e}", None)) is not None]
        if not members:
            continue
        spectrum = torch.tensor([r.spectrum for r in members], dtype=torch.float64).square().mean(0).sqrt().tolist()
        errors = [[getattr(r, key) for r in members] for key in ("weight_error", "output_error")]
        folded[stack] = LinearRecord(
            tuple(float(f"{s:.6g}") for s in spectrum), members[0].spectrum_index, *map(_root_mean_square, errors)
        )
    return folded


def _root_mean_square(values: Sequence[float | None]) -> float | None:
    known = [v * v for v in values if v is not None]
    return (sum(known) / len(known)) ** 0.5 if known else None
