"""``lowrank-ft eval``: perplexity, size and speed of one model, or of two side by side."""

import argparse
import json
from typing import Any

import torch
from lowrank_ft_cli.options import device_of, dtype_of, folder_bytes, source_of

from lowrank_ft.console import human_bytes, human_count, print_table
from lowrank_ft.errors import ConfigError, DataError
from lowrank_ft.evaluation import context_length, evaluate_blocks, to_blocks
from lowrank_ft.hub.source import Source, check_causal_lm, load_model
from lowrank_ft.plan import count_parameters
from lowrank_ft.training.data import read_rows, token_ids


def run(options: argparse.Namespace) -> None:
    device = device_of(options)
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size is {options.batch_size}; it must be 1 or more")
    sources = [source_of(options)]
    if options.baseline:
        sources.append(source_of(options, options.baseline))
    for source in sources:
        check_causal_lm(source.load_config(), source)
    rows = read_rows(options.data, options.data_split, options.data_config)
    if options.text_column not in rows.column_names:
        raise DataError(
            f"{options.data} has no column {options.text_column!r}; it has {', '.join(rows.column_names)}; "
            "choose with --text-column"
        )
    results = [measure(s, rows[options.text_column], options, device) for s in sources]
    if options.json:
        keys = ("model", "baseline")[: len(results)]
        print(json.dumps(dict(zip(keys, results, strict=True)), indent=2))
        return
    columns = ("model", "parameters", "on disk", "perplexity", "loss", "tokens/s")
    table = [
        (r["name"], human_count(r["parameters"]), human_bytes(r["bytes"]), f"{r['perplexity']:.3f}", f"{r['loss']:.4f}",
         f"{r['tokens_per_second']:,.0f}")
        for r in results
    ]  # fmt: skip
    if len(results) == 2:
        mine, base = results
        table.append(
            ("difference", f"{mine['parameters'] / base['parameters'] - 1:+.1%}", f"{mine['bytes'] / base['bytes'] - 1:+.1%}",
             f"{mine['perplexity'] / base['perplexity'] - 1:+.1%}", f"{mine['loss'] - base['loss']:+.4f}",
             f"{mine['tokens_per_second'] / base['tokens_per_second'] - 1:+.1%}")
        )  # fmt: skip
    print_table(columns, table, title=f"{options.data}: {results[0]['tokens']:,} tokens")


def measure(source: Source, texts: Any, options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Numbers of one model, under its own tokenizer."""
    folder = source.download()
    tokenizer = source.load_tokenizer()
    model = load_model(source, dtype_of(options), device)
    block_size = context_length(options.block_size, getattr(model.config, "max_position_embeddings", None), source.name)
    ids = torch.from_numpy(token_ids(texts, tokenizer)).long()
    result = evaluate_blocks(model, to_blocks(ids, block_size), options.batch_size, progress=True)
    return {
        "name": source.name,
        "parameters": count_parameters(model),
        "bytes": folder_bytes(folder),
        "block_size": block_size,
        "tokens": result.tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "tokens_per_second": result.tokens_per_second,
    }
