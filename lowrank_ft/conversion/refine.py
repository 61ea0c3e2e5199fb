"""Train the factors of one block so that it does what its dense twin did.

    minimize over U, V of the block    |block'(H') - block(H)|^2 / |block(H)|^2

``H'`` are the hidden states that reach the block in the model under conversion, ``H`` those in the dense model. The
scales of its norms and its biases may move with ``U`` and ``V``, as in AA-SVD; everything else stays as it was.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowrank_ft.conversion.activations import Activations
from lowrank_ft.conversion.chains import Call
from lowrank_ft.conversion.factor_trainer import FactorTrainer
from lowrank_ft.conversion.processes import ONE, Processes
from lowrank_ft.nn import lowrank_layers


def refine_block(
    block: nn.Module,
    hidden: Activations,
    calls: Sequence[Call],
    wanted: Activations,
    masks: Sequence[Tensor | None],
    epochs: int,
    learning_rate: float,
    seed: int = 0,
    batches: int | None = None,
    vectors: Sequence[Tensor] = (),
    processes: Processes = ONE,
) -> None:
    """Train the factors of ``block`` to map ``hidden`` to ``wanted``, one batch per step, in place.

    Args:
        hidden: per batch, ``(batch, length, features)`` as the model under conversion gives it to the block.
        calls: per batch, the other arguments of the block.
        wanted: per batch, what the dense block made of the dense hidden states.
        masks: per batch, nonzero ``(batch, length)`` where a token counts; None where all do.
        batches: how many to train on; those after them are held out. None for all.
        vectors: what is trained beside the factors.
        processes: each with its rows of every batch.

    Raises:
        DivergedError: the error is no longer a number.
    """
    count = len(hidden) if batches is None else batches
    if epochs == 0 or not any(lowrank_layers(block)):
        return
    trainer = FactorTrainer(block, epochs * count, learning_rate, vectors, processes)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for i in torch.randperm(count, generator=generator).tolist():
            with torch.enable_grad():
                difference, size = squares(calls[i](block, hidden[i]), wanted[i], masks[i])
                processes.add_up(size)
                trainer.add(difference / size)
            trainer.step()
    trainer.finish()


def squared_error(found: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Tensor:
    """``|found - wanted|^2 / |wanted|^2`` over the counted tokens of ``(batch, length, features)``, a float32 scalar."""
    difference, size = squares(found, wanted, mask)
    return difference / size


def squares(found: Tensor, wanted: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``|found - wanted|^2`` and ``|wanted|^2``, which is never 0."""
    difference, size = (found.float() - wanted.float()).square(), wanted.float().square()
    if mask is not None:
        counted = (mask != 0).to(difference)[..., None]
        difference, size = difference * counted, size * counted
    return difference.sum(), size.sum().clamp_min(torch.finfo(torch.float32).tiny)
