"""Full disks, read-only folders and odd names: one sentence and nothing left behind, or a usable result.

A full disk is a small tmpfs; where mounting is not permitted, a limit on the size of a file stands for it. A read-only
folder is the same tmpfs mounted anew, as root may write where permissions forbid it.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.reliability import materials
from tests.reliability.mutants import Worker, in_this_process, is_internal, unusable_checkpoint

_STEP = materials.CHECKPOINT
COMMANDS = ("convert", "export", "merge", "finetune", "report")
SIZES = {
    "convert": ("64k", "256k", "500k", "900k"),
    "export": ("64k", "256k", "500k", "900k"),
    "merge": ("64k", "256k", "500k", "900k"),
    "finetune": ("64k", "256k", "500k", "900k", "1500k", "2500k", "3M", "3500k", "4M", "5M"),
    "report": ("4k", "32k", "128k"),
}
NAMES = {
    "spaces": "a  name with spaces ", "brackets": "[a]*{b}?(c)", "newline": "two\nlines", "unicode": "größe-模型-é",
    "leading dash": "-x", "quote": "it's \"so\" $HOME `x`", "percent": "%41&<b>", "equals": "a=b", "colon": "a:b",
    "dot": ".hidden",
    "long": "n" * 230, "too long": "n" * 300, "very long path": "/".join(["d" * 200] * 12),
    "file is in the way": "file/below", "not UTF-8": b"\xff\xfe".decode(errors="surrogateescape"),
}  # fmt: skip


def run(root: Path, seed: int, done: set[str], only: str = "") -> Iterator[dict[str, Any]]:
    """The results of the cases that are not ``done``."""
    inputs = materials.make(root / "inputs")
    todo: list[tuple[str, str, str]] = []
    for command in COMMANDS:
        todo += [("full disk", command, size) for size in SIZES[command]]
        todo += [("read-only", command, "")]
        todo += [("odd output", command, name) for name in NAMES]
        todo += [("odd input", command, name) for name in NAMES if name not in ("too long", "file is in the way")]
    worker = Worker(run_case)
    try:
        for kind, command, which in todo:
            case = {"id": f"{seed}/{kind}/{command}/{which}", "target": f"{kind}: {command}"}
            if case["id"] not in done and only in case["id"]:
                facts = {**case, "root": str(root), "inputs": str(inputs), "what": (kind, command, which)}
                yield worker.run(facts) if kind.startswith("odd") else run_case(facts)
    finally:
        worker.stop()


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Run and judge; odd names in this process, the others in a fresh one, which a full disk may end."""
    root, (kind, command, which) = Path(case["root"]), case["what"]
    folder = root / "disk" / re.sub(r"\W", "_", case["id"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    verdict, message = _CASES[kind](folder, Path(case["inputs"]), command, which)
    if verdict in ("ok", "error"):
        shutil.rmtree(folder)
    shown = {k: case[k] for k in ("id", "target")}
    return {**shown, "verdict": verdict, "message": message.replace(str(root), "ROOT")[-600:]}


def _arguments(command: str, given: Path, out: str) -> list[str]:
    """A command line; ``=`` lets values begin with a dash."""
    if command == "convert":
        return ["convert", str(given / "dense"), "--param-ratio", "0.5", "--method", "svd", f"--output-dir={out}"]
    if command == "export":
        return ["export", str(given / _STEP), f"--output-dir={out}"]
    if command == "merge":
        return ["merge", str(given / "compact"), f"--output-dir={out}"]
    if command == "report":
        return ["report", str(given / "compact"), f"--output={out}"]
    options = [f"--{name}={value}" for name, value in {**materials.SHORT, "save_total_limit": 1}.items()]
    return [
        "finetune",
        f"--model={given / 'compact'}",
        f"--dataset={given / 'text.jsonl'}",
        f"--output-dir={out}",
        *options,
    ]


def _start(
    arguments: list[str], cwd: Path, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    module = "lowrank_ft_cli.main"
    if arguments[0] == "finetune":  # the launcher needs seconds and changes nothing
        module, arguments = "lowrank_ft_recipes.finetune", arguments[1:]
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=materials.environment(), capture_output=True, text=True, errors="replace", timeout=120,
        preexec_fn=before,
    )  # fmt: skip


def _here(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(arguments, *in_this_process(arguments, cwd))


def _judge(done: subprocess.CompletedProcess[str], command: str, out: Path, room: Path) -> tuple[str, str]:
    """The verdict; ``room`` is the folder in which nothing may be left after an error."""
    err = done.stderr
    if done.returncode < 0:
        return "crash", f"ended by signal {-done.returncode}: {err}"
    if "Traceback (most recent call last)" in err:
        return "traceback", err
    if done.returncode == 0:
        if command == "report":
            problem = (
                None if out.is_file() and out.read_text().rstrip().endswith("</html>") else "the page is not whole"
            )
        else:
            problem = unusable_checkpoint(out)
        return ("silent", f"{problem}; {err}") if problem else ("ok", "")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    if len(errors) != 1 or is_internal(errors[0]) or err.rstrip().splitlines()[-1] != errors[0]:
        return "internal", err
    left = [p.name for p in room.rglob("*") if p.name not in ("lost+found", "file")]
    if command == "finetune":  # records and whole checkpoints stay; what is there may not look like a result
        left = [n for n in left if (n == "config.json" and (out / n).exists()) or n.endswith((".partial", ".draft"))]
    return ("half", f"{left[:5]}; {err}") if left else ("error", errors[0])


def _full_disk(folder: Path, inputs: Path, command: str, size: str) -> tuple[str, str]:
    with small_disk(folder / "small", size) as limit:
        out = folder / "small" / ("page.html" if command == "report" else "out")
        done = _start(_arguments(command, inputs, str(out)), folder, limit)
        verdict, message = _judge(done, command, out, folder / "small")
        if verdict != "error" or command != "finetune":
            return verdict, message
        # What it advises, on a larger disk.
        shutil.copytree(folder / "small", folder / "large")
    flags = ["--resume-from-checkpoint=auto"] if "--resume-from-checkpoint auto" in message else []
    flags += ["--overwrite-output-dir"] if "--overwrite-output-dir" in message else []
    if not flags and any((folder / "large").iterdir()):
        return "no way on", message
    done = _start([*_arguments(command, inputs, str(folder / "large" / "out")), *flags], folder)
    again, further = _judge(done, command, folder / "large" / "out", folder / "large")
    return (verdict, message) if again == "ok" else ("no way on", f"{message} / {again}: {further}")


def _read_only(folder: Path, inputs: Path, command: str, _: str) -> tuple[str, str]:
    with small_disk(folder / "small", "3M", read_only=True):
        out = folder / "small" / ("page.html" if command == "report" else "out")
        return _judge(_start(_arguments(command, inputs, str(out)), folder), command, out, folder / "small")


def _odd_output(folder: Path, inputs: Path, command: str, which: str) -> tuple[str, str]:
    room = folder / "room"
    room.mkdir()
    (room / "file").write_text("x")
    name = NAMES[which] + (".html" if command == "report" else "")
    done = _here(_arguments(command, inputs, name), room)
    return _judge(done, command, room / name, room)


def _odd_input(folder: Path, inputs: Path, command: str, which: str) -> tuple[str, str]:
    room = folder / "room"
    room.mkdir()
    try:
        given = folder / NAMES[which]
        shutil.copytree(inputs, given)
    except OSError as error:
        return "ok", f"the system has no such names: {error.strerror}"
    out = room / ("page.html" if command == "report" else "out")
    return _judge(_here(_arguments(command, given, str(out)), room), command, out, room)


_CASES = {"full disk": _full_disk, "read-only": _read_only, "odd output": _odd_output, "odd input": _odd_input}


@contextmanager
def small_disk(folder: Path, size: str, read_only: bool = False) -> Iterator[Callable[[], None] | None]:
    """A folder on a disk of its own; gives what has to limit the command instead where nothing can be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode == 0:
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        try:
            yield None
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
        return
    if read_only:
        folder.chmod(0o555)
        yield None
        folder.chmod(0o755)
        return
    unit = {"k": 2**10, "M": 2**20}[size[-1]]

    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size[:-1]) * unit,) * 2)

    yield limit
