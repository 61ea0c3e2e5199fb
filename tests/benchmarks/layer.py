"""Time of one factored layer, pivoted and plain, beside the dense one.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/layer.py

``plain`` has as many parameters as ``pivoted``, and so a smaller rank. The three take turns, and each keeps its shortest
time: on a busy machine the shortest is the least disturbed.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowrank_ft.console import print_table
from lowrank_ft.factorization.pivoting import pivot_side
from lowrank_ft.factorization.ranks import Shape, dense_parameters, rank_at
from lowrank_ft.nn.lowrank_linear import LowRankLinear
from tests.benchmarks import common

SHAPES: tuple[Shape, ...] = ((2048, 2048), (8192, 2048), (2048, 8192))
TOKENS = (1, 16, 2048)
TARGET = 1.03  # pivoted over plain


def layers(shape: Shape, ratio: float, dtype: torch.dtype, device: str) -> dict[str, Any]:
    rank = round(rank_at(shape, ratio))
    plain = round(rank * (sum(shape) - rank) / sum(shape))
    options = {"bias": False, "device": device, "dtype": dtype}
    made: dict[str, Any] = {
        "dense": torch.nn.Linear(shape[1], shape[0], **options),
        "plain": LowRankLinear(shape[1], shape[0], plain, **options),
        "pivoted": LowRankLinear(shape[1], shape[0], rank, **options, pivot=pivot_side(shape, rank)),
    }
    order = made["pivoted"].order
    # As real ones are: r entries anywhere, each part in ascending order.
    places = torch.randperm(len(order), device=device)
    places = torch.cat([places[:rank].sort().values, places[rank:].sort().values])
    made["pivoted"].order.copy_(places.argsort() if made["pivoted"].pivot == "output" else places)
    return made


def shortest(calls: dict[str, Callable[[], Any]], seconds: float, device: str) -> dict[str, float]:
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--param-ratio", type=float, default=0.6)
    parser.add_argument("--seconds", type=float, default=12, help="of measuring each row")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "layer.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for shape in SHAPES:
        made = layers(shape, options.param_ratio, getattr(torch, options.dtype), options.device)
        for tokens in TOKENS:
            x = torch.randn(tokens, shape[1], device=options.device, dtype=getattr(torch, options.dtype))
            times = shortest({n: lambda m=m, x=x: m(x) for n, m in made.items()}, options.seconds, options.device)
            rows.append({
                "shape": shape, "tokens": tokens, "side": made["pivoted"].pivot, "seconds": times,
                "numbers": {"dense": dense_parameters(shape), **{n: made[n].numbers for n in ("plain", "pivoted")}},
                "pivoted_over_plain": times["pivoted"] / times["plain"],
            })  # fmt: skip
    report = {"machine": common.machine(options.device), "dtype": options.dtype, "param_ratio": options.param_ratio,
              "rows": rows}  # fmt: skip
    common.write_json(options.output, report)
    print_table(
        ("out x in", "tokens", "side", "dense", "plain / dense", "pivoted / dense", "pivoted / plain", ""),
        [
            (
                f"{r['shape'][0]} x {r['shape'][1]}", str(r["tokens"]), r["side"], f"{r['seconds']['dense'] * 1e3:.3f} ms",
                f"{r['seconds']['plain'] / r['seconds']['dense']:.3f}", f"{r['seconds']['pivoted'] / r['seconds']['dense']:.3f}",
                f"{r['pivoted_over_plain']:.3f}", "" if r["pivoted_over_plain"] <= TARGET else f"above {TARGET}",
            )
            for r in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
