"""Zero-shot quality of a converted model, method by method, beside the baseline that people use today.

    PYTHONPATH=. python tests/benchmarks/quality.py --output tests/benchmarks/results/quality.json

The baseline is whitened SVD at uniform ranks, stored as U V (SVD-LLM's formula, in ``common.py``), on the same
calibration text; AA-SVD and MPIFA (``peers.py``) are as their authors describe them. All other methods are pivoted, and so
have larger ranks at the same size. The last methods are what ``lowrank-ft convert --calibration-data FILE`` does at each
``--effort``, and without the option (on text that the model writes), run as commands. Excess is ``ln(ppl) - ln(ppl of the
dense model)``. A run that is broken off goes on where it was: rows that the output file holds are not measured again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowrank_ft.console import print_table
from lowrank_ft.conversion.batches import CALIBRATION_TOKENS, read_batches
from lowrank_ft.conversion.calibration import Calibration, first_batches
from lowrank_ft.conversion.convert import convert
from lowrank_ft.data.sources import read_rows
from lowrank_ft.factorization.plan import count_parameters, make_plan
from tests.benchmarks import common, peers

FIT_TOKENS = 65_536
TARGETS = {0.8: 0.06, 0.6: 0.14, 0.4: 0.17}
BASELINE = "whitened SVD (baseline)"
PIVOTED = "whitened SVD, pivoted"
AA_SVD, MPIFA = "AA-SVD", "MPIFA"  # by formula, in peers.py
PLAIN_FORM = ("plain SVD", BASELINE, AA_SVD)  # stored as U V
DEFAULT = "lowrank-ft convert"
TRAINED = "anchored, loss allocation, refined, distilled"  # once over all of the text, at 1e-3
COMMANDS = {
    f"{DEFAULT} --effort fast": ["--effort", "fast"],
    DEFAULT: [],
    f"{DEFAULT} --effort best": ["--effort", "best"],
    f"{DEFAULT} --calibration-data self": ["--calibration-data", "self"],
}


def methods(options: argparse.Namespace, ratio: float, batches: list[Any]) -> dict[str, Callable[[Any], Any]]:
    """Name to what turns a dense model into that method's, in the order of the ladder."""

    def ours(**settings: Any) -> Callable[[Any], Any]:
        data = {"fit_tokens": CALIBRATION_TOKENS, "distill_learning_rate": 1e-3}
        data |= {k: settings.pop(k, 0) for k in ("refine_epochs", "distill_epochs")}
        return lambda m: convert(m, settings.pop("plan", None), calibration=Calibration(batches, **data), **settings)

    def uniform(**settings: Any) -> Callable[[Any], Any]:
        return lambda m: ours(plan=make_plan(m, param_ratio=ratio), **settings)(m)

    return {
        "plain SVD": lambda m: convert(m, common.uniform_plan(m, ratio)),
        BASELINE: lambda m: common.whitened_svd(m, common.uniform_plan(m, ratio), batches),
        PIVOTED: lambda m: common.whitened_svd(m, make_plan(m, param_ratio=ratio), batches),
        # These fit to as many tokens as ours does.
        AA_SVD: lambda m: peers.aa_svd(m, common.uniform_plan(m, ratio), list(first_batches(batches, FIT_TOKENS))),
        MPIFA: lambda m: peers.mpifa(m, make_plan(m, param_ratio=ratio), list(first_batches(batches, FIT_TOKENS))),
        "anchored": uniform(),
        "anchored, loss allocation": ours(param_ratio=ratio, allocation="loss"),
        "anchored, loss allocation, refined": ours(param_ratio=ratio, allocation="loss", refine_epochs=1),
        TRAINED: ours(param_ratio=ratio, allocation="loss", refine_epochs=1, distill_epochs=1),
        **{name: lambda m: None for name in COMMANDS},
    }


def command_line(options: argparse.Namespace, ratio: float, flags: list[str]) -> Any:
    """The model that the command makes, loaded from what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        data = [] if "--calibration-data" in flags else ["--calibration-data", options.calibration]
        command = ["convert", options.model, "--param-ratio", str(ratio), *data, *flags, "--output-dir", f"{folder}/m"]
        subprocess.run(
            [sys.executable, "-m", "lowrank_ft_cli.main", *command, "--device", options.device],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return common.load(f"{folder}/m", options.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_common(parser)
    data = common.SHARED / "data"
    parser.add_argument("--calibration", default=str(data / "calibration.txt"))
    parser.add_argument("--held-out", nargs="+", default=[str(data / "heldout.txt"), str(data / "wikitext2-test.txt")])
    parser.add_argument("--eval-blocks", type=int, default=400, help="evenly spaced blocks of each text; 0: all")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(TARGETS))
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="methods to run, by their names (default: all)")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "quality.json")
    options = parser.parse_args()

    tokenizer = common.tokenizer_of(options.model)
    texts = {Path(n).name: held_out_blocks(n, tokenizer, options) for n in options.held_out}
    dense = common.load(options.model, options.device)
    batches = read_batches(dense, read_rows(options.calibration), options.calibration, tokenizer, CALIBRATION_TOKENS)
    base = {name: common.perplexity(dense, blocks) for name, blocks in texts.items()}
    report: dict[str, Any] = {
        "machine": common.machine(options.device),
        "model": Path(options.model).name,
        "calibration": {
            "text": Path(options.calibration).name, "tokens": sum(b["input_ids"].numel() for b in batches),
        },
        "block_size": options.block_size,
        "eval_tokens": {n: b.numel() for n, b in texts.items()},
        "dense": {"parameters": count_parameters(dense), "perplexity": base},
        "rows": [],
    }  # fmt: skip
    if options.output.is_file():  # go on where an earlier run stopped
        earlier = json.loads(options.output.read_text(encoding="utf-8"))
        same = ("model", "calibration", "block_size", "eval_tokens")  # the last digits of the dense perplexity vary
        if all(earlier.get(k) == report[k] for k in same):
            report |= {k: earlier[k] for k in ("dense", "rows")}
    have = {(r["param_ratio"], r["method"]) for r in report["rows"]}
    for ratio in options.ratios:
        for name, build in methods(options, ratio, batches).items():
            if (options.only and name not in options.only) or (ratio, name) in have:
                continue
            start = time.monotonic()
            if name in COMMANDS:
                model = command_line(options, ratio, COMMANDS[name])
            else:
                model = common.load(options.model, options.device)
                build(model)
            seconds = time.monotonic() - start
            found = {n: common.perplexity(model, b) for n, b in texts.items()}
            report["rows"].append({
                "param_ratio": ratio, "method": name, "seconds": round(seconds, 1),
                "parameters": common.stored_parameters(model, "factors" if name in PLAIN_FORM else "pivoted"),
                "perplexity": found, "excess": {n: common.excess(p, report["dense"]["perplexity"][n]) for n, p in found.items()},
            })  # fmt: skip
            compare(report)
            common.write_json(options.output, report)
            print(ratio, name, f"{seconds:.0f} s", {n: round(p, 2) for n, p in found.items()}, file=sys.stderr)
    order = list(methods(options, 1.0, batches))
    report["rows"].sort(key=lambda r: (-r["param_ratio"], order.index(r["method"])))
    common.write_json(options.output, report)
    show(report)
    draw(report, options.output.with_suffix(".png"))


def held_out_blocks(name: str, tokenizer: Any, options: argparse.Namespace) -> torch.Tensor:
    blocks = common.blocks_of(common.read_text(name), tokenizer, options.block_size)
    count = min(options.eval_blocks or len(blocks), len(blocks))
    return blocks[torch.linspace(0, len(blocks) - 1, count).long()]


def compare(report: dict[str, Any]) -> None:
    """Put each row's excess over that of the baseline at the same ratio into the report."""
    baselines = {r["param_ratio"]: r["excess"] for r in report["rows"] if r["method"] == BASELINE}
    for row in report["rows"]:
        if row["param_ratio"] in baselines:
            theirs = baselines[row["param_ratio"]]
            row["of_baseline"] = {n: e / theirs[n] for n, e in row["excess"].items()}


def show(report: dict[str, Any]) -> None:
    texts = list(report["dense"]["perplexity"])
    rows = [("dense", "", f"{report['dense']['parameters']:,}", *(f"{report['dense']['perplexity'][t]:.1f}" for t in texts),
             *("" for _ in texts), "")]  # fmt: skip
    for r in report["rows"]:
        shares = [f"{r['of_baseline'][t]:.2f}" if "of_baseline" in r else "" for t in texts]
        perplexities = [f"{r['perplexity'][t]:.1f}" for t in texts]
        seconds = f"{r['seconds']:.0f}"
        rows.append((r["method"], f"{r['param_ratio']}", f"{r['parameters']:,}", *perplexities, *shares, seconds))
    columns = ("method", "ratio", "parameters", *texts, *(f"of baseline, {t}" for t in texts), "seconds")
    print_table(columns, rows, title=f"{report['model']}: perplexity, and excess as a share of the baseline's")
    for r in report["rows"]:
        target = TARGETS.get(r["param_ratio"])
        if target is None or "of_baseline" not in r:
            continue
        for text, share in r["of_baseline"].items():
            if r["method"] == DEFAULT:
                verdict = "met" if share <= target else "MISSED"
                print(f"{verdict}: ratio {r['param_ratio']}, {text}: {share:.3f} of the baseline, wanted {target}")


def draw(report: dict[str, Any], path: Path) -> None:
    """Excess by size, one line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    texts = list(report["dense"]["perplexity"])
    figure, axes = plt.subplots(1, len(texts), figsize=(5.6 * len(texts), 4.6), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(r["method"] for r in report["rows"]))
    for axis, text in zip(axes[0], texts, strict=True):
        for i, name in enumerate(names):
            rows = sorted((r["parameters"], r["perplexity"][text]) for r in report["rows"] if r["method"] == name)
            style = dict(color="black", ls="--") if name == BASELINE else dict(color=plt.cm.viridis(i / len(names)))
            axis.plot([p / 1e6 for p, _ in rows], [q for _, q in rows], marker="o", ms=4, lw=1.5, label=name, **style)
        base = report["dense"]
        axis.plot([base["parameters"] / 1e6], [base["perplexity"][text]], "k*", ms=11, label="dense")
        axis.set(xlabel="parameters of the model (millions)", ylabel="perplexity", yscale="log", title=text)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.25, which="both")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
