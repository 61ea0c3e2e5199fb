"""What ``lowrank-ft eval`` does: measure, and print the numbers."""

import argparse
import json
import math
from typing import Any

from lowrank_ft_cli.options import device_of, dtype_of, evaluation_settings, source_of

from lowrank_ft.console import human_bytes, human_count, print_table
from lowrank_ft.evaluation.compare import compare


def evaluate(options: argparse.Namespace) -> None:
    device = device_of(options)
    settings = evaluation_settings(options)
    baseline = source_of(options, options.baseline) if options.baseline else None
    results = compare(source_of(options), baseline, settings, dtype_of(options), device, progress=True)
    if options.json:
        print(json.dumps(_without_nan(results), indent=2, allow_nan=False))
    else:
        print_results(results, options)


def _without_nan(value: Any) -> Any:
    """None for NaN and infinity, which JSON has no words for; a metric of a task may be undefined."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_results(results: dict[str, Any], options: argparse.Namespace) -> None:
    models = [results[key] for key in ("model", "baseline") if key in results]
    columns = ["model", "parameters", "on disk"]
    table = [[r["name"], human_count(r["parameters"]), human_bytes(r["bytes"])] for r in models]
    compared = ["parameters", "bytes"]
    title = ""
    if options.data:
        columns += ["perplexity", "loss", "tokens/s"]
        for row, r in zip(table, models, strict=True):
            row += [f"{r['perplexity']:.3f}", f"{r['loss']:.4f}", f"{r['tokens_per_second']:,.0f}"]
        compared += ["perplexity", "loss", "tokens_per_second"]
        title = f"{options.data}: {models[0]['tokens']:,} tokens"
    if len(models) == 2:
        mine, base = models
        table.append(["difference", *(_change(key, mine[key], base[key]) for key in compared)])
    if results.get("agreement"):
        columns += ["KL/token", "same top-1"]
        cells = [f"{results['agreement']['kl']:.4f}", f"{results['agreement']['top1']:.1%}"]
        table = [row + more for row, more in zip(table, (cells, ["", ""], ["", ""]), strict=True)]
    print_table(columns, table, title=title)
    if results.get("talk"):
        print_talk(results)
    if options.tasks:
        print_tasks([r["tasks"] for r in models])
    if results.get("draft"):
        print_draft(results["draft"])


def print_draft(draft: dict[str, Any]) -> None:
    """Whether ``baseline.generate(assistant_model=model)`` would save time."""
    pays = draft["speed_up"] > 1
    many = f"{draft['tokens']} token{'s' * (draft['tokens'] != 1)} at a time"
    print(
        f"draft     speculative decoding of the baseline with this model as its draft {'pays' if pays else 'does not pay'}: "
        f"about {draft['speed_up']:.2f} times as fast ({draft['acceptance']:.1%} of its tokens accepted, {many})"
    )


def _change(key: str, mine: float, base: float) -> str:
    return f"{mine - base:+.4f}" if key == "loss" else f"{mine / base - 1:+.1%}"


def print_talk(results: dict[str, Any]) -> None:
    talk = results["talk"]
    columns, table = ["model", "tokens each", "repeated 4-grams", "ended by itself"], []
    for r in (results[key] for key in ("model", "baseline") if key in results):
        mine = r["talk"]
        table.append([r["name"], f"{mine['reply_tokens']:.1f}", f"{mine['repetition']:.1%}", f"{mine['stopped']:.1%}"])
    if talk.get("agreement"):
        columns += ["KL/token", "same top-1"]
        table[0] += [f"{talk['agreement']['kl']:.4f}", f"{talk['agreement']['top1']:.1%}"]
        table[1] += ["", ""]
    count = len(talk["replies"])
    title = f"replies to {count} prompt{'s' * (count != 1)}, at most {talk['max_new_tokens']} tokens each"
    print_table(columns, table, title=title)


def print_tasks(models: list[Any]) -> None:
    rows = []
    for task, scores in models[0].items():
        for metric, score in scores.items():
            values = [scores_of[task][metric]["value"] for scores_of in models]
            shown = [task, metric, _items(score), f"{values[0]:.4f}"]
            shown += [f"{values[1]:.4f}", f"{values[0] - values[1]:+.4f}"] if len(values) == 2 else []
            shown += ["" if score[key] is None else f"{score[key]:.4f}" for key in ("stderr", "majority", "chance")]
            rows.append(shown)
    middle = ["baseline", "difference"] if len(models) == 2 else []
    print_table(["task", "metric", "items", "model", *middle, "standard error", "majority", "chance"], rows)


def _items(score: dict[str, Any]) -> str:
    items, total = score["items"], score["items_in_all"]
    if items is None:
        return ""
    return f"{items:,}" if total in (None, items) else f"first {items:,} of {total:,}"
