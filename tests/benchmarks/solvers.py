"""How long the factorization of one block takes: ours, torch.linalg.svd, and the randomized SVD that PEFT's PiSSA uses.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/solvers.py

Shapes are those of a block of Llama-3.2-1B, ranks those of param ratio 0.6, weights random with a spectrum that falls as
``i^-0.6``. ``error`` is the lost energy over the least possible, minus one. CPU seconds, so other work does not count.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lowrank_ft.console import print_table
from lowrank_ft.factorization.ranks import ranks_for_param_ratio
from lowrank_ft.factorization.solvers import truncated_svd
from tests.benchmarks import common

SHAPES = {"q_proj": (2048, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 2048),
          "gate_proj": (8192, 2048), "up_proj": (8192, 2048), "down_proj": (2048, 8192)}  # fmt: skip
_DECAY = 0.6


def weight_of(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    small = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, small, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(columns, small, generator=generator)).Q
    return (u * torch.arange(1, small + 1) ** -_DECAY) @ v.T


def ours(weight: Tensor, rank: int) -> Tensor:
    factors = truncated_svd(weight, rank)
    return factors.U @ factors.V


def full(weight: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def pissa(weight: Tensor, rank: int) -> Tensor:
    """What ``init_lora_weights="pissa_niter_16"`` of PEFT calls."""
    u, s, v = torch.svd_lowrank(weight, rank, niter=16)
    return (u * s) @ v.T


SOLVERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "ours": ours, "torch.linalg.svd, float32": full, "PEFT pissa_niter_16": pissa,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=common.RESULTS / "solvers.json")
    options = parser.parse_args()
    ranks = dict(zip(SHAPES, ranks_for_param_ratio(list(SHAPES.values()), 0.6), strict=True))
    rows = []
    for name, shape in {"q_proj": SHAPES["q_proj"], "k_proj": SHAPES["k_proj"], "up_proj": SHAPES["up_proj"],
                        "down_proj": SHAPES["down_proj"]}.items():  # fmt: skip
        weight, rank = weight_of(*shape), ranks[name]
        least = (torch.arange(1, min(shape) + 1).double() ** (-2 * _DECAY))[rank:].sum().item()
        for solver, solve in SOLVERS.items():
            start = time.process_time()
            product = solve(weight, rank)
            seconds = time.process_time() - start
            error = (weight.double() - product.double()).square().sum().item() / least - 1
            count = sum(s == shape for s in SHAPES.values())
            rows.append({"linear": name, "shape": list(shape), "rank": rank, "in_block": count, "solver": solver,
                         "cpu_seconds": round(seconds, 3), "error": float(f"{error:.2g}")})  # fmt: skip
            print(rows[-1], flush=True)
    block = {s: sum(r["cpu_seconds"] * r["in_block"] for r in rows if r["solver"] == s) for s in SOLVERS}
    report = {"machine": common.machine("cpu"), "rows": rows, "block_cpu_seconds": block}
    common.write_json(options.output, report)
    table = [
        (r["linear"], "x".join(map(str, r["shape"])), str(r["rank"]), r["solver"], f"{r['cpu_seconds']:.2f}", f"{r['error']:.1e}")
        for r in rows
    ]  # fmt: skip
    title = "one block of Llama-3.2-1B at param ratio 0.6"
    print_table(("linear", "shape", "rank", "solver", "CPU s", "error"), table, title=title)
    for solver, seconds in block.items():
        print(f"{solver}: {seconds:.1f} CPU s a block, {seconds / block['ours']:.1f} times ours")


if __name__ == "__main__":
    main()
