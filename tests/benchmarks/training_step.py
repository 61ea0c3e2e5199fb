"""What an optimizer step costs in each guide mode, against full fine-tuning of the dense model.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/training_step.py

Random Llama blocks with matrices of 1024 and up and a small vocabulary. A step is forward, backward and AdamW over a
fixed number of tokens, in sequences of several lengths: attention, which no mode changes, grows with the length. Rounds
go through all modes in turn, so that a machine that is busy for a while slows all of them; each mode's time is divided
by the dense model's in the same round, and the median of these quotients is reported with its quartiles. On one CPU
thread the time is that of the processor, which what else runs on the machine hardly changes. Beside it stands what
multiply-adds of linears alone would predict (lowrank_ft.costs.flops.step_cost).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_ft.console import print_table
from lowrank_ft.conversion.convert import convert
from lowrank_ft.costs.flops import step_cost
from lowrank_ft.nn import end_guidance, guided_layers, set_alpha
from tests.benchmarks import common

GUIDES = ("residual", "dense")
TOLERANCE = 0.15  # of the time of unguided steps over their share of the FLOPs
Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128], help="tokens per sequence")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=common.RESULTS / "training_step.json")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "machine": common.machine(options.device),
        "model": {k: getattr(options, k) for k in ("hidden", "ffn", "layers", "tokens")},
        "dtype": "float32", "clock": clock(options.device).__name__, "rounds": options.rounds,
        "tolerance_of_unguided_steps": TOLERANCE, "rows": [],
    }  # fmt: skip
    for length in options.lengths:
        for ratio in options.ratios:
            report["rows"] += measure(options, ratio, length)
            common.write_json(options.output, report)
    show(report)


def measure(options: argparse.Namespace, ratio: float, length: int) -> list[dict[str, Any]]:
    """One row for each mode at this param ratio and length of sequences."""
    ids = torch.randint(0, 64, (options.tokens // length, length), device=options.device)
    steps, flops = modes(options, ratio, ids)
    for step in steps.values():
        step()  # the first makes the optimizer's state
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds):
        names = list(steps)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(timed(steps[name], options.device))
    rows = []
    for name, seconds in times.items():
        quotients = [s / d for s, d in zip(seconds, times["dense model"], strict=True)]
        low, _, high = statistics.quantiles(quotients, n=4)
        row = {
            "length": length, "ratio": ratio, "mode": name, "seconds": statistics.median(seconds), "fastest": min(seconds),
            "flops": flops[name], "against_dense": statistics.median(quotients), "quartiles": [low, high],
        }  # fmt: skip
        rows.append({**row, "target": target(row), "met": met(row)})
    return rows


def modes(options: argparse.Namespace, ratio: float, ids: Tensor) -> tuple[dict[str, Step], dict[str, float]]:
    """The step of every mode, and its multiply-adds as a share of the dense model's."""
    dense = llama(options)
    steps: dict[str, Step] = {"dense model": stepper(dense, ids)}
    flops = {"dense model": 1.0}
    for guide in GUIDES:
        model = llama(options)
        convert(model, param_ratio=ratio, method="svd", guide=guide)
        set_alpha(model, 0.5)
        step, cost = stepper(model, ids), step_cost(model)
        name = f"{guide} guide"
        steps[name], flops[name] = step, cost.guided() / cost.dense
        name = f"{guide} guide, stochastic"
        steps[name], flops[name] = stochastic(model, step), cost.guided(0.5) / cost.dense
    for name in ("factors alone", "after the drop"):
        model = llama(options)
        convert(model, param_ratio=ratio, method="svd", guide=None if name == "factors alone" else "residual")
        end_guidance(model)
        cost = step_cost(model)
        steps[name], flops[name] = stepper(model, ids), cost.factored / cost.dense
    return steps, flops


def llama(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=options.hidden, intermediate_size=options.ffn, num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64, max_position_embeddings=options.tokens,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(options.device)


def stepper(model: Any, ids: Tensor) -> Step:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.train()

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def stochastic(model: nn.Module, step: Step) -> Step:
    """Half of the layers keep their guide: in turn the even ones and the odd ones, which is alpha = 0.5 without luck.

    Every kind of linear comes twice as often as there are blocks, and an odd number of kinds alternates over blocks,
    so both halves cost the same.
    """
    layers = [layer for _, layer in guided_layers(model)]
    turn = 0

    def gated() -> None:
        nonlocal turn
        turn += 1
        with gates(layers, [(i + turn) % 2 == 0 for i in range(len(layers))]):
            step()

    return gated


@contextmanager
def gates(layers: list[Any], kept: list[bool]) -> Iterator[None]:
    for layer, keep in zip(layers, kept, strict=True):
        layer.guide_gate = keep
    try:
        yield
    finally:
        for layer in layers:
            layer.guide_gate = True


def timed(step: Step, device: str) -> float:
    synchronize(device)
    now = clock(device)
    start = now()
    step()
    synchronize(device)
    return now() - start


def clock(device: str) -> Callable[[], float]:
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def target(row: dict[str, Any]) -> float:
    """The most that a step may cost: as much as the dense model's, or unguided their share of its FLOPs and 15 %."""
    unguided = row["mode"] in ("factors alone", "after the drop")
    return (1 + TOLERANCE) * row["flops"] if unguided else 1.0


def met(row: dict[str, Any]) -> bool:
    return row["against_dense"] <= target(row)


def show(report: dict[str, Any]) -> None:
    rows = []
    for r in report["rows"]:
        low, high = r["quartiles"]
        rows.append((
            str(r["length"]), f"{r['ratio']:g}", r["mode"], f"{r['seconds']:.3f} s", f"{r['flops']:.2f}",
            f"{r['against_dense']:.2f}", f"{low:.2f} to {high:.2f}", f"{r['target']:.2f}", "met" if r["met"] else "missed",
        ))  # fmt: skip
    columns = ("length", "ratio", "mode", "median", "FLOPs / dense", "time / dense", "quartiles", "target", "")
    machine = report["machine"]
    print_table(columns, rows, title=f"an optimizer step, {machine['device']}, {machine['threads']} thread(s)")


if __name__ == "__main__":
    main()
