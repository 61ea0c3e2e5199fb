"""A plan: which linear gets which rank, and what that saves. Pure arithmetic on names and shapes.

A plan is made from a model on the meta device, so it costs no weights; only ``energy`` needs spectra, and asks for
them through a callable. It can be written as JSON, edited by hand and read back.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lowrank_ft.errors import PlanError, RankError
from lowrank_ft.factorization.allocation import allocate_ranks
from lowrank_ft.factorization.ranks import (
    RANK_MULTIPLE,
    Shape,
    check_fraction,
    dense_parameters,
    factored_parameters,
    rank_for_energy,
    ranks_for_param_ratio,
    resolve_rank,
    trained_parameters,
)
from lowrank_ft.factorization.targets import LinearSpec, Patterns, pattern_value, select_targets
from lowrank_ft.reading import kind_of, read_object

PLAN_VERSION = 1


@dataclass(frozen=True)
class LinearPlan:
    """What happens to one targeted linear.

    Attributes:
        name: dotted path from the root of the model.
        shape: ``(out_features, in_features)``.
        rank: its rank, or None where it stays dense.
        note: why it stays dense; empty otherwise.
        experts: how many matrices of this shape and rank are stacked under this name; 0 for a linear.
    """

    name: str
    shape: Shape
    rank: int | None
    note: str = ""
    experts: int = 0

    @property
    def copies(self) -> int:
        return self.experts or 1

    @property
    def dense_parameters(self) -> int:
        return self.copies * dense_parameters(self.shape)

    @property
    def parameters(self) -> int:
        """Weights as the compact checkpoint has them, without the bias, which does not change."""
        return self.dense_parameters if self.rank is None else self.copies * factored_parameters(self.shape, self.rank)

    @property
    def trained_parameters(self) -> int:
        """Weights while it is trained, as plain ``U`` and ``V``."""
        return self.dense_parameters if self.rank is None else self.copies * trained_parameters(self.shape, self.rank)


@dataclass(frozen=True)
class Plan:
    """Ranks for the targeted linears of one model.

    Attributes:
        linears: one entry per targeted linear, in module order.
        model_parameters: parameters of the whole dense model; tied weights count once.
        rank_pattern: the pattern that was asked for, kept for the record.
        rank_multiple: what the ranks are multiples of where they are chosen, by :func:`make_plan` or :func:`reallocate`.
    """

    linears: tuple[LinearPlan, ...]
    model_parameters: int
    rank_pattern: dict[str, int | float] = field(default_factory=dict)
    rank_multiple: int = RANK_MULTIPLE

    @property
    def ranks(self) -> dict[str, int]:
        """Name to rank of the linears that are factorized."""
        return {p.name: p.rank for p in self.linears if p.rank is not None}

    @property
    def target_parameters(self) -> int:
        return sum(p.dense_parameters for p in self.linears)

    @property
    def factored_parameters(self) -> int:
        return sum(p.parameters for p in self.linears)

    @property
    def trained_parameters(self) -> int:
        return sum(p.trained_parameters for p in self.linears)

    @property
    def param_ratio(self) -> float:
        """Parameters after over parameters before, over the targeted linears (0.6 = 40 % removed)."""
        return self.factored_parameters / self.target_parameters

    @property
    def converted_model_parameters(self) -> int:
        return self.model_parameters - self.target_parameters + self.factored_parameters

    def to_dict(self) -> dict[str, Any]:
        totals = {
            "param_ratio": self.param_ratio,
            "target_parameters": self.target_parameters,
            "factored_parameters": self.factored_parameters,
            "trained_parameters": self.trained_parameters,
            "converted_model_parameters": self.converted_model_parameters,
        }
        return {"plan_version": PLAN_VERSION, **asdict(self), "totals": totals}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """Read a plan back; ``totals`` are derived, so edited ranks need no other edit.

        Raises:
            PlanError: not a plan, of a newer version, or an entry with a rank that its shape does not allow.
        """
        if not isinstance(data, Mapping):
            raise PlanError("this is not a plan; make one with lowrank-ft plan --json")
        if data.get("plan_version") != PLAN_VERSION:
            raise PlanError(f"plan_version is {data.get('plan_version')!r}; this release reads version {PLAN_VERSION}")
        entries = data.get("linears")
        if not isinstance(entries, list):
            raise _garbled("linears", entries, "a list with one entry per linear")
        pattern = data.get("rank_pattern") or {}
        if not isinstance(pattern, dict):
            raise _garbled("rank_pattern", pattern, "an object of ranks")
        linears = tuple(_read_linear(f"linears[{i}]", p) for i, p in enumerate(entries))
        multiple = _read_size("rank_multiple", data.get("rank_multiple", RANK_MULTIPLE))
        plan = cls(linears, _read_size("model_parameters", data.get("model_parameters")), dict(pattern), multiple)
        if not linears:
            raise PlanError("the plan names no linears; make it anew with lowrank-ft plan --json")
        for p in plan.linears:
            if p.rank is not None:
                resolve_rank(p.rank, p.shape, p.name)
        return plan

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read the file that :meth:`save` wrote.

        Raises:
            PlanError: it cannot be read, or as :meth:`from_dict`; the file is named.
        """
        path = Path(path).expanduser()
        data = read_object(path, PlanError)
        try:
            return cls.from_dict(data)
        except (PlanError, RankError) as error:
            raise type(error)(f"{path}: {error}") from None


def _garbled(field: str, value: Any, allowed: str) -> PlanError:
    return PlanError(
        f"the plan has a wrong {field}, which is {kind_of(value)}; it must be {allowed}; "
        "make it anew with lowrank-ft plan --json"
    )


def _read_size(field: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _garbled(field, value, "a whole number of 1 or more")
    return value


def _read_linear(where: str, entry: Any) -> LinearPlan:
    if not isinstance(entry, dict):
        raise _garbled(where, entry, "an object")
    name, shape, rank, note = (entry.get(k) for k in ("name", "shape", "rank", "note"))
    if not isinstance(name, str):
        raise _garbled(f"{where}.name", name, "a text")
    if not isinstance(shape, list) or len(shape) != 2:
        raise _garbled(f"{where}.shape", shape, "a list of two whole numbers")
    if "rank" not in entry:
        raise PlanError(f"the plan has no {where}.rank; write a whole number, or null for dense")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool)):
        raise PlanError(f"{name} has rank {rank!r} in the plan; a rank there is a whole number, or null for dense")
    if not isinstance(note, str | None):
        raise _garbled(f"{where}.note", note, "a text")
    sizes = (_read_size(f"{where}.shape[0]", shape[0]), _read_size(f"{where}.shape[1]", shape[1]))
    experts = entry.get("experts") or 0
    return LinearPlan(name, sizes, rank, note or "", experts and _read_size(f"{where}.experts", experts))


def make_plan(
    model: nn.Module,
    *,
    rank: int | float | None = None,
    param_ratio: float | None = None,
    energy: float | None = None,
    rank_pattern: Mapping[str, int | float] | None = None,
    rank_multiple: int = RANK_MULTIPLE,
    target_modules: Patterns | None = None,
    exclude_modules: Patterns | None = None,
    keep_full_rank: bool = False,
    spectrum: Callable[[LinearSpec], Tensor] | None = None,
) -> Plan:
    """Decide the rank of every targeted linear of ``model`` (which may be on the meta device).

    Args:
        rank: the same rank for all (int), or a fraction of full rank (float in (0, 1]).
        param_ratio: share of the targeted linears' parameters to keep, spread evenly.
        energy: share of every linear's squared singular values to keep; needs ``spectrum``.
        rank_pattern: pattern to rank, for linears that differ; as in PEFT, the first match wins.
        rank_multiple: with ``param_ratio``, ranks are multiples of it, for the device's sake; of a small linear, whose
            rank is below four times this, of a smaller power of two.
        target_modules: PEFT's; None means every linear of the repeated blocks.
        exclude_modules: PEFT's.
        keep_full_rank: factorize at full rank, too, where nothing is saved, and the linear else stays dense.
        spectrum: gives a linear's singular values, descending; of a stack the roots of the sums of the squares.

    Raises:
        RankError: not exactly one of rank, param_ratio, energy was given, or one is out of range; or the multiple is.
        TargetError: patterns that match nothing (see :func:`select_targets`).
    """
    given = {"rank": rank, "param_ratio": param_ratio, "energy": energy}
    chosen = [k for k, v in given.items() if v is not None]
    if len(chosen) != 1:
        raise RankError(
            "give exactly one size: rank, param_ratio or energy (--rank, --param-ratio, --energy); found "
            f"{' and '.join(chosen) or 'none'}"
        )
    if rank_multiple < 1:
        raise RankError(f"rank_multiple is {rank_multiple}; it must be 1 or more")
    specs = select_targets(model, target_modules, exclude_modules)
    pattern = dict(rank_pattern or {})
    overridden = {s.name: pattern_value(s.name, pattern) for s in specs}
    for key in pattern:
        if not any(pattern_value(s.name, {key: 1}) for s in specs):
            raise RankError(f"rank_pattern {key!r} matches none of the {len(specs)} targeted linears")
    free = [s for s in specs if overridden[s.name] is None]

    ranks = {s.name: resolve_rank(v, s.shape, s.name) for s in specs if (v := overridden[s.name]) is not None}
    if rank is not None:
        ranks |= {s.name: resolve_rank(rank, s.shape, s.name) for s in free}
    elif param_ratio is not None:
        copies = [s.experts or 1 for s in free]
        found = ranks_for_param_ratio([s.shape for s in free], param_ratio, rank_multiple, copies)
        ranks |= dict(zip([s.name for s in free], found, strict=True))
    else:
        assert energy is not None
        check_fraction("energy", energy)
        if spectrum is None:
            raise RankError("energy needs the weights' spectra, and this plan was made from shapes alone")
        ranks |= {s.name: rank_for_energy(spectrum(s).tolist(), energy) for s in free}

    linears = tuple(_linear_plan(s, ranks[s.name], keep_full_rank) for s in specs)
    return Plan(linears, count_parameters(model), pattern, rank_multiple)


def shape_text(p: LinearPlan) -> str:
    """``out x in``, and of a stack how many."""
    size = f"{p.shape[0]} x {p.shape[1]}"
    return f"{p.experts} of {size}" if p.experts else size


def reallocate(plan: Plan, squared_spectra: Mapping[str, Tensor]) -> Plan:
    """Spend the parameters of ``plan`` anew, where they lose the least (see :func:`allocate_ranks`).

    Linears that a ``rank_pattern`` named, or that have no spectrum, keep their rank, and do not count in the budget.

    Args:
        squared_spectra: ``s_i^2 (min(out, in),)`` by name, descending, in units of loss.

    Raises:
        RankError: the budget is below what the smallest ranks need.
    """
    free = [p for p in plan.linears if p.name in squared_spectra and pattern_value(p.name, plan.rank_pattern) is None]
    if not free:
        return plan
    budget = sum(p.parameters for p in free)
    ranks = allocate_ranks(
        [p.shape for p in free],
        [squared_spectra[p.name].numpy() for p in free],
        budget,
        budget / sum(p.dense_parameters for p in free),
        plan.rank_multiple,
        copies=[p.copies for p in free],
    )
    chosen = dict(zip([p.name for p in free], ranks, strict=True))
    notes = {n: "worth more dense than factored; kept dense" for n, r in chosen.items() if r is None}
    linears = tuple(
        replace(p, rank=chosen[p.name], note=notes.get(p.name, "")) if p.name in chosen else p for p in plan.linears
    )
    return replace(plan, linears=linears)


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model; a weight that is tied, or declared tied (as on the meta device), counts once.

    One that bitsandbytes has packed in 4 bits counts as the matrix it was, as in transformers' ``num_parameters``.
    """
    tied_to = dict(getattr(model, "all_tied_weights_keys", None) or {})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    counted = {id(p): _unpacked(p) for name, p in parameters.items() if tied_to.get(name) not in parameters}
    return sum(counted.values())


def _unpacked(parameter: nn.Parameter) -> int:
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else math.prod(shape)


def _linear_plan(spec: LinearSpec, rank: int, keep_full_rank: bool) -> LinearPlan:
    if rank < min(spec.shape) or keep_full_rank:
        return LinearPlan(spec.name, spec.shape, rank, experts=spec.experts)
    return LinearPlan(spec.name, spec.shape, None, f"rank {rank} is full rank; kept dense", spec.experts)
