"""``lowrank-ft eval``: perplexity, size, speed, task scores and replies of one model, or of two side by side."""

import argparse

from lowrank_ft_cli.arguments import add_device, add_dtype, add_model, add_text
from lowrank_ft_cli.asked import check_models

HELP = "measure perplexity, size, speed, task scores and replies, alone or against a baseline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_text(parser, "a text, jsonl or parquet file, or a dataset on the Hub", batches_of="sequences, items or prompts")
    parser.add_argument("--baseline", metavar="MODEL", help="a second model, such as the dense one, to compare with")
    parser.add_argument(
        "--stride", type=int, metavar="N",
        help="overlap the sequences: each begins N tokens after the one before, and only its new tokens count",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, metavar="N", help="use only the first N tokens of the text")
    parser.add_argument(
        "--tasks", nargs="+", metavar="NAME",
        help="tasks of lm-evaluation-harness: names, YAML files, or folders of these (needs lowrank-ft[eval])",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first N items of each task, or prompts")
    parser.add_argument(
        "--cache-dir", metavar="DIR",
        help="keep the models' answers to tasks in this folder: the same command goes on where a killed run was",
    )  # fmt: skip
    parser.add_argument(
        "--talk", action="store_true",
        help="let a chat model reply to prompts: agreement with the baseline, repetition, stopping",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", metavar="DATA",
        help="the prompts, which means --talk: a .txt file with one a line, or a jsonl or parquet file or dataset with a "
        "column prompt or messages (default: 16 of our own)",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of a reply, at most (default: 128)")
    parser.add_argument("--json", action="store_true", help="print the numbers, and all replies, as JSON")
    add_dtype(parser, "float32 on a CPU, which is faster there, else that of the checkpoint")
    add_device(parser)


def run(options: argparse.Namespace) -> None:
    check_models(options.model, options.baseline)

    from lowrank_ft_cli.run_evaluate import evaluate

    evaluate(options)
