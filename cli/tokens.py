"""``lowrank-ft tokenize``: a text of any size to token files. (A module ``tokenize`` would hide Python's own.)"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lowrank_ft_cli.options import shard_bytes

from lowrank_ft.checkpoints.source import Source
from lowrank_ft.console import human_bytes
from lowrank_ft.data.documents import Corpus
from lowrank_ft.data.token_writer import write_token_files


def run(options: argparse.Namespace) -> int:
    most = shard_bytes(options)
    corpus = Corpus(
        options.dataset, options.glob, options.exclude, options.text_column, options.data_config, options.data_split,
        options.data_revision, options.token,
    )  # fmt: skip
    name = options.tokenizer  # a folder here means nothing elsewhere
    shown_name = Path(name).name if Path(name).is_absolute() else name
    source = Source(name, options.revision, options.trust_remote_code, options.token)
    try:
        index = write_token_files(
            corpus, source.load_tokenizer(alone=True), shown_name, options.output_dir,
            held_out=options.held_out, max_shard_bytes=most, overwrite=options.overwrite, progress=True,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from the last whole file", file=sys.stderr)
        return 1
    summary = summarize(index, options.output_dir)
    print(json.dumps(summary, indent=2) if options.json else shown(summary))
    return 0


def summarize(index: dict[str, Any], output_dir: str) -> dict[str, Any]:
    """What ``--json`` prints."""
    keys = ("documents", "tokens", "dtype", "tokenizer")
    shards = index["shards"]
    size = sum(shard["bytes"] for shard in shards)
    return {"output_dir": output_dir, **{k: index[k] for k in keys}, "shards": len(shards), "bytes": size}


def shown(summary: dict[str, Any]) -> str:
    lines = []
    for key in ("documents", "tokens"):
        counts = summary[key]
        lines.append(f"{key:<10} {sum(counts.values()):,} ({counts['held_out']:,} of them held out)")
    lines.append(f"{'shards':<10} {summary['shards']}, {human_bytes(summary['bytes'])}, {summary['dtype']}")
    lines.append(summary["output_dir"])
    return "\n".join(lines)
