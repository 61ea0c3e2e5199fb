"""Time of one factored layer, pivoted and plain, beside the dense one.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/layer.py

``plain`` has as many parameters as ``pivoted``, and so a smaller rank. They take turns, and each keeps its shortest
time: on a busy machine the shortest is the least disturbed.

Then the linears of a block that read one input, as in decoding: each with a V of its own, and all with one, of the same
number of parameters.
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
ONE_INPUT = {"q, k, v": (2048, 512, 512), "gate, up": (8192, 8192)}  # outputs, of 2048 inputs; Llama-3.2-1B
TARGET = 1.03  # pivoted over plain


def layers(shape: Shape, ratio: float, dtype: torch.dtype, device: str) -> dict[str, Any]:
    rank = round(rank_at(shape, ratio))
    plain = round(rank * (sum(shape) - rank) / sum(shape))
    options = {"bias": False, "device": device, "dtype": dtype}
    return {
        "dense": torch.nn.Linear(shape[1], shape[0], **options),
        "plain": LowRankLinear(shape[1], shape[0], plain, **options),
        "pivoted": pivoted_layer(shape, rank, **options),
    }


def pivoted_layer(shape: Shape, rank: int, **options: Any) -> LowRankLinear:
    layer = LowRankLinear(shape[1], shape[0], rank, **options, pivot=pivot_side(shape, rank))
    # As real ones are: r entries anywhere, each part in ascending order.
    places = torch.randperm(len(layer.order), device=layer.order.device)
    places = torch.cat([places[:rank].sort().values, places[rank:].sort().values])
    layer.order.copy_(places.argsort() if layer.pivot == "output" else places)
    return layer


def shared_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One token through linears that read it together."""
    settings = {"bias": False, "device": options.device, "dtype": getattr(torch, options.dtype)}
    x = torch.randn(1, 2048, device=options.device, dtype=settings["dtype"])
    rows = []
    for name, outputs in ONE_INPUT.items():
        ratio = options.param_ratio
        own = [pivoted_layer((n, 2048), round(rank_at((n, 2048), ratio)), **settings) for n in outputs]
        whole = (sum(outputs), 2048)
        one = pivoted_layer(whole, round(rank_at(whole, ratio)), **settings)
        calls = {
            "own": lambda own=own: [m(x) for m in own],
            "shared": lambda one=one, o=outputs: one(x).split(o, dim=-1),
        }
        times = shortest(calls, options.seconds, options.device)
        numbers = {"own": sum(m.numbers for m in own), "shared": one.numbers}
        rows.append({"linears": name, "seconds": times, "numbers": numbers, "gain": times["own"] / times["shared"] - 1})
    return rows


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
              "rows": rows, "one_input": shared_rows(options)}  # fmt: skip
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
    for r in report["one_input"]:
        print(f"{r['linears']}, one token: a shared V makes it {r['gain']:.0%} faster")


if __name__ == "__main__":
    main()
