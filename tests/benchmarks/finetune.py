"""Fine-tuning side by side: same model, data, tokens and evaluation; a learning rate of its own for each method.

    PYTHONPATH=. python tests/benchmarks/finetune.py --output tests/benchmarks/results/finetune.json

Every method takes its learning rate from the same grid by a pilot of a quarter of the steps, judged on a slice of the
training text that is not trained on; a grid whose best is at its end grows by a factor of two. Then each runs in full
and is measured on the held-out end of the text, and on general text for what it forgot. Short pilots flatter high
rates, so the peers that train the dense model run at the pilots' second best rate, too, and what counts is the better
of the two *on the test itself*; ours has no such second chance. Pilots have the first of ``--seeds``; what is reported is
the mean over seeds. A run that is broken off goes on where it was: measurements that the output file holds are not
repeated.

"Ours" is what a user does: ``lowrank-ft convert MODEL --param-ratio R --calibration-data TEXT`` once, on general text,
then fine-tuning of the result. "Ours, fitted to the training text" is ``finetune`` from the dense model instead.
"""

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from lowrank_ft.console import print_table
from lowrank_ft.conversion.batches import training_batches, training_calibration
from lowrank_ft.conversion.convert import convert
from lowrank_ft.conversion.guides import attach_guides
from lowrank_ft.conversion.unpivot import unpivot
from lowrank_ft.data.encoding import token_ids
from lowrank_ft.data.examples import pack
from lowrank_ft.training import TrainArguments, Trainer
from lowrank_ft.training.options import AUTO_GUIDE_FROM
from tests.benchmarks import common

GRID = (5e-4, 1e-3, 2e-3, 4e-3)
RATIOS = (0.8, 0.6, 0.4)
GUIDES = ("none", "residual", "dense")
CALIBRATION_TOKENS = 65_536


def methods() -> dict[str, dict[str, Any]]:
    """Name to what it is. ``rate_of`` names the method whose learning rate is used."""
    table: dict[str, dict[str, Any]] = {
        "full fine-tuning": {"kind": "full"},
        "LoRA r16": {"kind": "lora", "rank": 16},
        "LoRA r64": {"kind": "lora", "rank": 64},
        "PiSSA r16": {"kind": "lora", "rank": 16, "init": "pissa"},
        "DoRA r16": {"kind": "lora", "rank": 16, "dora": True},
    }
    for ratio in RATIOS:
        # Merging a trained LoRA and compressing it costs no training of its own.
        for rank in (16, 64):
            table[f"LoRA r{rank}, then whitened SVD, {ratio}"] = {"kind": "lora", "rank": rank, "compress": ratio,
                                                                 "rate_of": f"LoRA r{rank}"}  # fmt: skip
        first = f"whitened SVD, then LoRA r16, {RATIOS[1]}"
        table[f"whitened SVD, then LoRA r16, {ratio}"] = {"kind": "svd-lora", "ratio": ratio, "rate_of": first}
        for guide in GUIDES:
            table[f"ours {ratio}, guide {guide}"] = {"kind": "ours", "ratio": ratio, "guide": guide,
                                                     "rate_of": f"ours {ratio}, guide none"}  # fmt: skip
        table[f"ours {ratio}, fitted to the training text"] = {
            "kind": "direct", "ratio": ratio, "guide": "none", "rate_of": f"ours {ratio}, guide none",
        }  # fmt: skip
    for weight in (0.5, 0.8):
        table[f"ours 0.6, distilled on general text {weight}"] = {
            "kind": "ours", "ratio": 0.6, "guide": "none", "distill": weight, "rate_of": "ours 0.6, guide none",
        }  # fmt: skip
    return table


class Bench:
    """Model and data of one process, and what is compared on them."""

    grid = GRID
    calibration_tokens = CALIBRATION_TOKENS

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.table = options, self.methods()
        tokenizer = common.tokenizer_of(options.model)
        text = common.read_text(options.data)
        cut = int(0.9 * len(text))
        train = pack(token_ids([text[:cut]], tokenizer), options.block_size)
        # Pilots are judged on a slice from the middle: the text is ordered, and its end is the test.
        start = len(train) // 2
        middle = slice(train.starts[start], train.starts[start + len(train) // 20])
        self.pilot = torch.from_numpy(train.ids[middle]).long().view(-1, options.block_size)
        rest = [train.ids[: middle.start], train.ids[middle.stop :]]
        self.train = pack(torch.cat([torch.from_numpy(r) for r in rest]).numpy(), options.block_size)
        self.test = common.blocks_of(text[cut:], tokenizer, options.block_size)
        general = common.blocks_of(common.read_text(options.general), tokenizer, options.block_size)
        self.general = general[torch.linspace(0, len(general) - 1, min(200, len(general))).long()]
        self.other = pack(token_ids([common.read_text(options.other)], tokenizer), options.block_size)
        self.tokenizer = tokenizer

    @staticmethod
    def methods() -> dict[str, dict[str, Any]]:
        return methods()

    def judge(self, model: Any) -> float:
        """What pilots are compared by."""
        return common.perplexity(model, self.pilot)

    def dense(self) -> Any:
        return common.load(self.options.model, self.options.device)

    @staticmethod
    def calibration_data(options: argparse.Namespace, method: dict[str, Any]) -> list[str]:
        """What a conversion is fitted to."""
        return [options.other]

    def build(self, method: dict[str, Any]) -> Any:
        model = self.dense()
        if method["kind"] == "full":
            return model.train()
        guide = None if method.get("guide") in (None, "none") else method["guide"]
        if method["kind"] == "ours":
            converted = common.load(str(conversion_folder(self.options, method)), self.options.device)
            unpivot(converted)
            if guide is not None:
                attach_guides(converted, model, guide)
            return converted
        if method["kind"] == "svd":
            convert(model, param_ratio=method["ratio"], guide=guide)
            return model
        if method["kind"] == "direct":
            data = training_calibration(self.train, self.calibration_tokens, self.options.seed)
            convert(model, param_ratio=method["ratio"], calibration=data, guide=guide)
            return model
        if method["kind"] == "svd-lora":
            self.compress(model, method["ratio"])
            return self.adapt(model, {"rank": 16}, ["U", "V"])
        return self.adapt(model, method, "all-linear")

    def adapt(self, model: Any, method: dict[str, Any], targets: Any) -> Any:
        rank = method["rank"]
        extra: dict[str, Any] = {"init_lora_weights": method["init"]} if "init" in method else {}
        # PiSSA's authors scale by 1, LoRA's users by 2.
        alpha = rank if "init" in method else 2 * rank
        dora = method.get("dora", False)
        return get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=alpha, use_dora=dora, target_modules=targets, **extra)
        )

    def compress(self, model: Any, ratio: float) -> None:
        batches = training_batches(self.train, self.calibration_tokens, self.options.seed)
        common.whitened_svd(model, common.uniform_plan(model, ratio), batches)

    def train_one(self, method: dict[str, Any], rate: float, steps: int) -> Any:
        options = self.options
        model = self.build(method)
        teacher = self.dense() if "distill" in method else None
        with tempfile.TemporaryDirectory() as folder:
            args = TrainArguments(
                output_dir=folder, max_steps=steps, learning_rate=rate, weight_decay=options.weight_decay,
                warmup_ratio=0.05, per_device_train_batch_size=options.batch_size, seed=options.seed,
                guided_ratio=method.get("guided_ratio", TrainArguments.guided_ratio),
                distill_weight=method.get("distill", 0.0), logging_steps=steps, load_best_model_at_end=False,
            )  # fmt: skip
            other = self.other if teacher is not None else None
            Trainer(model, args, self.train, None, teacher=teacher, distill_data=other).train()
        return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model

    def measure(self, model: Any, form: str = "factors") -> dict[str, Any]:
        return {
            "parameters": common.stored_parameters(model, form),
            "test_perplexity": common.perplexity(model, self.test),
            "general_perplexity": common.perplexity(model, self.general),
        }


def conversion_folder(options: argparse.Namespace, method: dict[str, Any]) -> Path:
    both = "-and-training-data" if method.get("calibrated_on_both") else ""
    return options.work / f"{Path(options.model).name}-{method['ratio']}{both}"


def convert_all(options: argparse.Namespace, methods: list[dict[str, Any]], kind: type[Bench]) -> None:
    """The conversions that fine-tuning starts from, by the command; kept in ``--work`` for the next time."""
    for method in methods:
        folder = conversion_folder(options, method)
        if not folder.is_dir():
            command = ["convert", options.model, "--param-ratio", str(method["ratio"])]
            for data in kind.calibration_data(options, method):
                command += ["--calibration-data", data]
            command += ["--output-dir", str(folder), "--device", options.device]
            subprocess.run([sys.executable, "-m", "lowrank_ft_cli.main", *command], check=True)


_bench: Bench | None = None


def bench() -> Bench:
    """Model and data of this worker."""
    assert _bench is not None
    return _bench


def workers(options: argparse.Namespace, kind: type[Bench] = Bench) -> concurrent.futures.ProcessPoolExecutor:
    """Processes that share the machine's threads, each with a :func:`bench` of its own."""
    threads = max(1, torch.get_num_threads() // options.workers)
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(options.workers, context, _start_worker, (options, threads, kind))


def _start_worker(options: argparse.Namespace, threads: int, kind: type[Bench]) -> None:
    global _bench
    torch.set_num_threads(threads)
    _bench = kind(options)


def pilot(name: str, rate: float) -> tuple[str, float, float]:
    """Perplexity on what was kept from the training text."""
    steps = max(1, bench().options.max_steps // 4)
    model = bench().train_one(bench().table[name], rate, steps)
    return name, rate, bench().judge(model)


def full_run(names: list[str], rate: float, seed: int) -> list[dict[str, Any]]:
    """Train once; a further name takes the trained model and compresses it."""
    bench().options.seed = seed
    start = time.monotonic()
    table, rows = bench().table, list[dict[str, Any]]()
    model = bench().train_one({**table[names[0]], "compress": None}, rate, bench().options.max_steps)
    seconds = round(time.monotonic() - start, 1)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for name in names:
        if table[name].get("compress"):
            model = bench().dense()
            model.load_state_dict(state)
            bench().compress(model, table[name]["compress"])
        form = "pivoted" if table[name]["kind"] in ("ours", "direct") else "factors"  # the peers' own is plain
        row = {"method": name, "learning_rate": rate, "seed": seed, "train_seconds": seconds}
        rows.append({**row, **bench().measure(model, form)})
    return rows


def choose_rates(
    pool: Any, families: list[str], report: dict[str, Any], save: Any, table: dict[str, dict[str, Any]]
) -> dict[str, list[float]]:
    """Rates of each family, the best of its pilots first."""
    found: dict[str, dict[float, float]] = {
        f: {float(r): p for r, p in report["pilots"].get(f, {}).items()} for f in families
    }
    while True:
        wanted = [(f, r) for f in families for r in common.missing_rates(found[f], table[f].get("grid", GRID), 3)]
        if not wanted:
            return {f: sorted(found[f], key=lambda r, f=f: found[f][r]) for f in families}
        for _, (name, rate, result) in common.as_completed(pool, pilot, wanted):
            found[name][rate] = result
            report["pilots"][name] = {f"{r:g}": p for r, p in sorted(found[name].items())}
            save()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Data and size of the runs."""
    common.add_common(parser)
    data = common.SHARED / "data"
    parser.add_argument("--data", default=str(data / "shakespeare.txt"), help="first 90 %% trains, last 10 %% tests")
    parser.add_argument("--general", default=str(data / "heldout.txt"), help="text to measure forgetting on")
    parser.add_argument("--other", default=str(data / "calibration.txt"), help="general text to convert and distil on")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="conversions are kept there")
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=2 if not torch.cuda.is_available() else 1)
    parser.add_argument("--output", type=Path, default=common.RESULTS / "finetune.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--methods", nargs="+", help="only these, or those that begin so")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="pilots are run with the first")
    options = parser.parse_args()
    report = measure_all(options, Bench)
    report["rows"] = means(report["rows"])
    show(report)
    draw(report, options.output.with_suffix(".png"))


def measure_all(options: argparse.Namespace, kind: type[Bench]) -> dict[str, Any]:
    """Choose rates and train what was asked for and is not in ``--output`` yet; all rows, by method."""
    options.seed = options.seeds[0]
    table = kind.methods()
    chosen = [n for n in table if not options.methods or any(wanted(m, n, table) for m in options.methods)]
    report: dict[str, Any] = {
        "machine": common.machine(options.device), "model": Path(options.model).name, "data": Path(options.data).name,
        "max_steps": options.max_steps, "tokens": options.max_steps * options.batch_size * options.block_size,
        "weight_decay": options.weight_decay, "grid": list(kind.grid), "pilots": {}, "rows": [],
    }  # fmt: skip
    if options.output.is_file():
        earlier = json.loads(options.output.read_text(encoding="utf-8"))
        if all(earlier.get(k) == report[k] for k in ("model", "data", "max_steps", "tokens", "weight_decay")):
            report = {**report, "pilots": earlier["pilots"], "rows": earlier["rows"]}

    def save() -> None:
        common.write_json(options.output, report)

    convert_all(options, [table[n] for n in chosen if table[n]["kind"] == "ours"], kind)
    with workers(options, kind) as pool:
        families = list(dict.fromkeys(table[n].get("rate_of", n) for n in chosen))
        rates = choose_rates(pool, families, report, save, table)
        have = {(r["method"], r["learning_rate"], r["seed"]) for r in report["rows"]}
        full: list[tuple[list[str], float, int]] = []
        for names in jobs_of(chosen, table):
            family = table[names[0]].get("rate_of", names[0])
            first = table[names[0]]
            tries = 2 if first["kind"] in ("full", "lora") and not first.get("compress") else 1
            for rate, seed in itertools.product(rates[family][:tries], options.seeds):
                missing = [n for n in names if (n, rate, seed) not in have]
                if missing:
                    full.append((missing, rate, seed))
        for _, rows in common.as_completed(pool, full_run, full):
            report["rows"] += rows
            save()
    report["dense"] = kind(options).measure(common.load(options.model, options.device))
    order = {name: i for i, name in enumerate(table)}
    report["rows"].sort(key=lambda r: (order[r["method"]], r["learning_rate"], r["seed"]))
    save()
    return report


def wanted(given: str, name: str, table: dict[str, Any]) -> bool:
    """The name of a method means that method; anything else means all that begin so."""
    return name == given if given in table else name.startswith(given)


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over the seeds of each method at each learning rate; of two rates, the better one.

    ``standard_error`` is that of the mean of ``test_perplexity``, None with a single seed.
    """
    found: dict[str, dict[str, Any]] = {}
    for (name, _), group in itertools.groupby(rows, key=lambda r: (r["method"], r["learning_rate"])):
        members = list(group)
        scores = [r["test_perplexity"] for r in members]
        error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
        row = {**members[0], "seeds": len(members), "standard_error": error}
        row |= {k: statistics.mean(r[k] for r in members) for k in row if k.endswith(("perplexity", "seconds"))}
        if name not in found or row["test_perplexity"] < found[name]["test_perplexity"]:
            found[name] = row
    return list(found.values())


def jobs_of(names: list[str], table: dict[str, dict[str, Any]]) -> list[list[str]]:
    """One job per training: a method, and those that only compress what it trained."""
    jobs: dict[str, list[str]] = {}
    for name in names:
        key = table[name]["rate_of"] if table[name].get("compress") else name
        jobs.setdefault(key, []).append(name)
    return [sorted(job, key=lambda n: bool(table[n].get("compress"))) for job in jobs.values()]


def show(report: dict[str, Any]) -> None:
    dense = report["dense"]
    rows = [("dense, zero-shot", f"{dense['parameters']:,}", "", f"{dense['test_perplexity']:.2f}",
             "", f"{dense['general_perplexity']:.1f}", "")]  # fmt: skip
    for r in report["rows"]:
        error = "" if r["standard_error"] is None else f"± {r['standard_error']:.2f}"
        perplexities = (f"{r['test_perplexity']:.2f}", error, f"{r['general_perplexity']:.1f}")
        rows.append((r["method"], f"{r['parameters']:,}", f"{r['learning_rate']:g}", *perplexities,
                     f"{r['train_seconds']:.0f}"))  # fmt: skip
    columns = ("method", "parameters", "rate", "held-out", "error", "general text", "seconds")
    print_table(columns, rows, title=f"{report['model']} on {report['data']}, {report['tokens']:,} tokens: perplexity")
    for line in verdicts({r["method"]: r for r in report["rows"]}):
        print(line)


def verdicts(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The targets, met or missed, for what was measured."""
    lines: list[str] = []

    def check(what: str, ours: str, theirs: str, slack: float = 1.0) -> None:
        if ours in rows and theirs in rows:
            mine, limit = rows[ours]["test_perplexity"], rows[theirs]["test_perplexity"] * slack
            lines.append(f"{'met' if mine <= limit else 'MISSED'}: {what}: {mine:.2f}, wanted at most {limit:.2f}")

    default = {r: f"ours {r}, guide {'residual' if r >= AUTO_GUIDE_FROM else 'none'}" for r in RATIOS}
    for ratio, slack in ((0.8, 1.0), (0.6, 1.02), (0.4, 1.07)):
        check(f"{ratio} within {slack - 1:.0%} of full fine-tuning", default[ratio], "full fine-tuning", slack)
    check("0.6 better than LoRA r64 on the dense model", default[0.6], "LoRA r64")
    check("0.4 better than LoRA r16 on the dense model", default[0.4], "LoRA r16")
    for ratio in RATIOS:
        for peer in ("LoRA r16, then whitened SVD", "LoRA r64, then whitened SVD", "whitened SVD, then LoRA r16"):
            check(f"{ratio} better than {peer}", default[ratio], f"{peer}, {ratio}")
    return lines + forgetting(rows)


def forgetting(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Whether a setting of ours is at least as good as LoRA r16 on the plays, and forgets no more."""
    peer = rows.get("LoRA r16")
    ours = [(n, r) for n, r in rows.items() if n.startswith("ours") and "distilled" in n]
    if peer is None or not ours:
        return []
    as_good = [(n, r) for n, r in ours if r["test_perplexity"] <= peer["test_perplexity"]]
    name, best = min(as_good or ours, key=lambda nr: nr[1]["general_perplexity"])
    met = bool(as_good) and best["general_perplexity"] <= peer["general_perplexity"]
    return [
        f"{'met' if met else 'MISSED'}: forgets no more than LoRA r16 at equal perplexity: {name}: "
        f"{best['test_perplexity']:.2f} on the plays and {best['general_perplexity']:.1f} on general text; LoRA r16 "
        f"{peer['test_perplexity']:.2f} and {peer['general_perplexity']:.1f}"
    ]


def draw(report: dict[str, Any], path: Path) -> None:
    """Held-out perplexity against parameters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5.4), layout="constrained")
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        name = row["method"]
        if name.startswith("ours"):
            key = ", ".join(["ours", *name.split(", ")[1:]])
        else:
            key = name.rpartition(", ")[0] if name.rpartition(", ")[2].startswith("0.") else name
        lines.setdefault(key, []).append(row)
    colors = plt.cm.tab20.colors
    for i, (key, rows) in enumerate(lines.items()):
        rows.sort(key=lambda r: r["parameters"])
        x, y = [r["parameters"] / 1e6 for r in rows], [r["test_perplexity"] for r in rows]
        axis.plot(x, y, "o-" if len(rows) > 1 else "D", color=colors[i % 20], ms=6, lw=1.4, label=key)
    axis.set(xlabel="parameters of the final model (millions)", ylabel="perplexity on what was learned", yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set_title(f"{report['model']} fine-tuned on {report['data']}, {report['tokens']:,} tokens")
    axis.grid(alpha=0.25, which="both")
    axis.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
