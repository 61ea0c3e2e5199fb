"""``lowrank-ft eval``: perplexity, size, speed and task scores of one model, or of two side by side."""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lowrank_ft_cli.options import device_of, dtype_of, folder_bytes, source_of
from torch import Tensor

from lowrank_ft.checkpoints.source import Source, check_causal_lm, check_finite, load_model
from lowrank_ft.console import human_bytes, human_count, print_table
from lowrank_ft.data.encoding import token_ids
from lowrank_ft.data.examples import context_length
from lowrank_ft.data.sources import read_rows, require_column, texts
from lowrank_ft.errors import ConfigError, NonFiniteError
from lowrank_ft.evaluation.lm_eval import load_tasks, run_tasks
from lowrank_ft.evaluation.perplexity import agreement, evaluate_blocks, to_blocks, windows
from lowrank_ft.factorization.plan import count_parameters

_ABOUT_DATA = ("stride", "max_tokens", "block_size")


def run(options: argparse.Namespace) -> None:
    device = device_of(options)
    check(options)
    sources = [source_of(options)]
    if options.baseline:
        sources.append(source_of(options, options.baseline))
    configs = [source.load_config() for source in sources]
    for source, config in zip(sources, configs, strict=True):
        check_causal_lm(config, source)
    block_size = None
    if options.data:  # one for both, or the numbers could not be compared
        sizes = [(getattr(c, "max_position_embeddings", None), s.name) for s, c in zip(sources, configs, strict=True)]
        block_size = min(context_length(options.block_size, positions, name) for positions, name in sizes)
        if options.stride is not None and options.stride > block_size:
            raise ConfigError(f"--stride {options.stride} exceeds the block size {block_size}; lower it")
    read = read_texts(options) if options.data else None
    tasks = load_tasks(options.tasks) if options.tasks else None

    measured = [measure(source, read, tasks, block_size, options, device) for source in sources]
    results: dict[str, Any] = {"model": measured[0].numbers}
    if len(measured) == 2:
        results["baseline"] = measured[1].numbers
        results["difference"] = difference(*(m.numbers for m in measured))
        mine, base = (m.compared for m in measured)
        if mine and base:
            results["agreement"] = compare(mine, base, options)
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        print_results(results, options)


def check(options: argparse.Namespace) -> None:
    """Refuse numbers out of range, and options about what is not measured."""
    if not options.data and not options.tasks:
        raise ConfigError("there is nothing to measure; give --data, --tasks or both")
    for name, least in (("batch_size", 1), ("stride", 1), ("max_tokens", 2), ("limit", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be {least} or more")
    needs = {**dict.fromkeys(_ABOUT_DATA, "data"), "limit": "tasks"}
    for name, other in needs.items():
        if getattr(options, name) is not None and not getattr(options, other):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is about --{other}, which is not given; add --{other} or leave {flag} out")


def read_texts(options: argparse.Namespace) -> Any:
    rows = read_rows(options.data, options.data_split, options.data_config)
    require_column(options.data, [options.text_column], rows.column_names, "choose with --text-column")
    return list(texts(rows, options.text_column, options.data))


@dataclass(frozen=True)
class Measured:
    """A model's numbers; and itself and what it read, where it will be compared on that with the other one."""

    numbers: dict[str, Any]
    compared: "Compared | None" = None


@dataclass(frozen=True)
class Compared:
    """``ids (tokens,)``, and ``blocks`` and ``labels (n, block_size)`` that were cut from it."""

    model: Any
    ids: Tensor
    blocks: Tensor
    labels: Tensor | None


def measure(
    source: Source,
    read: Any,
    tasks: dict[str, Any] | None,
    block_size: int | None,
    options: argparse.Namespace,
    device: str,
) -> Measured:
    """Numbers of one model, under its own tokenizer."""
    folder = source.download()
    tokenizer = source.load_tokenizer()
    model = load_model(source, dtype_of(options), device)
    numbers: dict[str, Any] = {
        "name": source.name,
        "parameters": count_parameters(model),
        "bytes": folder_bytes(folder),
    }
    compared = None
    if block_size is not None:
        ids = torch.from_numpy(token_ids(read, tokenizer)[: options.max_tokens]).long()
        blocks, labels = to_blocks(ids, block_size), None
        if options.stride is not None:
            blocks, labels = windows(ids, block_size, options.stride)
        result = evaluate_blocks(model, blocks, options.batch_size, progress=True, labels=labels)
        if not math.isfinite(result.loss):
            check_finite(model, source.name)
            advice = "correct its config.json" if model.dtype == torch.float32 else "try --dtype float32"
            raise NonFiniteError(f"{source.name}: the loss is {result.loss}, though every weight is a number; {advice}")
        numbers |= {
            "block_size": block_size,
            "stride": options.stride,
            "tokens": result.tokens,
            "loss": result.loss,
            "perplexity": result.perplexity,
            "tokens_per_second": result.tokens_per_second,
        }
        compared = Compared(model, ids, blocks, labels) if options.baseline else None
    if tasks:
        scores = run_tasks(model, tokenizer, tasks, options.batch_size, options.limit)
        numbers["tasks"] = {task: {m: asdict(score) for m, score in s.items()} for task, s in scores.items()}
    return Measured(numbers, compared)


def compare(mine: Compared, base: Compared, options: argparse.Namespace) -> dict[str, Any] | None:
    """Agreement with the baseline; None, and a note, where the two do not read the text as the same tokens."""
    sizes = [c.model.config.get_text_config().vocab_size for c in (mine, base)]
    reason = ""
    if sizes[0] != sizes[1]:
        reason = f"the vocabularies have {sizes[0]} and {sizes[1]} tokens"
    elif not torch.equal(mine.ids, base.ids):
        reason = "the tokenizers cut the text into different tokens"
    if reason:
        print(f"note: no agreement with the baseline is shown, because {reason}", file=sys.stderr)
        return None
    found = agreement(mine.model, base.model, mine.blocks, options.batch_size, progress=True, labels=mine.labels)
    return asdict(found)


def difference(mine: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Model minus baseline, of every number that both have."""
    keys = ("parameters", "bytes", "loss", "perplexity", "tokens_per_second")
    found: dict[str, Any] = {key: mine[key] - base[key] for key in keys if key in mine}
    if "tasks" in mine:
        found["tasks"] = {
            task: {metric: score["value"] - base["tasks"][task][metric]["value"] for metric, score in scores.items()}
            for task, scores in mine["tasks"].items()
        }
    return found


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
    if options.tasks:
        print_tasks([r["tasks"] for r in models])


def _change(key: str, mine: float, base: float) -> str:
    return f"{mine - base:+.4f}" if key == "loss" else f"{mine / base - 1:+.1%}"


def print_tasks(models: list[Any]) -> None:
    rows = []
    for task, scores in models[0].items():
        for metric, score in scores.items():
            values = [scores_of[task][metric]["value"] for scores_of in models]
            shown = [task, metric, "" if score["items"] is None else str(score["items"]), f"{values[0]:.4f}"]
            shown += [f"{values[1]:.4f}", f"{values[0] - values[1]:+.4f}"] if len(values) == 2 else []
            shown.append("" if score["stderr"] is None else f"{score['stderr']:.4f}")
            rows.append(shown)
    middle = ["baseline", "difference"] if len(models) == 2 else []
    print_table(["task", "metric", "items", "model", *middle, "standard error"], rows)
