"""From scratch: dense, low-rank and self-guided low-rank models of several sizes, at equal tokens and at equal FLOPs.

    PYTHONPATH=. python tests/benchmarks/pretraining.py
    PYTHONPATH=. python tests/benchmarks/pretraining.py --sizes 1M --tokens 2097152 --rates-of A.json --output B.json
    PYTHONPATH=. python tests/benchmarks/pretraining.py --sizes s --tokens 100000000 --batch-size 64 --block-size 1024

The models are the presets of Wei et al. (2024, arXiv 2406.16450 and 2407.09835), narrower unless ``--sizes s`` asks for
the smallest of theirs: rank a quarter of the hidden size in the FFN, the first block dense. The text is Python's
standard library and the English of ``../shared/data``, tokenized by the command; some files are held out. The learning
rate is chosen from a grid, at full length and with a seed of its own, on held-out blocks that the test does not have:
for the dense model at every size, for the others at the smallest, from where they follow the dense one. ``FLOPs`` are those of
:mod:`lowrank_ft.costs.accounting`, a guide's included while it is computed. A benchmark that is broken off goes on where it
was. Training runs where accelerate puts it: on a GPU if there is one.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lowrank_ft import initialize_lowrank, preset_config
from lowrank_ft.console import print_table
from lowrank_ft.costs.accounting import training_flops
from lowrank_ft.costs.flops import StepCost, attention_scores, step_cost
from lowrank_ft.data.examples import pack
from lowrank_ft.data.tokens import TokenFiles
from lowrank_ft.errors import DivergedError
from lowrank_ft.pretraining.options import PretrainArguments
from lowrank_ft.pretraining.presets import preset
from lowrank_ft.schedule import alpha_at, once_repeated_share
from lowrank_ft.training import DataArguments, Trainer, load_data
from lowrank_ft.training.metrics import METRICS_FILE, read_metrics
from tests.benchmarks import common

SIZES: dict[str, dict[str, int]] = {
    "1M": dict(hidden_size=96, num_hidden_layers=6, num_attention_heads=3),
    "2M": dict(hidden_size=160, num_hidden_layers=6, num_attention_heads=5),
    "4M": dict(hidden_size=192, num_hidden_layers=8, num_attention_heads=6),
    "s": {},  # the preset's own
}
PRESET_WIDTH = 768  # of the smallest preset
GUIDED = 0.5  # share of the steps, at equal tokens
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "low rank": {"kind": "low rank"},
    "self-guided": {"kind": "self-guided"},
    "low rank, dense FLOPs": {"kind": "low rank", "longer": True},
    "self-guided, dense FLOPs": {"kind": "self-guided", "fixed_flops": True},
    "stochastic": {"kind": "self-guided", "guide_mode": "stochastic"},
    "stochastic, dense FLOPs": {"kind": "self-guided", "guide_mode": "stochastic", "fixed_flops": True},
}
FIRST_ONLY = ("stochastic", "stochastic, dense FLOPs")  # run at the smallest size alone
GRID = (1e-3, 2e-3, 4e-3)
PILOT_SEED = 1000
COLORS = {"dense": "#1a202c", "low rank": "#c05621", "self-guided": "#2b6cb0", "stochastic": "#6b46c1"}


def size_of(options: argparse.Namespace, name: str) -> Any:
    """The low-rank preset of this size, for the tokenizer's vocabulary and the tokens of this run."""
    return preset(
        "wei2024-s-r32", vocab_size=options.vocab_size, tokens=options.tokens, sequence_length=options.block_size,
        sequences_per_step=options.batch_size, **SIZES[name],
    )  # fmt: skip


def build(options: argparse.Namespace, size: str, method: dict[str, Any], seed: int) -> Any:
    made = size_of(options, size)
    config = preset_config(made)
    # 0.02 suits a width of 768; narrower linears need more for outputs of the same size, or training starts slowly.
    config.initializer_range *= math.sqrt(PRESET_WIDTH / made.hidden_size)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if method["kind"] != "dense":
        guide = "dense" if method["kind"] == "self-guided" else None
        initialize_lowrank(model, rank=made.rank, guide=guide)
    return model


def planned(
    options: argparse.Namespace, size: str, method: dict[str, Any], cost: StepCost, config: Any
) -> tuple[int, float]:
    """Steps, ``fixed_flops`` not included, and the guided share of them.

    At dense FLOPs the share is the paper's (2406.16450): such that every guided step is repeated once.
    """
    steps = size_of(options, size).steps
    dense, factored = (flops_per_step(options, c, config) for c in (cost.dense, cost.factored))
    if method.get("longer"):
        return int(steps * dense / factored), 0.0
    if not method.get("fixed_flops"):
        return steps, GUIDED
    guide = flops_per_step(options, cost.guided(), config) - factored
    guide *= 0.5 if method.get("guide_mode") == "stochastic" else 1.0
    return steps, once_repeated_share(dense, factored, guide)


def flops_per_step(options: argparse.Namespace, multiply_adds: float, config: Any) -> float:
    """Of a step whose linears take this many multiply-adds per token, forward and backward."""
    scores, _ = attention_scores(config, options.block_size)
    tokens = options.batch_size * options.block_size
    return 2 * tokens * multiply_adds + training_flops(tokens, 0, scores)


def curve(
    options: argparse.Namespace, cost: StepCost, config: Any, method: dict[str, Any], log: Path
) -> list[dict[str, float]]:
    """Held-out loss against the FLOPs spent so far."""
    entries = read_metrics(log)
    guided = next((e["guided_steps"] for e in entries if e.get("event") == "start"), 0)
    stochastic = method.get("guide_mode") == "stochastic"
    base = flops_per_step(options, cost.factored, config)
    extra = flops_per_step(options, cost.guided(), config) - base
    points = []
    for entry in (e for e in entries if "eval_loss" in e):
        step = int(entry["step"])
        shares = (alpha_at(k, guided) if stochastic else 1.0 for k in range(min(step, guided)))
        points.append({"step": step, "flops": step * base + extra * sum(shares), "loss": entry["eval_loss"]})
    return points


def train(size: str, name: str, rate: float, seed: int, blocks: str = "test") -> dict[str, Any]:
    """One run; ``blocks`` are what its loss is measured on, on the way and in the end."""
    options, method = _bench["options"], METHODS[name]
    model = build(options, size, method, seed)
    cost = step_cost(model)  # while it has its guides
    steps, share = planned(options, size, method, cost, model.config)
    with tempfile.TemporaryDirectory() as folder:
        args = PretrainArguments(
            output_dir=folder, max_steps=steps, guided_ratio=share, learning_rate=rate, warmup_ratio=0.05, seed=seed,
            per_device_train_batch_size=options.micro_batch, logging_steps=max(1, steps // 20),
            gradient_accumulation_steps=options.batch_size // options.micro_batch, eval_steps=max(1, steps // 6),
            per_device_eval_batch_size=16,
            guide_mode=method.get("guide_mode", "full"), fixed_flops=method.get("fixed_flops", False),
            load_best_model_at_end=False,
        )  # fmt: skip
        trainer = Trainer(model, args, _bench["train"], _bench[blocks])
        trained = trainer.train()
        points = curve(options, cost, model.config, method, Path(folder) / METRICS_FILE)
    return {
        "size": size, "method": name, "learning_rate": rate, "seed": seed, "steps": trainer.max_steps,
        "guided_steps": trainer.guided_steps, "parameters": sum(p.numel() for p in trained.parameters()),
        "flops": points[-1]["flops"], "loss": points[-1]["loss"], "curve": points,
    }  # fmt: skip


_bench: dict[str, Any] = {}


def _start_worker(options: argparse.Namespace, threads: int) -> None:
    torch.set_num_threads(threads)
    tokenizer = common.tokenizer_of(options.model)
    data = DataArguments(dataset=str(options.tokens_folder), block_size=options.block_size)
    train_data, held_out = load_data(data, tokenizer)
    blocks = torch.stack([held_out[i]["input_ids"] for i in range(len(held_out))])
    test, pilot = (pack(blocks[i::2].flatten().int().numpy(), options.block_size) for i in range(2))
    _bench.update(options=options, train=train_data, pilot=pilot, test=test)


def tokenize(options: argparse.Namespace) -> None:
    if options.tokens_folder.is_dir():
        return
    data = common.SHARED / "data"
    sources = [sysconfig.get_paths()["stdlib"], *(str(data / f"{n}.txt") for n in ("calibration", "shakespeare"))]
    command = ["tokenize", *sources, "--glob", "*.py", "--exclude", "site-packages", "dist-packages", "test"]
    command += ["--tokenizer", options.model, "--held-out", "0.03", "--output-dir", str(options.tokens_folder)]
    subprocess.run([sys.executable, "-m", "lowrank_ft_cli.main", *command], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_common(parser)
    parser.add_argument("--sizes", nargs="+", default=["1M", "2M", "4M"], choices=tuple(SIZES), help="smallest first")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=524_288, help="of a run at equal tokens")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per optimizer step")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences per forward pass")
    parser.add_argument("--rates-of", type=Path, help="result of a shorter run, whose pilots choose the learning rates")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time; they share the threads")
    parser.add_argument("--tokens-folder", type=Path, default=Path("build/benchmarks/pretraining-tokens"))
    parser.add_argument("--output", type=Path, default=common.RESULTS / "pretraining.json")
    options = parser.parse_args()
    if options.batch_size % options.micro_batch:
        parser.error(f"--micro-batch {options.micro_batch} does not divide --batch-size {options.batch_size}")
    tokenize(options)
    options.vocab_size = len(common.tokenizer_of(options.model))
    settings = {
        "model": Path(options.model).name, "grid": list(GRID), "tokens": options.tokens,
        "batch_size": options.batch_size, "block_size": options.block_size, "guided": GUIDED, "smallest": options.sizes[0],
        "text": TokenFiles(options.tokens_folder, options.block_size).fingerprint(),
        "shapes": {size: SIZES[size] for size in options.sizes},
    }  # fmt: skip
    report: dict[str, Any] = {"machine": common.machine(options.device), **settings, "pilots": {}, "rows": []}
    if options.rates_of:
        shorter = json.loads(options.rates_of.read_text(encoding="utf-8"))
        if changed := [k for k, v in settings.items() if k not in ("tokens", "shapes") and shorter[k] != v]:
            parser.error(f"{options.rates_of} was measured with another {changed[0]}")
        report |= {"pilots": shorter["pilots"], "pilots_tokens": shorter["tokens"]}
    if options.output.is_file():
        earlier = json.loads(options.output.read_text(encoding="utf-8"))
        if changed := [k for k, v in settings.items() if earlier.get(k) != v]:
            parser.error(f"{options.output} was measured with another {changed[0]}; name another --output")
        report |= {k: earlier[k] for k in ("pilots", "rows")}
    threads = max(1, torch.get_num_threads() // options.workers)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.workers, context, _start_worker, (options, threads)) as pool:
        rates = choose_rates(pool, options, report)
        have = {(r["size"], r["method"], r["seed"]) for r in report["rows"]}
        jobs = [
            (size, name, rates[size, METHODS[name]["kind"]], seed)
            for size in options.sizes
            for seed in options.seeds
            for name in options.methods
            if (name not in FIRST_ONLY or size == options.sizes[0]) and (size, name, seed) not in have
        ]
        for _, row in common.as_completed(pool, train, jobs):
            report["rows"].append(row)
            report["summary"] = summary(report["rows"])
            common.write_json(options.output, report)
    report["summary"] = summary(report["rows"])
    show(report)
    draw(report, options.output.with_suffix(".png"))


def choose_rates(pool: Any, options: argparse.Namespace, report: dict[str, Any]) -> dict[tuple[str, str], float]:
    """By size and kind, the best of the grid."""
    kinds = sorted({METHODS[name]["kind"] for name in options.methods} | {"dense"})
    smallest = options.sizes[0]
    cells = [(size, "dense") for size in reversed(options.sizes)] + [(smallest, k) for k in kinds if k != "dense"]
    pilots = report["pilots"]
    jobs = [(*cell, rate) for cell in cells for rate in GRID if f"{rate:g}" not in pilots.get(" ".join(cell), {})]
    for (size, kind, rate), loss in common.as_completed(pool, pilot_loss, jobs):
        pilots.setdefault(f"{size} {kind}", {})[f"{rate:g}"] = loss
        common.write_json(options.output, report)
    found = {cell: {rate: _or_inf(pilots[" ".join(cell)][f"{rate:g}"]) for rate in GRID} for cell in cells}
    best = {cell: min(rates, key=lambda r, rates=rates: rates[r]) for cell, rates in found.items()}
    ratios = {kind: best[smallest, kind] / best[smallest, "dense"] for kind in kinds}
    return {(size, kind): best[size, "dense"] * ratio for size in options.sizes for kind, ratio in ratios.items()}


def pilot_loss(size: str, kind: str, rate: float) -> float | None:
    """None where the run diverged."""
    try:
        return float(train(size, kind, rate, PILOT_SEED, "pilot")["loss"])
    except DivergedError:
        return None


def _or_inf(loss: float | None) -> float:
    return math.inf if loss is None else loss


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per size and method: means over seeds, and the difference in loss to the dense model, seed by seed."""
    dense = {(r["size"], r["seed"]): r["loss"] for r in rows if r["method"] == "dense"}
    result = []
    for size in dict.fromkeys(s for s in SIZES if any(r["size"] == s for r in rows)):
        for name in METHODS:
            members = [r for r in rows if (r["size"], r["method"]) == (size, name)]
            gaps = [r["loss"] - dense[size, r["seed"]] for r in members if (size, r["seed"]) in dense]
            if members:
                result.append({
                    "size": size, "method": name, "seeds": len(members), "parameters": members[0]["parameters"],
                    "flops": statistics.mean(r["flops"] for r in members),
                    "loss": statistics.mean(r["loss"] for r in members), "loss_error": _error([r["loss"] for r in members]),
                    "gap": statistics.mean(gaps) if gaps else None, "gap_error": _error(gaps),
                })  # fmt: skip
    return result


def _error(values: list[float]) -> float | None:
    """Standard error of the mean; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def show(report: dict[str, Any]) -> None:
    rows = []
    for s in report["summary"]:
        gap = "" if s["gap"] is None or s["method"] == "dense" else f"{s['gap']:+.3f}"
        error = "" if not gap or s["gap_error"] is None else f"{s['gap_error']:.3f}"
        rows.append((s["size"], s["method"], str(s["seeds"]), f"{s['parameters'] / 1e6:.2f} M", f"{s['flops']:.2e}",
                     f"{s['loss']:.3f}", gap, error))  # fmt: skip
    columns = ("size", "method", "seeds", "parameters", "FLOPs", "loss", "against dense", "std. error")
    print_table(columns, rows, title="from scratch: held-out loss, nats per token")


def draw(report: dict[str, Any], path: Path) -> None:
    """Left: loss against FLOPs, a curve per size, the mean of the seeds. Right: the gap to the dense model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    found = report["summary"]
    sizes = list(dict.fromkeys(s["size"] for s in found))
    for name in METHODS:
        ends = [s for s in found if s["method"] == name]
        if not ends:
            continue
        color = COLORS[name.partition(",")[0]]
        style = {"color": color, "ls": "--" if "FLOPs" in name else "-"}
        for s in ends:
            curves = [r["curve"] for r in report["rows"] if (r["size"], r["method"]) == (s["size"], name)]
            points = [c for c in zip(*curves, strict=True) if c[0]["step"]]
            left.plot([p[0]["flops"] for p in points], [statistics.mean(q["loss"] for q in p) for p in points],
                      alpha=0.35, lw=1, **style)  # fmt: skip
        left.errorbar([s["flops"] for s in ends], [s["loss"] for s in ends], [s["loss_error"] or 0 for s in ends],
                      marker="o", ms=4, capsize=3, label=name, **style)  # fmt: skip
        if name != "dense":
            places = [sizes.index(s["size"]) + 0.05 * list(METHODS).index(name) - 0.2 for s in ends]
            right.errorbar(places, [s["gap"] for s in ends], [s["gap_error"] or 0 for s in ends],
                           marker="o", ms=4, capsize=3, label=name, **style)  # fmt: skip
    left.set(xscale="log", xlabel="training FLOPs", ylabel="held-out loss, nats per token",
             title="dots: ends of training, sizes joined; thin: on the way")  # fmt: skip
    right.axhline(0, color=COLORS["dense"], lw=1)
    right.set_xticks(range(len(sizes)), sizes)
    right.set(xlabel="size of the dense model", ylabel="loss above the dense model's, nats per token")
    left.legend(fontsize=8, handlelength=3.5)
    for axis in (left, right):
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
