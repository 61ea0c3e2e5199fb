"""All commands of ``lowrank-ft``, and the parser of their flags.

The module of a command has ``HELP``, ``add_arguments`` and ``run``. It imports nothing heavy before it runs, so
``--help`` answers at once.
"""

import argparse
import re
from typing import Any

from lowrank_ft_cli import convert, demo, env, evaluate, export, finetune, merge, plan, pretrain, push, report, tokenize
from lowrank_ft_cli.usage import OneLineParser, Version

COMMANDS: dict[str, Any] = {
    "plan": plan,
    "convert": convert,
    "finetune": finetune,
    "pretrain": pretrain,
    "tokenize": tokenize,
    "eval": evaluate,
    "report": report,
    "export": export,
    "merge": merge,
    "push": push,
    "demo": demo,
    "env": env,
}
EXIT_CODES = {
    0: "done",
    1: "failed or interrupted; stderr says why in one line, and `--debug` shows the traceback",
    2: "wrong usage: an unknown command or flag, or one that is missing",
}
PASS_ON = ("finetune", "pretrain")
"""Whatever follows these belongs to a script."""

_DESCRIPTION = """\
Fine-tune a Hugging Face model into a smaller one.

  lowrank-ft plan    MODEL --param-ratio 0.8                        ranks and sizes
  lowrank-ft plan    --preset wei2024-s-r63                         cost of a training from scratch
  lowrank-ft convert MODEL --param-ratio 0.8 --output-dir compact   make a compact checkpoint
  lowrank-ft finetune --model compact --dataset text.jsonl --output-dir tuned
  lowrank-ft eval    tuned --data held-out.txt --baseline MODEL     perplexity, size, speed
  lowrank-ft report  tuned --baseline MODEL                         one HTML page about the model
  lowrank-ft push    tuned --repo-id me/model
  lowrank-ft tokenize texts/ --tokenizer MODEL --output-dir tokens  tokenize a large text once
  lowrank-ft pretrain --preset wei2024-s-r32 --dataset tokens       train a low-rank model from scratch
"""


def build_parser() -> OneLineParser:
    """All commands and their flags; the parser of each is in ``commands``."""
    raw = argparse.RawDescriptionHelpFormatter
    codes = ", ".join(f"{code} {re.split('[;:]', meaning)[0]}" for code, meaning in EXIT_CODES.items())
    parser = OneLineParser(
        prog="lowrank-ft", description=_DESCRIPTION, epilog=f"exit codes: {codes}", formatter_class=raw
    )
    parser.add_argument("--version", action=Version, help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parser.commands = commands.choices
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, help=module.HELP, description=f"{module.HELP[0].upper()}{module.HELP[1:]}.", parents=[common],
            allow_abbrev=False, add_help=name not in PASS_ON,
        )  # fmt: skip
        module.add_arguments(command)
    return parser
