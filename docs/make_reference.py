"""Write the tables of ``docs/reference`` that repeat what the code says.

    python docs/make_reference.py            # rewrite them
    python docs/make_reference.py --check    # exit 1 and name the pages that are out of date

A page holds ``<!-- begin generated: NAME -->`` and ``<!-- end generated -->``; what is between them belongs to this
script, everything else to the writer. NAME is an options group of the recipe, a command, ``exit codes``, or
``architectures: GROUP`` for what ``python -m tests.architectures.measure`` found, or ``vllm: TABLE`` for ``make vllm-suite``.
"""

import argparse
import json
import re
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from lowrank_ft_cli.commands import EXIT_CODES, build_parser

from lowrank_ft.pretraining.options import PretrainArguments, ScratchArguments
from lowrank_ft.training.options import DataArguments, ModelArguments, TrainArguments

REFERENCE = Path(__file__).parent / "reference"
GROUPS = {
    "model": ModelArguments, "data": DataArguments, "train": TrainArguments, "scratch": ScratchArguments,
    "pretrain": PretrainArguments,
}  # fmt: skip
ARCHITECTURES = Path(__file__).parent.parent / "tests" / "architectures" / "results.json"
VLLM = Path(__file__).parent.parent / "tests" / "vllm" / "results.json"
REQUIRED = {"model", "dataset"}

_BLOCK = re.compile(r"(<!-- begin generated: (.+?) -->\n).*?(<!-- end generated -->)", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    check = parser.parse_args().check
    stale = []
    for page in sorted(REFERENCE.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = _BLOCK.sub(lambda m: f"{m[1]}\n{table(m[2])}\n\n{m[3]}", before)
        if before != after:
            stale.append(page.name)
            if not check:
                page.write_text(after, encoding="utf-8")
    if stale:
        print(f"{'out of date' if check else 'rewritten'}: {', '.join(stale)}", file=sys.stderr)
    if stale and check:
        print("run python docs/make_reference.py", file=sys.stderr)
        return 1
    return 0


def table(name: str) -> str:
    """The Markdown table that a page asks for by ``name``."""
    if name.startswith("architectures: "):
        return architectures_table(name.partition(": ")[2])
    if name.startswith("vllm: "):
        return vllm_table(name.partition(": ")[2])
    if name == "exit codes":
        return "\n".join(
            ["| exit code | meaning |", "|---|---|", *(f"| {k} | {_cell(v)} |" for k, v in EXIT_CODES.items())]
        )
    return options_table(GROUPS[name]) if name in GROUPS else command_table(name)


def options_table(group: Any) -> str:
    """Those that the group adds, or has another default for, and not the inherited ones."""
    own = group.__annotations__
    rows = ["| option | default | meaning |", "|---|---|---|"]
    rows += [f"| `{f.name}` | {_default(f)} | {_cell(f.metadata['help'])} |" for f in fields(group) if f.name in own]
    return "\n".join(rows)


def command_table(name: str) -> str:
    rows = ["| argument | meaning |", "|---|---|"]
    for action in commands()[name]._actions:
        if action.dest == "help":
            continue
        if not action.option_strings:
            shown = action.dest.upper()
        else:
            value = "" if action.nargs == 0 else f" {action.metavar or _placeholder(action)}"
            shown = f"{action.option_strings[-1]}{value}{' ...' if action.nargs == '+' else ''}"
        needed = " (required)" if action.required and action.option_strings else ""
        rows.append(f"| `{shown}` | {_cell((action.help or '').replace('%%', '%'))}{needed} |")
    return "\n".join(rows)


def architectures_table(group: str) -> str:
    """What tests/architectures/measure.py found, a row for each class of the group."""
    record = json.loads(ARCHITECTURES.read_text(encoding="utf-8"))
    if group == "version":
        count = sum(map(len, record["groups"].values()))
        return f"{count} classes of transformers {record['transformers']}."
    rows = ["| class | `model_type` | factored | stays dense | `AutoModel` and |", "|---|---|---|---|---|"]
    for found in record["groups"][group]:
        dense = "; ".join(f"{why}: {_percent(share)}" for why, share in found["dense"].items())
        classes = ", ".join(name.removeprefix("AutoModelFor") for name in found["loads"] if name != "AutoModel")
        assert "AutoModel" in found["loads"]
        rows.append(
            f"| {found['cls']} | `{found['model_type']}` | {_percent(found['factored'])} | {dense or '-'} | {classes or '-'} |"
        )
    return "\n".join(rows)


def vllm_table(name: str) -> str:
    """What tests/vllm found: ``versions``, ``tokens``, or ``throughput``."""
    record = json.loads(VLLM.read_text(encoding="utf-8"))
    if name == "versions":
        return ", ".join(f"{package} {version}" for package, version in record["versions"].items()) + "."
    if name == "tokens":
        rows = [
            "| model | stored form | processes | tokens equal | largest difference of a log-probability |",
            "|---|---|---:|---|---:|",
        ]
        rows += [
            f"| {r['model']} | {r['form']} | {r['processes']} | {'yes' if r['equal'] else 'NO'} | {r['logprobs differ by']:.1e} |"
            for r in record["tokens"].values()
        ]
        return "\n".join(rows)
    tasks = [key for key in next(iter(record["throughput"].values())) if key != "megabytes"]
    rows = [f"| model | MB on disk | {' | '.join(tasks)} |", f"|---|{'---:|' * (len(tasks) + 1)}"]
    for model, found in record["throughput"].items():
        rows.append(f"| {model} | {found['megabytes']} | {' | '.join(str(found[task]) for task in tasks)} |")
    return "\n".join(rows)


def _percent(share: float) -> str:
    """Never rounded to all, nor to nothing."""
    return "100 %" if share == 1 else f"{100 * share:.1f} %"


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command of ``lowrank-ft`` and its parser."""
    return dict(build_parser().commands)


def _default(field: Field) -> str:
    if field.name in REQUIRED:
        return "must be given"
    value = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
    if value is None or value == []:
        return "not set"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _placeholder(action: argparse.Action) -> str:
    return "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    sys.exit(main())
