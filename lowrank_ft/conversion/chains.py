"""Which blocks follow each other directly, and with what arguments each is called.

A transformer's repeated blocks mostly feed each other: the hidden states that leave block ``i`` enter block ``i + 1``.
Such a run of blocks is a *chain*, and calibration can walk it block by block with one set of hidden states in memory.
Where a model does something between two blocks (an encoder ends and a decoder begins, a stage is downsampled), a new
chain starts, and its inputs are taken from a run of the whole model. This is found by looking at one forward pass, so
it holds for decoders, encoders, encoder-decoders and vision models alike.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.conversion.activations import Activations
from lowrank_ft.errors import DataError
from lowrank_ft.nn.modes import without_cache

Batch = Mapping[str, Tensor]
"""Arguments of the model's forward, such as ``input_ids`` and ``attention_mask``, each ``(batch, ...)``."""


@dataclass(frozen=True)
class Call:
    """Arguments of one call of one block, without its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """What the block makes of ``hidden``: the next hidden states."""
        return hidden_of(block(hidden, *self.args, **self.kwargs))


@dataclass
class ChainInputs:
    """What enters a chain: hidden states of its first block, and the other arguments of each block, per batch."""

    hidden: Activations
    calls: dict[str, list[Call]]


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: itself, or the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def block_of(model: nn.Module, name: str) -> str | None:
    """The repeated block that holds the module ``name``: the member of the outermost ModuleList on its path."""
    parent, path = model, name.split(".")
    for i, part in enumerate(path):
        if isinstance(parent, nn.ModuleList):
            return ".".join(path[: i + 1])
        parent = getattr(parent, part)
    return None


def siblings(model: nn.Module, blocks: Iterable[str]) -> list[str]:
    """``blocks`` and all that stand in a ModuleList with one of them."""
    found: dict[str, None] = {}
    for parent in dict.fromkeys(b.rpartition(".")[0] for b in blocks):
        found |= {f"{parent}.{child}": None for child, _ in model.get_submodule(parent).named_children()}
    return list(found)


def find_chains(model: nn.Module, blocks: Sequence[str], batch: Batch) -> list[list[str]]:
    """Sort ``blocks`` into chains by one forward pass; a block that is not called exactly once is left out."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.append((name, _hidden_argument(args, kwargs), hidden_of(output)))

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name in blocks:
            handle = model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True)
            stack.callback(handle.remove)
        run(model, batch)
    counts = {name: sum(c[0] == name for c in calls) for name in blocks}
    chains: list[list[str]] = []
    previous: Tensor | None = None
    for name, hidden, output in calls:
        if counts[name] != 1 or not isinstance(hidden, Tensor) or not isinstance(output, Tensor):
            previous = None
            continue
        follows = previous is not None and same(previous, hidden)
        if follows:
            chains[-1].append(name)
        else:
            chains.append([name])
        previous = output
    return chains


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same; where both have NaN, too, so that what is wrong with a model is said later."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def chains_with(model: nn.Module, names: Sequence[str], batch: Batch) -> tuple[list[list[str]], list[str]]:
    """The chains that hold one of the linears ``names``, and those linears that lie in none."""
    blocks = [b for n in names if (b := block_of(model, n))]
    chains = [
        c for c in find_chains(model, siblings(model, blocks), batch) if any(within(n, b) for b in c for n in names)
    ]
    return chains, [n for n in names if not any(within(n, b) for c in chains for b in c)]


def within(name: str, block: str) -> bool:
    """Whether the module ``name`` lies in the module ``block``."""
    return name.startswith(f"{block}.")


def capture(model: nn.Module, chain: Sequence[str], batches: Sequence[Batch], hidden: Activations) -> ChainInputs:
    """Run ``model`` on all batches and keep what enters ``chain``; ``hidden`` is filled."""
    inputs = ChainInputs(hidden, {name: [] for name in chain})

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if name == chain[0]:
                inputs.hidden.append(_hidden_argument(args, kwargs).detach())
            rest = {k: v for k, v in kwargs.items() if k != "hidden_states"} if not args else dict(kwargs)
            inputs.calls[name].append(Call(tuple(args[1:]), rest))
            if name == chain[-1]:
                raise _Reached

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name in chain:
            handle = model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in batches:
            try:
                run(model, batch)
            except _Reached:
                continue
    return inputs


def token_mask(batch: Batch, x: Tensor, decoder: bool = False) -> Tensor | None:
    """Which tokens of ``x (batch, length, features)`` or ``(batch * length, features)`` count; None where all do.

    Args:
        decoder: ``x`` is of a decoder or of the whole model. Of an encoder-decoder, its mask is then the decoder's,
            unless ``x`` has as many tokens as the encoder and not the decoder has (the keys of cross-attention).
    """
    target = batch.get("decoder_input_ids")
    of_decoder = decoder and target is not None and _tells_tokens_of(target, x)
    mask = batch.get("decoder_attention_mask" if of_decoder else "attention_mask")
    if mask is None or not _tells_tokens_of(mask, x):
        return None
    return mask.to(x.device).reshape(x.shape[:-1])


def run(model: Any, batch: Batch) -> Any:
    """One forward pass, on the model's device, without a cache."""
    device = next(model.parameters()).device
    if device.type != "meta":  # else its weights come from disk, to where the batch is
        batch = {k: v.to(device) for k, v in batch.items()}
    return model(**batch, **without_cache(model))


def answer_of(output: Any) -> tuple[Tensor, bool]:
    """Logits, or where there are none the last hidden states; and whether a softmax of it is a distribution.

    Raises:
        DataError: the model returns no such tensor.
    """
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits, logits.shape[-1] > 1  # of one logit, as rerankers have it, a softmax is always 1
    hidden = getattr(output, "last_hidden_state", None)
    hidden = output[0] if hidden is None else hidden
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point() or hidden.dim() == 0:
        raise DataError(
            f"a model that returns {type(output).__name__} has no logits and no hidden states to compare; use "
            "--allocation uniform or energy, and --distill-epochs 0"
        )
    return hidden, False


class _Reached(Exception):
    """Raised inside a hook: the rest of the forward pass is not needed."""


def _tells_tokens_of(mask: Tensor, x: Tensor) -> bool:
    return mask.dim() == 2 and (mask.shape == x.shape[:-1] or (x.dim() == 2 and mask.numel() == len(x)))


def _hidden_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")
