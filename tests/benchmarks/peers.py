"""Other ways to make a Llama smaller without data to train on, each from the formula that its authors published.

``aa_svd``: *Anchored and adaptive SVD* (Sinha and Fleuret 2026, arXiv 2604.02119), with its refinement of each block.
``mpifa``: *Pivoting factorization* with reconstruction (Zhao, Zhang and Cannistraci 2025, arXiv 2501.19090).
``modegpt``: *Modular decomposition* (Lin et al. 2025, ICLR, arXiv 2408.09632), for grouped queries and rotary positions.

All change the model in place. ``quality.py`` and ``real_model.py`` run them beside ours, on the same calibration text.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.conversion.chains import Call, capture
from lowrank_ft.factorization.plan import Plan, count_parameters
from lowrank_ft.factorization.solvers import Factors, balance
from lowrank_ft.nn.replace import factorized
from tests.benchmarks.common import cholesky

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The linears of a block in the order in which they run; those of a group read the same input."""

Fit = Callable[[Tensor, int, Tensor, Tensor], Factors]
"""From ``W (out, in)``, a rank, ``X' X'^T`` and ``X X'^T``, both ``(in, in)``, to factors."""


def aa_svd(model: Any, plan: Plan, batches: list[dict[str, Tensor]], epochs: int = 25) -> None:
    """``min |W X - W' X'|`` over ``W'`` of the rank of the plan, then each block trained towards its dense twin.

    ``X`` is what the linear reads in the dense model, ``X'`` in the compressed one. The settings are those of the
    authors' code: mean squared error, AdamW at 1e-4 with weight decay 0.01 over all parameters of the block, norms
    clipped at 1, a tenth of warm-up, a cosine to a tenth, 25 epochs of 8 batches. Only the factors start evenly split:
    as the formula leaves them, ``V`` is too small for steps of that size, and training diverges on small models.
    """

    def refine(block: nn.Module, calls: list[Call], hidden: list[Tensor], wanted: list[Tensor]) -> None:
        size = math.ceil(len(calls) / 8)
        starts = range(0, len(calls), size)
        total = epochs * len(starts)
        optimizer = torch.optim.AdamW(block.parameters(), lr=1e-4, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, total))
        with torch.enable_grad():
            for _ in range(epochs):
                for start in starts:
                    members = range(start, min(start + size, len(calls)))
                    for i in members:
                        loss = nn.functional.mse_loss(calls[i](block, hidden[i]), wanted[i])
                        (loss / len(members)).backward()
                    nn.utils.clip_grad_norm_(block.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()

    _in_turn(model, plan, batches, anchored, refine if epochs else None)


def anchored(weight: Tensor, rank: int, moments: Tensor, cross: Tensor) -> Factors:
    """The best ``U V`` of a rank for ``|W X - U V X'|``: SVD of ``W X X'^T S^-T`` with ``S S^T = X' X'^T``."""
    root = cholesky(moments)
    wanted = torch.linalg.solve_triangular(root, (weight @ cross).T, upper=False).T
    left, values, right = torch.linalg.svd(wanted, full_matrices=False)
    scale = values[:rank].sqrt()
    v = torch.linalg.solve_triangular(root, scale[:, None] * right[:rank], upper=False, left=False)
    return balance(Factors(left[:, :rank] * scale, v))


def mpifa(model: Any, plan: Plan, batches: list[dict[str, Tensor]], dense_share: float = 0.25) -> None:
    """Whitened SVD in the compressed model, then ``U`` and ``V`` solved again, by turns, for mixed targets.

    The targets are ``Y = s W X + (1 - s) W X'`` with ``s = 0.25``. ``U = Y H^T (H H^T)^-1`` for ``H = V X'``, then
    ``V = (U^T U)^-1 U^T Y X'^T (X' X'^T)^-1``. Stored pivoted, hence a plan of pivoted ranks.
    """

    def reconstructed(weight: Tensor, rank: int, moments: Tensor, cross: Tensor) -> Factors:
        first = anchored(weight, rank, moments, moments)  # W X' itself is the target: SVD-LLM's
        target = weight @ (dense_share * cross + (1 - dense_share) * moments)  # Y X'^T
        inner = first.V @ moments @ first.V.T
        u = torch.linalg.solve(inner, (target @ first.V.T).T).T
        v = torch.linalg.solve(u.T @ u, u.T @ torch.cholesky_solve(target.T, cholesky(moments)).T)
        return Factors(u, v)

    _in_turn(model, plan, batches, reconstructed, None)


@torch.no_grad()
def modegpt(model: Any, ratio: float, batches: list[dict[str, Tensor]], smoothing: float = 0.1) -> int:
    """Fewer hidden units, and fewer dimensions of each head. Returns how many parameters the model then has.

    Of a layer, the same share is taken from its feed-forward network (Nystroem: units by ridge leverage score, the
    rest regressed on them), from queries and keys (CR: pairs of rotary dimensions by the size of what they carry) and
    from values and outputs (SVD of their product). Shares follow ``softmax(-influence / smoothing)`` of the block, at
    most 0.8. Dimensions that are taken away are zeros here: the outputs are those of the smaller model.
    """
    config = model.config
    blocks = list(model.model.layers)
    seen = _moments_of_dense(model, batches)
    influence = torch.tensor([s["influence"] for s in seen], dtype=torch.float64)
    taken = _shared_out((1 - ratio) * len(blocks), torch.softmax(-influence / smoothing, 0))
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width, hidden = blocks[0].self_attn.head_dim, config.hidden_size
    removed = 0
    for block, moments, share in zip(blocks, seen, taken.tolist(), strict=True):
        units = max(1, round((1 - share) * config.intermediate_size))
        pairs = max(1, round((1 - share) * width / 2))
        _fewer_units(block.mlp, moments["mlp.down_proj"], units)
        _fewer_keys(block.self_attn, moments, heads // groups, pairs)
        _fewer_values(block.self_attn, moments["self_attn.v_proj"], heads // groups, 2 * pairs)
        removed += 3 * hidden * (config.intermediate_size - units)
        removed += 2 * hidden * (heads + groups) * (width - 2 * pairs)
    return count_parameters(model) - removed


@torch.no_grad()
def _in_turn(
    model: Any,
    plan: Plan,
    batches: list[dict[str, Tensor]],
    fit: Fit,
    refine: Callable[[nn.Module, list[Call], list[Tensor], list[Tensor]], None] | None,
) -> None:
    """Factorize group by group; each sees what the compressed model gives it, and what the dense one did."""
    names = [f"model.layers.{i}" for i in range(len(model.model.layers))]
    inputs = capture(model, names, batches, [])  # type: ignore[arg-type]  # a list keeps hidden states as well
    dense: list[Tensor] = list(inputs.hidden)
    hidden = dense
    for name in names:
        block, calls = model.get_submodule(name), inputs.calls[name]
        twin = copy.deepcopy(block)
        for group in GROUPS:
            moments = cross = torch.zeros((), dtype=torch.float64)
            for call, x, h in zip(calls, dense, hidden, strict=True):
                theirs, ours = _input(twin, group[0], call, x), _input(block, group[0], call, h)
                moments, cross = moments + ours.T @ ours, cross + theirs.T @ ours
            for child in group:
                linear, rank = block.get_submodule(child), plan.ranks[f"{name}.{child}"]
                factors = fit(linear.weight.double(), rank, moments, cross)
                model.set_submodule(f"{name}.{child}", factorized(linear, factors))
        dense = [call(twin, x) for call, x in zip(calls, dense, strict=True)]
        if refine is not None:
            refine(block, calls, hidden, dense)
        hidden = [call(block, h) for call, h in zip(calls, hidden, strict=True)]


def _input(block: nn.Module, child: str, call: Call, hidden: Tensor) -> Tensor:
    """What a linear of the block reads, ``(tokens, in)`` in float64."""
    found: list[Tensor] = []
    module = block.get_submodule(child)
    hook = module.register_forward_pre_hook(lambda _, args: found.append(args[0].detach().flatten(0, -2).double()))
    call(block, hidden)
    hook.remove()
    return found[0]


def _moments_of_dense(model: Any, batches: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Of each block: inputs of v and down, power of each dimension of q and k, and ``1 - cos`` of what it changes."""
    names = [f"model.layers.{i}" for i in range(len(model.model.layers))]
    inputs = capture(model, names, batches, [])  # type: ignore[arg-type]
    hidden: list[Tensor] = list(inputs.hidden)
    result = []
    for name in names:
        block, found = model.get_submodule(name), dict[str, Any]()

        def add(key: str, value: Tensor, found: dict[str, Any] = found) -> None:
            found[key] = found.get(key, 0.0) + value

        hooks = [
            block.get_submodule(n).register_forward_pre_hook(lambda _, a, n=n: add(n, _gram(a[0])))
            for n in ("self_attn.v_proj", "mlp.down_proj")
        ] + [
            block.get_submodule(n).register_forward_hook(
                lambda _, a, y, n=n: add(n, y.flatten(0, -2).double().square().sum(0))
            )
            for n in ("self_attn.q_proj", "self_attn.k_proj")
        ]
        after = [call(block, h) for call, h in zip(inputs.calls[name], hidden, strict=True)]
        for hook in hooks:
            hook.remove()
        same = [torch.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(hidden, after, strict=True)]
        found["influence"] = 1 - torch.stack(same).mean().item()
        result.append(found)
        hidden = after
    return result


def _shared_out(total: float, weights: Tensor, most: float = 0.8) -> Tensor:
    """``total`` in proportion to the weights, but at most ``most`` for each."""
    shares = torch.zeros_like(weights)
    free = torch.ones_like(weights, dtype=torch.bool)
    while True:
        shares[free] = (total - most * int((~free).sum())) * weights[free] / weights[free].sum()
        if not bool((shares > most).any()):
            return shares
        free &= shares <= most
        shares[~free] = most


def _fewer_units(mlp: Any, moments: Tensor, keep: int) -> None:
    ridge = moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    scores = torch.linalg.solve(moments + ridge, moments).diagonal()
    kept = scores.topk(keep).indices
    inner = moments[kept][:, kept]
    down = torch.linalg.solve(inner + 1e-9 * ridge[:keep, :keep], moments[kept] @ mlp.down_proj.weight.double().T)
    mlp.down_proj.weight.zero_()
    mlp.down_proj.weight[:, kept] = down.T.to(mlp.down_proj.weight)


def _fewer_keys(attention: Any, moments: dict[str, Tensor], group: int, pairs: int) -> None:
    width = attention.head_dim
    queries = moments["self_attn.q_proj"].view(-1, group, 2, width // 2)
    keys = moments["self_attn.k_proj"].view(-1, 1, 2, width // 2)
    scores = (queries * keys).sum((1, 2))  # (key heads, pairs)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(pairs, 1).indices, True)
    mask = torch.cat([kept, kept], 1)
    attention.k_proj.weight.mul_(mask.view(-1, 1))
    attention.q_proj.weight.mul_(mask.repeat_interleave(group, 0).view(-1, 1))


def _fewer_values(attention: Any, moments: Tensor, group: int, keep: int) -> None:
    width = attention.head_dim
    values = attention.v_proj.weight.double().view(-1, width, attention.v_proj.in_features)
    outputs = attention.o_proj.weight.double().view(attention.o_proj.out_features, -1, group, width)
    for head, value in enumerate(values):
        root = cholesky(value @ moments @ value.T).T  # R^T R = W_V C W_V^T
        output = outputs[:, head].permute(2, 1, 0).reshape(width, -1)  # what its queries make of each dimension
        left, sizes, right = torch.linalg.svd(root @ output, full_matrices=False)
        new_value = torch.linalg.solve(root, left[:, :keep]).T @ value
        new_output = sizes[:keep, None] * right[:keep]
        rows = slice(head * width, head * width + keep)
        attention.v_proj.weight[head * width : (head + 1) * width] = 0
        attention.v_proj.weight[rows] = new_value.to(attention.v_proj.weight)
        whole = torch.zeros_like(output)
        whole[:keep] = new_output
        outputs[:, head] = whole.view(width, group, -1).permute(2, 1, 0)
    attention.o_proj.weight.copy_(outputs.reshape(attention.o_proj.weight.shape))


def _gram(x: Tensor) -> Tensor:
    flat = x.flatten(0, -2).double()
    return flat.T @ flat


def _cosine(step: int, total: int) -> float:
    warm = max(1, total // 10)
    if step < warm:
        return step / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
