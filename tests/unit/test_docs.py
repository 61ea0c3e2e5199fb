"""The documentation against the code: generated tables, links, navigation, commands and flags."""

import argparse
import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lowrank_ft_cli.main import build_parser

from lowrank_ft.pretraining.options import PretrainArguments, ScratchArguments
from lowrank_ft.training.options import DataArguments, ModelArguments, TrainArguments, option_names
from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]*`", re.MULTILINE | re.DOTALL)
# At the start of a line (after a prompt, variables, indentation) or of a code span.
COMMAND = re.compile(r"(?:^|`)[ \t]*(?:\$ )?(?:[A-Z_]+=\S+ )*lowrank-ft +([^`\n]*)", re.MULTILINE)


def commands() -> dict[str, argparse.ArgumentParser]:
    return dict(build_parser().commands)


def recipe_flags(command: str) -> set[str]:
    groups = {"finetune": (ModelArguments, TrainArguments), "pretrain": (ScratchArguments, PretrainArguments)}
    if command not in groups:
        return set()
    names = option_names(*groups[command], DataArguments)
    switches = {"load_best_model_at_end", "dense_first_block", "decay_vectors"}
    spelled = {f"--{n}" for n in [*names, *(f"no_{s}" for s in switches)]}
    return spelled | {f.replace("_", "-") for f in spelled} | {"--config", "--help"}


def problems(line: str) -> list[str]:
    """What is unknown in the arguments that follow ``lowrank-ft``; empty where all is well."""
    words = shlex.split(line.replace("...", ""), comments=True)
    flags = [w.partition("=")[0] for w in words]
    if not words or words[0].startswith("-"):
        return [f for f in flags if f not in ("--help", "--version")]
    if words[0] == "COMMAND":
        return []
    parser = commands().get(words[0])
    if parser is None:
        return [words[0]]
    if "--" in flags:
        flags = flags[: flags.index("--")]
    known = set(parser._option_string_actions) | recipe_flags(words[0])
    return [f for f in flags if f.startswith("--") and f not in known]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_generated_tables_are_up_to_date():
    command = [sys.executable, str(ROOT / "docs" / "make_reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_point_to_files(path):
    targets = LINK.findall(CODE.sub("", path.read_text(encoding="utf-8")))
    local = [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:", t)]
    missing = [t for t in local if t and not (path.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_commands_and_flags_exist(path):
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    unknown = {line: found for line in COMMAND.findall(text) if (found := problems(line))}
    assert not unknown


def test_a_wrong_flag_would_be_found():
    assert problems("plan MODEL --rnk 8") == ["--rnk"]
    assert problems("compress MODEL") == ["compress"]
    assert problems("finetune --learning-rate 1 --lerning_rate 1 -- --multi_gpu") == ["--lerning_rate"]
    assert COMMAND.findall("    $ A=1 lowrank-ft plan x --rank 8\nuse `lowrank-ft push`") == ["plan x --rank 8", "push"]


def test_every_command_is_on_the_page():
    text = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert [c for c in commands() if f"\n## {c}\n" not in text] == []


def test_every_page_is_in_the_navigation():
    text = yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    missing = [p for p in PAGES if f"{p.relative_to(ROOT / 'docs').as_posix()}\n" not in text]
    assert not missing


def printed() -> str:
    """Every string of the source that is no docstring, one a line; a NUL stands for each value that is filled in."""
    found = []
    for path in (p for folder in ("lowrank_ft", "cli", "recipes") for p in sorted((ROOT / folder).rglob("*.py"))):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in found)


def test_quoted_messages_are_printed():
    """The first column of every table of messages: its fixed words in one string of the source, in this order."""
    source, quoted = printed(), []
    for page in PAGES:
        for table in re.findall(
            r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"), re.MULTILINE
        ):
            quoted += [
                (page.name, m) for row in table.splitlines() for m in re.findall(r"`([^`]+)`", row.split(" | ")[0])
            ]
    assert len(quoted) >= 20
    for page_name, message in quoted:
        words = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
        assert re.search(".*".join(words), source), f"{page_name} quotes {message!r}, which nothing prints"
