"""Find the smallest model that keeps a promise about what it loses, on text that nothing is fitted to.

Allocation knows, for every linear and rank, an estimate of what is added to the model's loss. Half of its sum predicts
what a size will lose, up to a factor that depends on the model and on the training after the fit. So: predict with a
factor of 1.5, convert at the size that should just keep the promise, measure, correct the factor, and try again where the
promise is broken or where there is much room left. What is handed out has been measured.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.chains import Batch, run
from lowrank_ft.conversion.convert import convert
from lowrank_ft.conversion.distill import mean_difference
from lowrank_ft.conversion.experts import plan_spectra
from lowrank_ft.conversion.record import ConversionRecord
from lowrank_ft.data.examples import IGNORED
from lowrank_ft.errors import DataError, PlanError, RankError
from lowrank_ft.evaluation.perplexity import predicted_tokens, summed_loss
from lowrank_ft.factorization.plan import Plan, make_plan, reallocate
from lowrank_ft.nn.modes import evaluating

_FACTOR = 1.5  # measured / predicted: 1.5 for SmolLM2-135M at 0.8 after distillation
_TRIES = 3
_MOST = 0.97  # nothing above is worth a conversion
_LEAST = 0.02
_STEP = 0.03  # after a size that broke the promise, the next one is at least this much larger
_ROOM = 0.6  # of the promise: with less used, a smaller size is tried


@dataclass(frozen=True)
class Promise:
    """What may be lost, in nats per token, at most.

    Attributes:
        measure: ``loss`` (of the text itself; perplexity is its exponential) or ``kl`` (to the dense model).
        most: in nats per token.
        shown: how it was asked for, for messages.
    """

    measure: str
    most: float
    shown: str


@dataclass(frozen=True)
class Kept:
    """A converted model that keeps the promise; ``found`` is what it loses, in nats per token."""

    model: nn.Module
    plan: Plan
    record: ConversionRecord
    found: float


def convert_within(
    dense: nn.Module,
    promise: Promise,
    calibration: Calibration,
    method: str,
    which: Mapping[str, Any],
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Kept:
    """Convert copies of ``dense`` until one keeps the promise with little room to spare; ``dense`` stays as it is.

    Args:
        calibration: with held-out batches, by which the promise is judged.
        which: further arguments of :func:`make_plan`: the linears that are factorized.
        say: is told what each try is expected to lose, and what it lost.

    Raises:
        DataError: there is no held-out text.
        PlanError: no size keeps the promise; the message says what the last try lost.
    """
    if not calibration.held_out:
        raise DataError(
            f"{promise.shown} is judged by held-out text, and the calibration data are too few to spare any; give more "
            "(at least 16 sequences)"
        )
    with evaluating(dense):
        spectra = plan_spectra(dense, make_plan(dense, param_ratio=_MOST, **which), calibration, "loss", progress)
        base = mean_loss(dense, calibration.held_out) if promise.measure == "loss" else 0.0
    factor, above, kept, last = _FACTOR, _LEAST, None, ""
    for _ in range(_TRIES):
        ratio = smallest_ratio(dense, spectra, promise.most / factor, which, above)
        if ratio is None or (kept is not None and ratio > kept.plan.param_ratio - _STEP):
            break
        plan, expected = plan_at(dense, spectra, ratio, which)
        say(
            f"{promise.shown}: param ratio {ratio:.2f} should lose {factor * expected:.4f} nats per token of {promise.most:.4f}"
        )
        model = None  # one that broke the promise is gone before the next is made
        model, record = copy.deepcopy(dense), ConversionRecord()
        calibration.importance[model] = calibration.importance[dense]
        convert(model, plan, method=method, calibration=calibration, record=record, progress=progress)
        with evaluating(model), evaluating(dense):
            found = (
                mean_loss(model, calibration.held_out) - base
                if promise.measure == "loss"
                else mean_difference(model, dense, calibration.held_out)
            )
        found = calibration.processes.agreed(found)
        last = f"; at param ratio {ratio:.2f} the model loses {found:.4f} nats per token of held-out text"
        say(
            f"{promise.shown}: param ratio {ratio:.2f} loses {found:.4f}, {'kept' if found <= promise.most else 'broken'}"
        )
        factor = max(found, 0.05 * promise.most) / expected if expected > 0 else factor
        if found > promise.most:
            above = ratio + _STEP
            continue
        kept = Kept(model.to("cpu"), plan, record, found)  # the next one needs the device
        if found > _ROOM * promise.most:
            break
    if kept is None:
        raise PlanError(
            f"no size keeps {promise.shown} ({promise.most:.4f} nats per token){last}; allow more, or try --effort best"
        )
    kept.model.to(next(dense.parameters()).device)
    return kept


def plan_at(
    model: nn.Module, spectra: Mapping[str, Tensor], ratio: float, which: Mapping[str, Any]
) -> tuple[Plan, float]:
    """The plan with the least predicted loss at this size, and that loss, in nats per token.

    Raises:
        RankError: the smallest ranks have more parameters.
    """
    plan = reallocate(make_plan(model, param_ratio=ratio, **which), spectra)
    lost = sum(spectra[n][rank:].sum().item() for n, rank in plan.ranks.items() if n in spectra)
    return plan, lost / 2


def smallest_ratio(
    model: nn.Module, spectra: Mapping[str, Tensor], most: float, which: Mapping[str, Any], above: float
) -> float | None:
    """The smallest param ratio from ``above`` on that is predicted to lose ``most`` at most; None where none does."""

    def keeps(ratio: float) -> bool:
        try:
            return plan_at(model, spectra, ratio, which)[1] <= most
        except RankError:
            return False

    if above > _MOST or not keeps(_MOST):
        return None
    low, high = above, _MOST
    if keeps(low):
        return low
    while high - low > 0.005:
        middle = (low + high) / 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Of a causal language model, in nats per predicted token; padding does not count."""
    total, tokens = 0.0, 0
    for batch in batches:
        labels = batch["input_ids"]
        if (mask := batch.get("attention_mask")) is not None:
            labels = labels.masked_fill(mask == 0, IGNORED)
        logits = run(model, batch).logits
        total += summed_loss(logits, labels.to(logits.device)).item()
        tokens += predicted_tokens(labels)
    return total / max(1, tokens)
