"""When does a guide help fine-tuning? By param ratio, length of training and length of the guided phase, with seeds.

    PYTHONPATH=. python tests/benchmarks/guides.py --output tests/benchmarks/results/guides.json

Runs start from what ``lowrank-ft convert`` makes by default (as in ``finetune.py``), and some from plain SVD, which has
seen no text. The seed decides the order of the training data; within a seed, runs differ in the guide alone, so the
difference to no guide is taken seed by seed. A benchmark that is broken off goes on where it was.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from lowrank_ft.console import print_table
from tests.benchmarks import common
from tests.benchmarks.finetune import Bench, add_arguments, bench, convert_all, workers

# The winners of finetune.py, for ours at 0.6 and 0.4; at 0.8 it is next to the winner.
RATES = {"ours": 2e-3, "svd": 2e-3, "full": 1e-3}
STARTS = {"full": "dense model", "ours": "default", "svd": "plain SVD"}  # by kind, see finetune.py
RATIOS = (0.8, 0.6, 0.4, 0.25)


def settings(steps: int) -> list[dict[str, Any]]:
    """What is compared: guides, at equal ``kind``, ``ratio`` and ``steps``."""
    table: list[dict[str, Any]] = []
    for guide, share in (("none", 0.25), ("residual", 0.25), ("residual", 0.5), ("residual", 1.0)):
        for ratio in (0.6, 0.25):
            table.append({"ratio": ratio, "steps": 4 * steps, "guide": guide, "guided_ratio": share})
    for guide in ("none", "residual", "dense"):
        for ratio in RATIOS:
            table.append({"ratio": ratio, "steps": steps, "guide": guide, "guided_ratio": 0.25})
    for share in (0.1, 0.5, 1.0):
        for ratio in (0.6, 0.25):
            table.append({"ratio": ratio, "steps": steps, "guide": "residual", "guided_ratio": share})
    table = [{"kind": "ours", **setting} for setting in table]
    table.insert(0, {"kind": "full", "ratio": 1.0, "steps": 4 * steps, "guide": "none", "guided_ratio": 0.25})
    for guide in ("none", "residual", "dense"):
        for ratio in (0.6, 0.4):
            table.append({"kind": "svd", "ratio": ratio, "steps": steps, "guide": guide, "guided_ratio": 0.25})
    for guide in ("none", "residual"):
        for ratio in (0.8, 0.4):
            table.append({"kind": "ours", "ratio": ratio, "steps": 4 * steps, "guide": guide, "guided_ratio": 0.25})
    return table


def measure(setting: dict[str, Any], seed: int) -> dict[str, Any]:
    bench().options.seed = seed
    model = bench().train_one(setting, RATES[setting["kind"]], setting["steps"])
    return {**setting, "seed": seed, "test_perplexity": common.perplexity(model, bench().test)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(max_steps=75, output=common.RESULTS / "guides.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    report: dict[str, Any] = {
        "machine": common.machine(options.device), "model": Path(options.model).name, "data": Path(options.data).name,
        "learning_rates": RATES,
        "tokens_per_step": options.batch_size * options.block_size, "rows": [],
    }  # fmt: skip
    if options.output.is_file():
        report["rows"] = json.loads(options.output.read_text(encoding="utf-8"))["rows"]
    report["summary"] = summary(report["rows"])
    have = [{k: v for k, v in r.items() if k != "test_perplexity"} for r in report["rows"]]
    jobs = [(s, seed) for seed in options.seeds for s in settings(options.max_steps) if {**s, "seed": seed} not in have]
    convert_all(options, [{"ratio": r} for r in RATIOS], Bench)
    with workers(options) as pool:
        for _, row in common.as_completed(pool, measure, jobs):
            report["rows"].append(row)
            report["summary"] = summary(report["rows"])
            common.write_json(options.output, report)
    show(report)
    draw(report, options.output.with_suffix(".png"))


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per setting: mean perplexity, and the change in log-perplexity against no guide, seed by seed."""
    plain = {_compared(r): r["test_perplexity"] for r in rows if r["guide"] == "none"}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault(tuple(r[k] for k in ("kind", "ratio", "steps", "guide", "guided_ratio")), []).append(r)
    result = []
    for (kind, ratio, steps, guide, share), members in sorted(
        groups.items(), key=lambda kv: (kv[0][0], -kv[0][1], *map(str, kv[0][2:]))
    ):
        changes = [math.log(r["test_perplexity"] / plain[_compared(r)]) for r in members if _compared(r) in plain]
        result.append({
            "kind": kind, "ratio": ratio, "steps": steps, "guide": guide, "guided_ratio": share, "seeds": len(members),
            "perplexity": statistics.mean(r["test_perplexity"] for r in members),
            "change": statistics.mean(changes) if changes else None,
            "standard_error": statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else None,
        })  # fmt: skip
    return result


def _compared(row: dict[str, Any]) -> tuple[Any, ...]:
    """Runs for which this is equal differ in the guide alone."""
    return tuple(row[k] for k in ("kind", "ratio", "steps", "seed"))


def show(report: dict[str, Any]) -> None:
    rows = []
    for s in report["summary"]:
        change = "" if s["guide"] == "none" or s["change"] is None else f"{s['change'] * 100:+.2f} %"
        error = "" if not change or s["standard_error"] is None else f"{s['standard_error'] * 100:.2f} %"
        share = "" if s["guide"] == "none" else f"{s['guided_ratio']:g}"
        rows.append((STARTS[s["kind"]], f"{s['ratio']:g}", str(s["steps"]), s["guide"], share, str(s["seeds"]),
                     f"{s['perplexity']:.2f}", change, error))  # fmt: skip
    columns = ("start", "ratio", "steps", "guide", "guided", "seeds", "perplexity", "against none", "std. error")
    print_table(columns, rows, title=f"{report['model']} on {report['data']}: held-out perplexity")


def draw(report: dict[str, Any], path: Path) -> None:
    """Change against no guide, with standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = [s for s in report["summary"] if s["guide"] != "none" and s["change"] is not None]
    labels = [
        f"{STARTS[s['kind']]}, {s['ratio']:g}, {s['steps']} steps, {s['guide']}, {s['guided_ratio']:g}" for s in found
    ]
    figure, axis = plt.subplots(figsize=(8.5, 0.32 * len(found) + 1.4), layout="constrained")
    # The results hold frozen guides, which were measured and removed.
    colors = {"residual": "#2b6cb0", "frozen": "#718096", "dense": "#c05621"}
    for i, s in enumerate(found):
        error = 100 * (s["standard_error"] or 0)
        axis.errorbar(100 * s["change"], i, xerr=error, fmt="o", color=colors[s["guide"]], capsize=3)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(found)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="held-out perplexity against no guide, %", title="start, param ratio, steps, guide, guided share")
    axis.grid(alpha=0.25, axis="x")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
