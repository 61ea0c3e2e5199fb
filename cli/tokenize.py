"""``lowrank-ft tokenize``: a text of any size to token files.

With the folder of this file on ``sys.path`` it would hide Python's own ``tokenize``; so the command line is started as
``lowrank-ft`` or ``python -m lowrank_ft_cli.main``, and not as a file.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HELP = "turn text of any size into token files that training maps into memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dataset", nargs="+", help="text, json(l) or parquet files, folders, glob patterns, or datasets on the Hub"
    )
    parser.add_argument("--tokenizer", required=True, metavar="MODEL", help="folder or Hub id with the tokenizer")
    parser.add_argument(
        "--output-dir", required=True,
        help="folder for the result; if the command was killed, run it again to resume",
    )  # fmt: skip
    parser.add_argument(
        "--held-out", type=float, default=0.01, metavar="F",
        help="share of the documents to hold out, chosen by a hash of their text (default: 0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--glob", nargs="+", default=[], metavar="PATTERN",
        help="which files to read in folders, such as '*.py' (default: text, json(l) and parquet, by file extension)",
    )  # fmt: skip
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="NAME",
        help="files and subfolders to leave out, by name, such as site-packages or 'test_*'",
    )  # fmt: skip
    parser.add_argument("--text-column", default="text", help="column that holds the text (default: text)")
    parser.add_argument("--data-split", default="train", help="split of a dataset on the Hub (default: train)")
    parser.add_argument("--data-config", help="configuration of a dataset on the Hub")
    parser.add_argument("--data-revision", help="branch, tag or commit of a dataset on the Hub")
    parser.add_argument("--max-shard-size", default="128MB", help="size limit of each token file (default: 128MB)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace token files in the output folder, finished or not"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--revision", help="branch, tag or commit of the tokenizer on the Hub")
    parser.add_argument("--token", help="Hub token (default: the stored one)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the tokenizer's Python code")


def run(options: argparse.Namespace) -> int:
    from lowrank_ft_cli.options import shard_bytes

    from lowrank_ft.checkpoints.source import Source
    from lowrank_ft.data.documents import Corpus
    from lowrank_ft.data.token_writer import write_token_files

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
        print("error: interrupted; the same command resumes after the last complete file", file=sys.stderr)
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
    from lowrank_ft.console import human_bytes

    lines = []
    for key in ("documents", "tokens"):
        counts = summary[key]
        lines.append(f"{key:<10} {sum(counts.values()):,} ({counts['held_out']:,} of them held out)")
    lines.append(f"{'shards':<10} {summary['shards']}, {human_bytes(summary['bytes'])}, {summary['dtype']}")
    lines.append(summary["output_dir"])
    return "\n".join(lines)
