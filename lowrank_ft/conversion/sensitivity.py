"""What a rank is worth in each linear, and what each of its outputs is worth.

Squared spectra, weighted by a linear's inputs and by how much its outputs matter:

    energy    s_i^2 of  W A^1/2, over their sum                A = mean over tokens of x x^T
    loss      s_i^2 of  G^1/2 W A^1/2                          G = diag(mean over tokens of a squared gradient)

The gradient is that of the model's own loss at the linear's output. The tail of the second is the second-order estimate
of what truncation adds to the loss: the Fisher information in its Kronecker-factored form (Martens and Grosse 2015,
arXiv 1503.05671), with a diagonal output side. The fit of the factors has the same weights. The loss is the negative
log-likelihood of labels that the model draws itself, as the Fisher information wants it; a model without logits, or
with one, takes a random projection of its output. The tail of the first is the share of a linear's output that is lost,
all linears counting the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ft.console import progress_bar
from lowrank_ft.conversion.calibration import Calibration, few_rows
from lowrank_ft.conversion.chains import Batch, answer_of, block_of, run, token_mask
from lowrank_ft.conversion.moments import Moments
from lowrank_ft.conversion.processes import ONE, Processes
from lowrank_ft.conversion.received import dense_moments
from lowrank_ft.errors import require_choice
from lowrank_ft.factorization.solvers import weighted_singular_values, working_dtype
from lowrank_ft.memory import give_back
from lowrank_ft.nn.replace import dense_weight

SENSITIVITY_TOKENS = 8_192
"""Tokens of the moments that only weigh linears against each other."""
GRADIENT_TOKENS = 4_096
"""Tokens of the gradients, of which each linear needs no more than the mean square."""
_TINY = torch.finfo(torch.float64).tiny
_POSITIONS_AT_ONCE = 512
"""Of the gradients: what the backward pass needs, and logits of a large vocabulary, are most of the memory then."""
_MOMENT_BYTES = 2**30
"""Of moments that are collected in one run of the model; where more are wanted, there are more runs."""


def squared_spectra(
    model: nn.Module, names: Sequence[str], calibration: Calibration, allocation: str, progress: bool = False
) -> dict[str, Tensor]:
    """``s_i^2 (min(out, in),)`` of each named linear of the dense ``model``, descending, float64 on the CPU.

    A linear that the data do not reach is left out: an image encoder where there is text alone, an expert that gets no
    token. Nothing was measured of it, which is not the same as that it is worth nothing.

    Memory: a GiB of moments, or those of one block; for ``loss`` also the activations of one forward pass.

    Args:
        allocation: ``energy`` or ``loss``.
    """
    require_choice("allocation", allocation, ("energy", "loss"))
    processes = calibration.processes
    batches = calibration.first(SENSITIVITY_TOKENS)
    importance: dict[str, Tensor] | None = None
    if allocation == "loss":
        importance = output_importance(model, names, calibration, progress)
    squares: dict[str, Tensor] = {}
    bar = progress_bar(total=len(names), desc="allocate", unit="linear", progress=progress)
    for group in _in_runs(model, names):
        # Without a name of their own, so that they are gone before those of the next run are collected.
        squares |= spectra_of(model, dense_moments(model, group, batches, processes=processes), importance, processes)
        bar.update(len(group))
    bar.close()
    return squares


def spectra_of(
    model: nn.Module, moments: Mapping[str, Moments], importance: Mapping[str, Tensor] | None, processes: Processes
) -> dict[str, Tensor]:
    """The squared spectra of the linears that got a token, each ``(min(out, in),)``, descending, float64 on the CPU.

    Args:
        importance: of the outputs, by name, for allocation by loss; a linear whose output moves nothing is left out.
            None for allocation by energy: each spectrum is then divided by its sum.
    """

    def work(name: str) -> tuple[Tensor]:
        found, weights = moments[name], None if importance is None else importance[name]
        assert found.inputs is not None
        weight = dense_weight(model.get_submodule(name))
        return (weighted_singular_values(weight, found.inputs, name, weights).square() / found.tokens,)

    reached = [name for name, found in moments.items() if found.inputs is not None]
    if importance is not None:
        reached = [name for name in reached if name in importance and importance[name].any()]
    squares = {name: found for name, (found,) in processes.deal(reached, work)}
    return squares if importance is not None else {n: s / s.sum().clamp_min(_TINY) for n, s in squares.items()}


def output_importance(
    model: nn.Module, names: Sequence[str], calibration: Calibration, progress: bool = False
) -> dict[str, Tensor]:
    """:func:`output_gradients` of the dense ``model`` on :func:`gradient_batches`.

    It is measured once: allocation by loss and the fit share it. A linear that the data do not reach is left out.
    """
    known = calibration.importance.setdefault(model, {})
    if missing := [n for n in names if n not in known]:
        few = gradient_batches(calibration)
        found = output_gradients(model, missing, few, calibration.seed, progress, calibration.processes)
        known |= {n: found.get(n) for n in missing}
        give_back()
    return {n: g for n in names if (g := known[n]) is not None}


def gradient_batches(calibration: Calibration) -> list[Batch]:
    """The first :data:`GRADIENT_TOKENS` of what the fit sees, in parts of a few rows.

    Of several processes, each has a few rows of every batch: the random numbers are those of whole batches.
    """
    batches = calibration.first(min(GRADIENT_TOKENS, calibration.fit_tokens))
    if calibration.processes.count > 1:
        return batches
    return [part for batch in batches for part in few_rows(batch, _POSITIONS_AT_ONCE)]


def output_gradients(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    seed: int = 0,
    progress: bool = False,
    processes: Processes = ONE,
) -> dict[str, Tensor]:
    """Mean over tokens of the squared gradient of the model's own loss at each linear's output, ``(out,)`` each.

    None at all where that loss is not a number: the moments, taken next, say in which linear that begins.
    """
    squares = GradientSquares(processes)
    generator, tokens, wrong = torch.Generator().manual_seed(seed), 0, 0
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(torch.enable_grad())
        for name in names:
            stack.callback(squares.watch(name, model.get_submodule(name)))
        for batch in progress_bar(batches, desc="sensitivity", unit="batch", progress=progress):
            loss, counted = own_loss(run(model, batch), batch, generator, processes)
            loss.backward()
            tokens += counted
            wrong += not torch.isfinite(loss)
            del loss  # else the logits are still there while the next ones are made
    found = squares.mean(tokens)
    return {} if processes.total(wrong) else found


class GradientSquares:
    """Sums over tokens of the squared gradients at the outputs of linears."""

    def __init__(self, processes: Processes = ONE) -> None:
        self._sums: dict[str, Tensor] = {}
        self._outputs: dict[str, int] = {}
        self._processes = processes

    def watch(self, name: str, module: nn.Module) -> Callable[[], None]:
        """Count the gradients of backward passes from now on; what is returned ends that."""
        self._outputs[name] = dense_weight(module).shape[0]

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # A sum, because a leaf must not be changed in place, which the model may do with what it is given.
            output = output if output.requires_grad else output.requires_grad_() + 0
            output.register_hook(partial(self._add, name))
            return output

        return module.register_forward_hook(hook).remove

    def mean(self, tokens: int) -> dict[str, Tensor]:
        """``(out,)`` each, over this many tokens here, and those of the other processes."""
        if self._processes.count > 1:
            place = self._processes.device
            tokens = int(self._processes.total(tokens))
            for name, outputs in self._outputs.items():
                zeros = torch.zeros(outputs, dtype=working_dtype(torch.device(place)), device=place)
                self._sums.setdefault(name, zeros)
                self._processes.add_up(self._sums[name])
        return {n: s / tokens for n, s in self._sums.items()}

    def _add(self, name: str, gradient: Tensor) -> None:
        squares = gradient.detach().flatten(0, -2).float().square().sum(0).to(working_dtype(gradient.device))
        self._sums[name] = self._sums[name] + squares if name in self._sums else squares


def own_loss(output: Any, batch: Batch, generator: torch.Generator, processes: Processes = ONE) -> tuple[Tensor, int]:
    """A scalar whose gradient has the Fisher information as its second moment, and over how many positions it sums."""
    logits, distribution = answer_of(output)
    if not distribution:
        hidden = logits.float()
        shape = hidden.shape[1:]
        drawn = processes.drawn(lambda rows: torch.randint(0, 2, (rows, *shape), generator=generator), len(hidden))
        signs = (drawn * 2 - 1).to(hidden)
        scale = _mean(hidden.detach().square(), processes).sqrt().clamp_min(1e-12)
        mask = token_mask(batch, hidden, decoder=True)
        signs = signs if mask is None else signs * (mask != 0).to(signs)[..., None]
        return (hidden * signs).sum() / scale, int(signs.any(-1).sum())
    with torch.no_grad():
        # Gumbel's trick draws from the softmax with a generator on the CPU, whatever the device.
        noise = processes.drawn(
            lambda rows: torch.empty(rows, *logits.shape[1:]).exponential_(generator=generator), len(logits)
        )
        drawn = noise.clamp_min_(1e-20).log_().neg_().to(logits.device).add_(logits).argmax(-1)
        del noise
        mask = token_mask(batch, logits, decoder=True)
        drawn = drawn if mask is None else drawn.masked_fill(mask == 0, -100)
    loss = F.cross_entropy(logits.float().flatten(0, -2), drawn.flatten(), reduction="sum", ignore_index=-100)
    return loss, int((drawn != -100).sum())


def _mean(x: Tensor, processes: Processes) -> Tensor:
    """Over the elements of all processes."""
    sums = torch.stack([x.sum(), x.new_tensor(x.numel())])
    processes.add_up(sums)
    return sums[0] / sums[1]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter collects gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _in_runs(model: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """Whole blocks together, as many as have moments of :data:`_MOMENT_BYTES`."""
    blocks: dict[str | None, list[str]] = {}
    for name in names:
        blocks.setdefault(block_of(model, name), []).append(name)
    runs: list[list[str]] = []
    taken = 0
    for members in blocks.values():
        # An upper bound: linears that read the same tensor share their moments.
        size = sum(8 * dense_weight(model.get_submodule(n)).shape[1] ** 2 for n in members)
        if not runs or taken + size > _MOMENT_BYTES:
            runs.append([])
            taken = 0
        runs[-1] += members
        taken += size
    return runs
