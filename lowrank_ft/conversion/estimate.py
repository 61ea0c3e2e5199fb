"""How long a conversion will take and how much memory, from a short measurement of the model's first block.

The block runs forward and backward once on a few hundred tokens, and each shape of its linears is factorized once. All
else is arithmetic: blocks, tokens and passes. What the measurement cannot know, such as other work on the machine, makes
the estimate wrong by its share.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.conversion.activations import Activations
from lowrank_ft.conversion.calibration import Calibration, positions
from lowrank_ft.conversion.chains import Batch, block_of, capture, run
from lowrank_ft.conversion.effort import Effort
from lowrank_ft.conversion.record import ConversionRecord
from lowrank_ft.conversion.refine import squared_error
from lowrank_ft.conversion.sensitivity import GRADIENT_TOKENS, SENSITIVITY_TOKENS
from lowrank_ft.factorization.plan import LinearPlan, Plan
from lowrank_ft.factorization.solvers import Regression
from lowrank_ft.nn.replace import dense_weight, factorized

_TOKENS = 512


@dataclass(frozen=True)
class Work:
    """What is asked for, as far as time and memory depend on it.

    Attributes:
        written, fitted, distilled: tokens that the model writes, that regression sees, and that distillation sees.
        refined: tokens times epochs of block refinement.
        loss: whether ranks are allocated by gradients.
        anchored: whether the converted model's own hidden states are followed.
    """

    written: int
    fitted: int
    refined: int
    distilled: int
    loss: bool
    anchored: bool

    def divided(self, processes: int) -> "Work":
        """The part of one of so many processes."""
        tokens = ("written", "fitted", "refined", "distilled")
        return replace(self, **{name: getattr(self, name) // processes for name in tokens})


@dataclass(frozen=True)
class Stage:
    """One part of a conversion, in seconds; ``flag`` is what makes it cheaper."""

    name: str
    seconds: float
    flag: str


@dataclass(frozen=True)
class Speed:
    """What was measured: seconds per token of the whole model, forward and backward, and of all factorizations."""

    forward: float
    backward: float
    factorize: float
    activation_bytes: float


def measure(model: Any, plan: Plan, batch: Batch) -> Speed:
    """Run the first planned block, and the whole model once, on a part of ``batch``."""
    rows = max(1, _TOKENS * len(next(iter(batch.values()))) // max(1, positions(batch)))
    small = {k: v[:rows] for k, v in batch.items()}
    tokens = max(1, positions(small))
    names = list(plan.ranks)
    blocks = dict.fromkeys(b for n in names if (b := block_of(model, n)))
    first = _first_to_run(model, list(blocks), small)
    forward = _seconds(lambda: _without_grad(lambda: run(model, small)), again=False)
    ratio, held = (2.0, 0.0) if first is None else _block(model, first, small)
    by_shape = {p.shape: p for p in plan.linears if p.rank is not None}
    each = {s: _factorize(_matrix(model, p), plan.ranks[p.name]) for s, p in by_shape.items()}
    total = sum(p.copies * each[p.shape] for p in plan.linears if p.rank is not None)
    return Speed(forward / tokens, ratio * forward / tokens, total, held / tokens * len(blocks))


def stages(speed: Speed, work: Work) -> list[Stage]:
    """What the conversion will do, in order, with its times."""
    found = []
    if work.written:
        # A token at a time, a batch of rows side by side: about what reading costs, and twice that for the cache.
        found.append(Stage("write text", 3 * work.written * speed.forward, "--calibration-data"))
    if work.loss or work.fitted:
        gradients = GRADIENT_TOKENS * (speed.forward + speed.backward)
        found.append(Stage("weigh outputs", gradients, "--method svd"))
    if work.loss:
        found.append(Stage("allocate ranks", SENSITIVITY_TOKENS * speed.forward, "--allocation uniform"))
    passes = 4.0 if work.anchored or work.refined else 1.0
    found.append(Stage("factorize", passes * work.fitted * speed.forward + speed.factorize, "--calibration-tokens"))
    if work.refined:
        found.append(Stage("refine blocks", work.refined * (speed.forward + speed.backward), "--refine-epochs 0"))
    if work.distilled:
        found.append(Stage("distill", work.distilled * (2 * speed.forward + speed.backward), "--distill-epochs 0"))
    return found


def peak_bytes(model: nn.Module, plan: Plan, speed: Speed, work: Work) -> int:
    """Of tensors, at the worst moment; the Python process itself comes on top."""
    size = next(model.parameters()).element_size()
    weights = weight_bytes(model)
    dense = sum(p.dense_parameters for p in plan.linears if p.rank is not None)
    factors = sum(p.trained_parameters for p in plan.linears if p.rank is not None)
    config: Any = getattr(model, "config", None)
    hidden = getattr(config, "hidden_size", None) or max(p.shape[1] for p in plan.linears)
    streams = (4 if work.anchored or work.refined else 2) * 4 * work.fitted * hidden
    backward = _logit_bytes(config) + int(speed.activation_bytes * _TOKENS)
    moments = min(2**30, sum(8 * p.shape[1] ** 2 * p.copies for p in plan.linears))
    first = weights + max(backward, moments if work.loss else 0)
    solver = _moment_bytes(plan, work.anchored)
    if not work.distilled:
        return max(first, weights + streams + solver)
    kept = weights + dense * size + solver  # the dense twin, too
    # Beside the factors: gradients, two states of AdamW, the best state so far; and a copy of 16-bit factors.
    # The dense twin makes up for what is factored in ``weights``.
    training = weights + factors * size + factors * 4 * (4 if size == 4 else 5)
    return max(first, kept + streams, training + backward)


def planned_bytes(model: nn.Module, plan: Plan, effort: Effort) -> dict[str, int]:
    """Of tensors, at the worst moment, from shapes alone: in memory (``whole``) and block by block (``streamed``).

    A block keeps about twice what its linears read and give for its backward pass (2.03 and 2.10 times, measured on two
    Llamas with scaled dot product attention).

    Args:
        model: on the meta device, in the dtype that is computed in.
    """
    size = next(model.parameters()).element_size()
    per_token = 2 * size * sum(p.copies * sum(p.shape) for p in plan.linears)
    own = round(effort.own_share * effort.tokens)
    work = Work(
        written=own, fitted=effort.fit_tokens, refined=effort.fit_tokens * effort.refine_epochs,
        distilled=round(effort.tokens * effort.distill_epochs), loss=True, anchored=effort.method == "anchored",
    )  # fmt: skip
    text = {"input_ids": torch.zeros(1, effort.fit_tokens, dtype=torch.long)}
    return {
        "whole": peak_bytes(model, plan, Speed(0, 0, 0, per_token), work),
        "streamed": streamed_bytes(model, plan, Calibration([text])),
    }


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters; tied ones count once."""
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())


def streamed_bytes(model: nn.Module, plan: Plan, calibration: Calibration | None) -> int:
    """Of tensors, at the worst moment of a conversion block by block; the Python process itself comes on top.

    Args:
        model: on the meta device, in the dtype that is computed in.
        calibration: None for plain SVD.
    """
    size = next(model.parameters()).element_size()
    blocks: dict[str, int] = {}
    others = [0]
    for name, parameter in model.named_parameters():
        if (owner := block_of(model, name.rpartition(".")[0])) is not None:
            blocks[owner] = blocks.get(owner, 0) + parameter.numel() * size
        else:
            others.append(parameter.numel() * size)
    solver = 6 * 4 * max((p.shape[0] * p.shape[1] for p in plan.linears if p.rank is not None), default=0)
    block = max(blocks.values(), default=0)
    if calibration is None:
        return block + solver
    hidden = max((p.shape[1] for p in plan.linears), default=0)
    config: Any = getattr(model, "config", None)
    hidden = getattr(config, "hidden_size", None) or hidden
    tokens = sum(map(positions, calibration.fitted_and_held_out))
    entered = (len(blocks) + 2) * GRADIENT_TOKENS
    per_token = 0 if calibration.activations_dir is not None else size * hidden
    weighing = per_token * entered + max(block, max(others) + _logit_bytes(config))
    fitting = per_token * max(3 * tokens, 2 * SENSITIVITY_TOKENS) + 2 * block + solver + _moment_bytes(plan, False)
    return max(weighing, fitting)


def _logit_bytes(config: Any) -> int:
    """Of as many positions as there are at once where gradients are taken, four times, in float32."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", 0) if hasattr(config, "get_text_config") else 0
    return 4 * 4 * _TOKENS * int(vocabulary or 0)


def _moment_bytes(plan: Plan, anchored: bool) -> int:
    """Of the widest linear, in a fit: its moments, a copy with the damping, its root, and what else its block has."""
    return (6 if anchored else 4) * 8 * max((p.shape[1] ** 2 for p in plan.linears if p.rank is not None), default=0)


def _without_grad(function: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return function()


def _first_to_run(model: nn.Module, blocks: list[str], batch: Batch) -> str | None:
    """Of the blocks that the batch reaches: text goes past an image tower, whose blocks may come first by name."""
    ran: list[str] = []
    with ExitStack() as stack:
        for name in blocks:
            hook = model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
            stack.callback(hook.remove)
        _without_grad(lambda: run(model, batch))
    return ran[0] if ran else None


def _block(model: Any, name: str, batch: Batch) -> tuple[float, float]:
    """How many times as long as forward a backward pass of a block takes, and bytes that it keeps for it."""
    inputs = capture(model, [name], [batch], Activations())
    block, call, hidden = model.get_submodule(name), inputs.calls[name][0], inputs.hidden[0]
    kept: dict[int, int] = {}
    parameters = [p for p in block.parameters() if p.requires_grad]
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def pack(x: Tensor) -> Tensor:
        if (place := x.untyped_storage().data_ptr()) not in own:
            kept[place] = x.untyped_storage().nbytes()
        return x

    def both() -> None:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = squared_error(call(block, hidden.requires_grad_()), hidden.detach())
            if parameters:
                torch.autograd.grad(loss, [hidden, *parameters], allow_unused=True)

    forward = _seconds(lambda: _without_grad(lambda: call(block, hidden)))
    kept.clear()
    return max(1.0, _seconds(both) / max(forward, 1e-9) - 1), float(sum(kept.values()))


def _matrix(model: nn.Module, p: LinearPlan) -> Tensor:
    """``W (out, in)`` of a linear, or of the first expert of a stack."""
    if not p.experts:
        return dense_weight(model.get_submodule(p.name))
    first = model.get_parameter(p.name).detach()[0]
    return first if first.shape == p.shape else first.T


def _factorize(weight: Tensor, rank: int) -> float:
    """Seconds for one linear, with what the record of the conversion says of it: its spectrum and its errors."""
    moments = torch.eye(weight.shape[1], device=weight.device)
    dense = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=False, device=weight.device)

    def both() -> None:
        factors = Regression(moments, None, 0.01)(weight, rank)
        ConversionRecord().add_linear("linear", weight, factorized(dense, factors), moments)

    return _seconds(both, again=False)


def _seconds(work: Callable[[], Any], again: bool = True) -> float:
    """Of one run; the first one warms up, unless there is only one."""
    if again:
        work()
    _wait_for_device()
    start = time.perf_counter()
    work()
    _wait_for_device()
    return time.perf_counter() - start


def _wait_for_device() -> None:
    """An accelerator is still at work when its calls return."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def work_of(calibration: Calibration, written: int, allocation: str, method: str) -> Work:
    """The work of a conversion with these settings."""
    fitted = min(calibration.tokens, calibration.fit_tokens)
    return Work(
        written=written,
        fitted=fitted if method != "svd" else 0,
        refined=fitted * calibration.refine_epochs,
        distilled=round(calibration.tokens * calibration.distill_epochs),
        loss=allocation == "loss",
        anchored=method == "anchored",
    )
