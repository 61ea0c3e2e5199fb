"""SIGKILL at random times: afterwards there is no result or a whole one, and going on leads to the same bytes.

Each case starts a command in a process of its own and kills it, most of them from the time on at which an undisturbed run
touches its folder first. Then the same command is started again, and if it refuses, what it advises is done. The processes
are forks of one that has imported everything and done nothing: imports touch no files, and would take most of the time.
"""

import hashlib
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tests.reliability import materials
from tests.reliability.mutants import imported, in_this_process, unusable_checkpoint

# How often each is killed; with --over... an older result is there, with other weights.
COUNTS = {"convert": 20, "convert --overwrite": 5, "finetune": 25, "finetune --overwrite-output-dir": 10}
_TRIES = 4
_EARLY = 0.15  # share of the kills that may fall before the first file
RESUME, OVER = ("--resume-from-checkpoint", "auto"), ("--overwrite-output-dir",)


def run(root: Path, seed: int, done: set[str], only: str = "") -> Iterator[dict[str, Any]]:
    """The results of the kills that are not ``done``."""
    inputs = materials.make(root / "inputs")
    imported()
    todo = [{"id": f"{seed}/{target}/{i}", "target": target, "at": i} for target, n in COUNTS.items() for i in range(n)]
    todo = [case for case in todo if case["id"] not in done and only in case["id"]]
    # The second is timed: the first time, files come from the disk.
    times = {
        target: [_undisturbed(root, inputs, target) for _ in range(2)][1]
        for target in {case["target"] for case in todo}
    }
    for case in todo:
        yield _one(root, inputs, case, *times[case["target"]])


def _command(inputs: Path, target: str) -> list[str]:
    if target.startswith("convert"):
        size = ["--rank", "6"] if "--over" in target else ["--param-ratio", "0.5"]
        return ["convert", str(inputs / "dense"), *size, "--method", "svd", "--output-dir", "out"]
    return [
        "finetune",
        "--config",
        str(inputs / "run.yaml"),
        "--output-dir",
        "out",
        "--max-steps",
        "12",
        "--eval-steps",
        "3",
    ]


def _prepared(folder: Path, inputs: Path, target: str) -> list[str]:
    """An empty folder to work in, or one with an older result; and the command for it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = _command(inputs, target)
    if "--over" in target:
        shutil.copytree(inputs / ("compact" if target.startswith("convert") else "run"), folder / "out")
        command.append(target.split()[1])
    return command


def _undisturbed(root: Path, inputs: Path, target: str) -> tuple[float, float, str]:
    """Seconds to the first change of the folder and to the end, and the hash of the weights that come out."""
    folder = root / "kills" / f"undisturbed {target}"
    command = _prepared(folder, inputs, target)
    before, began, first = _state(folder), time.monotonic(), None
    process = _Fork(lambda: in_this_process(command, folder))
    while not process.ended(0.005):
        if first is None and _state(folder) != before:
            first = time.monotonic() - began
    code, _, err = process.result
    if code:
        raise RuntimeError(f"{command} ended with {code}: {err}")
    return first or 0.0, time.monotonic() - began, _hash(folder / "out")


def _one(root: Path, inputs: Path, case: dict[str, Any], first: float, end: float, wanted: str) -> dict[str, Any]:
    rng = random.Random(case["id"])
    folder = root / "kills" / case["id"].replace("/", "_")
    for _ in range(_TRIES):
        at = rng.uniform(0, first) if rng.random() < _EARLY else rng.uniform(first * 0.97, first + 0.95 * (end - first))
        command = _prepared(folder, inputs, case["target"])
        older, records, began = _hash(folder / "out"), _read(folder / "out" / "metrics.jsonl"), time.monotonic()
        process = _Fork(partial(in_this_process, command, folder))
        if killed := not process.ended(at):
            process.kill()
            break
        took = time.monotonic() - began  # the machine is less busy than it was: go by what it needs now
        first, end = first * took / end, took
    verdict, message = _judge(folder, command, older, records, wanted)
    if verdict in ("ok", "error"):
        shutil.rmtree(folder)
    return {**case, "seconds": round(at, 3), "killed": killed, "verdict": verdict, "message": message[-600:]}


def _judge(folder: Path, command: list[str], older: str, records: str, wanted: str) -> tuple[str, str]:
    out = folder / "out"
    tunes = command[0] == "finetune"
    if (out / "config.json").exists() or (out.exists() and not tunes):
        if problem := _forked(unusable_checkpoint, out):
            return "half", f"after the kill: {problem}"
        if (found := _hash(out)) not in (older, wanted):
            return "half", "after the kill: neither the old weights nor the new ones"
        if tunes and found == older != wanted and _read(out / "metrics.jsonl") != records:
            return "silent", "the weights of the old run lie beside the records of the new one"
        if found == wanted:
            return "ok", "was done"
    said = []
    for _ in range(3):
        code, _, err = _forked(in_this_process, command, folder)
        if code == 0:
            break
        said.append(err.strip().splitlines()[-1] if err.strip() else "")
        advised = next((extra for extra in (RESUME, OVER) if extra[0] in said[-1] and extra[0] not in command), None)
        if advised is None:
            return "no way on", " / ".join(said)
        command = [*[c for c in command if c not in (*RESUME, *OVER)], *advised]
    else:
        return "no way on", " / ".join(said)
    if problem := _forked(unusable_checkpoint, out):
        return "half", f"after going on: {problem}"
    if _hash(out) != wanted:
        return "silent", "after going on, other weights than those of an undisturbed run"
    left = [
        p.name for p in folder.rglob(".*") if p.name.endswith((".partial", ".replaced", ".lock", ".lock-run", ".draft"))
    ]
    if left:
        return "leftovers", f"after going on: {left}"
    return "ok", " / ".join(said)


class _Fork:
    """A call in a forked process, whose result comes through a pipe."""

    def __init__(self, call: Callable[[], Any]) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=lambda: theirs.send(call()))
        self._process.start()
        theirs.close()

    def ended(self, seconds: float) -> bool:
        """Wait for it, no longer than that."""
        return self._pipe.poll(seconds)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    @property
    def result(self) -> Any:
        found = self._pipe.recv()
        self._process.join()
        return found


def _forked(call: Callable[..., Any], *arguments: Any) -> Any:
    return _Fork(lambda: call(*arguments)).result


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _hash(folder: Path) -> str:
    path = folder / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _state(folder: Path) -> list[tuple[str, int]]:
    found = []
    for parent, folders, files in os.walk(folder):  # unlike rglob, it bears that a folder vanishes meanwhile
        for name in (*folders, *(f for f in files if not f.endswith(".lock-run"))):  # that comes before any work
            path = os.path.join(parent, name)
            with suppress(FileNotFoundError):
                found.append((path, os.lstat(path).st_mtime_ns))
    return sorted(found)
