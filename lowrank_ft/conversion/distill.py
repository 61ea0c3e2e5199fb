"""Train all factors together so that the converted model answers as the dense one does.

    minimize over all U, V    mean over tokens of KL(softmax(dense logits) || softmax(converted logits))

(Hinton et al. 2015, arXiv 1503.02531). Norms and biases may move with the factors. A model without logits is held to its
last hidden states instead, one with a single logit to that, by the squared error relative to their size. Block
refinement stops errors from building up inside a block; this step lets blocks make up for each other, and it knows
which directions of the hidden states the output cares about.

Training on a few texts makes a model forget others. So the same loss is measured on text that is not trained on
before the first step, a few times on the way, and at the end; training stops when it has stopped falling, and the best
state is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.console import progress_bar
from lowrank_ft.conversion.calibration import few_rows, positions
from lowrank_ft.conversion.chains import Batch, answer_of, run, token_mask
from lowrank_ft.conversion.factor_trainer import Best, FactorTrainer
from lowrank_ft.conversion.processes import ONE, Processes
from lowrank_ft.conversion.refine import squared_error
from lowrank_ft.evaluation.divergence import divergence
from lowrank_ft.memory import give_back

_CHECKS = 4
_PATIENCE = 2
_FACTOR = 3
_RATES = [1e-3 / _FACTOR**i for i in reversed(range(7))]
# Steps. The rate search judges one step, and a long run is better at the next higher rate (an encoder, 702 steps).
_LONG = 300
_LEAST_SEARCHED = 4_000  # tokens of the gradient that the rate is found by: of fewer it is noise, and the rate too low
_JUDGES = 4  # of the batches that are trained on, where none is held out
_POSITIONS_AT_ONCE = {"cpu": 512}  # logits of a large vocabulary are by far the largest tensors of a step
_POSITIONS_ELSEWHERE = 2_048


def distill(
    model: nn.Module,
    dense_model: nn.Module,
    batches: Sequence[Batch],
    epochs: float,
    learning_rate: float | None = None,
    seed: int = 0,
    held_out: Sequence[Batch] = (),
    vectors: Sequence[Tensor] = (),
    progress: bool = False,
    processes: Processes = ONE,
) -> tuple[float, float] | None:
    """Train the factors of ``model`` toward ``dense_model``, one batch per step, in place.

    Needs memory for the gradients of the whole model, and 12 bytes per parameter of the factors; and a
    copy of the factors.

    Args:
        learning_rate: at its peak; None to find it by :func:`search_rate`.
        vectors: what is trained beside the factors: scales of norms, biases.
        held_out: batches that are not trained on, by which the best state is chosen; where there are none, a few of
            those that are.
        processes: each with its rows of every batch.

    Returns:
        The loss on the batches by which it was chosen, before and after; None where nothing was trained.

    Raises:
        DivergedError: the loss is no longer a number.
    """
    steps = round(epochs * len(batches))
    if steps == 0:
        return None
    trainer = FactorTrainer(model, steps, learning_rate or 0.0, vectors, processes)
    checks = {round(steps * i / _CHECKS) for i in range(1, _CHECKS + 1)}
    judges = held_out or batches[:_JUDGES]

    def judged() -> float:
        return mean_difference(model, dense_model, judges, processes)

    first = judged()
    best = Best(trainer.masters, first)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(len(batches), generator=generator).tolist()
    if learning_rate is None:
        found = 0
        for i in reversed(order):
            _add_gradient(trainer, model, dense_model, batches[i])
            found += positions(batches[i])
            if processes.total(found) >= _LEAST_SEARCHED:
                break
        trainer.add_up()
        rate = search_rate(trainer, best, judged)
        trainer.learning_rate = min(_RATES[-1], _FACTOR * rate) if steps >= _LONG else rate
    misses = 0
    bar = progress_bar(range(1, steps + 1), desc="distill", unit="step", progress=progress)
    for step in bar:
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        loss = _add_gradient(trainer, model, dense_model, batches[order.pop()])
        trainer.step()
        bar.set_postfix(
            loss=f"{loss:.4f}", held_out=f"{best.loss:.4f}", rate=f"{trainer.learning_rate:.1g}", refresh=False
        )
        if step in checks:
            misses = 0 if best.offer(judged()) else misses + 1
            if misses == _PATIENCE:
                break
    bar.close()
    best.restore()
    trainer.finish()
    return first, best.loss


def search_rate(trainer: FactorTrainer, best: Best, loss: Callable[[], float]) -> float:
    """The learning rate whose first step lowers ``loss`` most, among 1e-3, 3.3e-4, 1.1e-4, ... 1.4e-6.

    A model of a thousand hidden features takes a hundredth of the rate that suits one of two hundred, and one that was
    trained for long less than one that was not. So the rate is measured: one gradient, and a few forward passes.

    Args:
        trainer: with the gradients of one batch, which are gone afterwards; its parameters are left at ``best``.
    """
    found, lowest = _RATES[0], float("inf")
    for rate in _RATES:
        trainer.try_rate(best.kept, rate)
        now = loss()
        if not now < lowest:  # not a number counts as worse
            break
        found, lowest = rate, now
    best.restore()
    trainer.write()
    trainer.optimizer.zero_grad()
    return found


def _add_gradient(trainer: FactorTrainer, model: nn.Module, dense_model: nn.Module, batch: Batch) -> float:
    total = 0.0
    for part, share in _parts(batch, model, trainer.processes):
        with torch.enable_grad():
            # The logits of neither model have a name here, and are gone before the backward pass.
            found = share * difference(run(model, part), torch.no_grad()(run)(dense_model, part), part)
            trainer.add(found)
        total += found.item()
        give_back()
    return trainer.processes.total(total)


@torch.no_grad()
def mean_difference(
    model: nn.Module, dense_model: nn.Module, batches: Sequence[Batch], processes: Processes = ONE
) -> float:
    """The mean over batches of :func:`difference`, which within a batch is a mean over its tokens."""
    total = 0.0
    for batch in batches:
        for part, share in _parts(batch, model, processes):
            total += share * difference(run(model, part), run(dense_model, part), part).item()
    return processes.total(total) / len(batches)


def difference(found: Any, wanted: Any, batch: Batch) -> Tensor:
    """How far the output of a model is from that of another, as a float32 scalar; padding does not count."""
    answer, distribution = answer_of(found)
    mask = token_mask(batch, answer, decoder=True)
    if not distribution:
        return squared_error(answer, answer_of(wanted)[0], mask)
    counted = torch.ones(answer.shape[:-1], dtype=torch.bool, device=answer.device) if mask is None else mask != 0
    return divergence(answer, answer_of(wanted)[0].to(answer.device), counted) / counted.sum().clamp_min(1)


def _parts(batch: Batch, model: nn.Module, processes: Processes) -> Iterator[tuple[Batch, float]]:
    """A batch in parts of a few rows, and the share that each has of the tokens of all processes."""
    parts = few_rows(batch, _POSITIONS_AT_ONCE.get(next(model.parameters()).device.type, _POSITIONS_ELSEWHERE))
    weights = list(map(_weight, parts))
    total = processes.total(sum(weights))
    for part, weight in zip(parts, weights, strict=True):
        yield part, weight / total


def _weight(part: Batch) -> float:
    mask = part.get("decoder_attention_mask", part.get("attention_mask"))
    return float((mask != 0).sum()) if mask is not None else float(len(next(iter(part.values()))))
