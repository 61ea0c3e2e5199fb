"""What the benchmarks share: model, texts, the baseline, and where results go."""

import argparse
import concurrent.futures
import json
import math
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_ft.data.encoding import token_ids
from lowrank_ft.data.sources import read_rows
from lowrank_ft.evaluation.perplexity import evaluate_blocks, to_blocks
from lowrank_ft.factorization.plan import Plan, count_parameters, make_plan
from lowrank_ft.factorization.solvers import Factors
from lowrank_ft.factorization.targets import select_targets
from lowrank_ft.nn.forms import stored_as
from lowrank_ft.nn.replace import factorized

SHARED = Path(os.environ.get("LOWRANK_FT_SHARED", Path(__file__).parents[3] / "shared"))
RESULTS = Path(__file__).parent / "results"


def add_common(parser: argparse.ArgumentParser) -> None:
    """Model, device and output, the same for all benchmarks."""
    parser.add_argument("--model", default=str(SHARED / "models" / "tiny-llama"), help="folder or Hub id")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)


def load(name: str, device: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device).eval()


def read_text(name: str) -> str:
    """All of a local file or of the test split of a dataset on the Hub, as one text."""
    return "\n".join(t for t in read_rows(name, "test")["text"] if t)


def blocks_of(text: str, tokenizer: Any, block_size: int) -> Tensor:
    return to_blocks(torch.from_numpy(token_ids([text], tokenizer)).long(), block_size)


def perplexity(model: nn.Module, blocks: Tensor) -> float:
    return evaluate_blocks(model, blocks, 16).perplexity


def excess(found: float, dense: float) -> float:
    """``ln(ppl) - ln(ppl of the dense model)``, in nats per token."""
    return math.log(found) - math.log(dense)


def uniform_plan(model: nn.Module, param_ratio: float) -> Plan:
    """Ranks as SVD-LLM gives them: ``int(ratio * out * in / (out + in))`` for every linear of the blocks."""
    ranks = {s.name: int(param_ratio * s.shape[0] * s.shape[1] / sum(s.shape)) for s in select_targets(model)}
    return make_plan(model, rank=1, rank_pattern={name.replace(".", r"\."): max(1, r) for name, r in ranks.items()})


@torch.no_grad()
def whitened_svd(model: nn.Module, plan: Plan, batches: list[dict[str, Tensor]]) -> None:
    """SVD-LLM's data whitening (Wang et al. 2024, arXiv 2403.07378), from its published formula, in place.

    ``X X^T = S S^T`` by Cholesky over all calibration tokens of the dense model, ``W S = A D B^T``, and the factors
    are ``A_r D_r^1/2`` and ``D_r^1/2 B_r^T S^-1``. Where ``X X^T`` is not positive definite, its diagonal is raised by
    the least eigenvalue and a little, as its authors do.
    """
    moments: dict[str, Tensor] = {}
    linears = {n: model.get_submodule(n) for n in plan.ranks}

    def note(name: str, x: Tensor) -> None:
        flat = x.flatten(0, -2).double()
        moments[name] = moments.get(name, 0) + flat.T @ flat

    hooks = [m.register_forward_pre_hook(lambda _, a, n=n: note(n, a[0])) for n, m in linears.items()]
    device = next(model.parameters()).device
    for batch in batches:
        model(**{k: v.to(device) for k, v in batch.items()})
    for hook in hooks:
        hook.remove()
    for name, linear in linears.items():
        root, rank = cholesky(moments[name]), plan.ranks[name]
        left, values, right = torch.linalg.svd(linear.weight.double() @ root, full_matrices=False)
        scale = values[:rank].sqrt()
        factors = Factors(left[:, :rank] * scale, (scale[:, None] * right[:rank]) @ torch.linalg.inv(root))
        model.set_submodule(name, factorized(linear, factors))


def cholesky(moments: Tensor) -> Tensor:
    try:
        return torch.linalg.cholesky(moments)
    except torch.linalg.LinAlgError:
        least = torch.linalg.eigvalsh(moments)[0]
        eye = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
        return torch.linalg.cholesky(moments + (-least + 1e-6 * moments.diagonal().mean()) * eye)


def stored_parameters(model: nn.Module, form: str) -> int:
    """Of the checkpoint, with its factors in this form."""
    with stored_as(model, form):
        return count_parameters(model)


def machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {os.cpu_count()} cores"
    return {
        "device": name,
        "architecture": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def tokenizer_of(name: str) -> Any:
    return AutoTokenizer.from_pretrained(name)


def as_completed(
    pool: Executor, function: Callable[..., Any], jobs: list[tuple[Any, ...]]
) -> Iterator[tuple[Any, Any]]:
    """Job and result of ``function(*job)``, as they come. At the first error the jobs that wait are given up."""
    futures = {pool.submit(function, *job): job for job in jobs}
    try:
        for done in concurrent.futures.as_completed(futures):
            yield futures[done], done.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def missing_rates(found: dict[float, float], grid: tuple[float, ...], most: int) -> list[float]:
    """Learning rates to try next: the grid, and past its end, ``most`` times, while the best result is at an end."""
    missing = [r for r in grid if r not in found]
    if missing or len(found) >= len(grid) + most:
        return missing
    best, rates = min(found, key=lambda r: found[r]), sorted(found)
    return [best * 2] if best == rates[-1] else [best / 2] if best == rates[0] else []


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write whole or not at all: a benchmark saves after every measurement."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".partial")
    draft.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """What an earlier run wrote, or None."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
