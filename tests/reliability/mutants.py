"""Damaged inputs through every command: each ends in a usable result, or in one sentence that names the file.

Each case is a copy of the valid inputs with one file damaged, and a command on it. Workers run the commands in their
own process, one after the other, and are replaced when one of them takes too long or dies.
"""

import json
import multiprocessing
import os
import queue
import random
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from tests.reliability import materials
from tests.reliability.mutate import mutate

SECONDS = 60
BAD = ("internal", "traceback", "hang", "crash", "silent", "outside", "half", "unnamed")
_SHOWN = ("id", "target", "mutant", "command")
_MEMORY = 10 * 2**30
_STEP = materials.CHECKPOINT
# The damaged file: how many mutants, and the commands that read it; of those after "/N" only every Nth mutant.
TARGETS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dense/config.json": (50, ("plan", "convert", "eval", "finetune/6")),
    "dense/model.safetensors": (45, ("plan", "convert", "eval", "finetune/9")),
    "sharded/model.safetensors.index.json": (25, ("plan", "convert", "eval")),
    "dense/tokenizer.json": (20, ("convert", "eval", "finetune/4")),
    "dense/tokenizer_config.json": (15, ("convert", "eval", "finetune/4")),
    "dense/generation_config.json": (10, ("convert", "eval")),
    "plan.json": (30, ("convert-plan",)),
    "run.yaml": (30, ("finetune-yaml",)),
    "text.jsonl": (20, ("eval", "finetune/2")),
    "compact/config.json": (35, ("plan", "eval", "merge", "report", "finetune/7")),
    "compact/model.safetensors": (30, ("eval", "merge", "report", "finetune/10")),
    "compact/conversion.json": (20, ("report",)),
    "eval.json": (10, ("report-eval",)),
    "run/metrics.jsonl": (5, ("report-run",)),
    "run/run.json": (5, ("export",)),
    f"{_STEP}/config.json": (5, ("export",)),
    f"{_STEP}/trainer_state.json": (10, ("export", "resume")),
    f"{_STEP}/model.safetensors": (10, ("export", "resume")),
    "adapter/adapter_config.json": (15, ("export-adapter",)),
    "adapter/adapter_model.safetensors": (10, ("export-adapter",)),
}


def cases(seed: int) -> Iterator[dict[str, Any]]:
    """What is to be run: the damaged file, the number of the mutant, the command."""
    for target, (count, commands) in TARGETS.items():
        for i in range(count):
            for command in commands:
                name, _, every = command.partition("/")
                if i % int(every or 1) == 0:
                    yield {"id": f"{seed}/{target}/{i}/{name}", "target": target, "mutant": i, "command": name}


def run(root: Path, seed: int, done: set[str], only: str = "") -> Iterator[dict[str, Any]]:
    """The results of the cases that are not ``done``, in the order in which they end."""
    inputs = materials.make(root / "inputs")
    todo = [c for c in cases(seed) if c["id"] not in done and only in c["id"]]
    workers: queue.Queue[int] = queue.Queue()
    for number in range(2):
        workers.put(number)
    pool = {number: Worker(run_case) for number in range(2)}

    def one(case: dict[str, Any]) -> dict[str, Any]:
        number = workers.get()
        try:
            return pool[number].run({**case, "seed": seed, "inputs": str(inputs), "root": str(root)})
        finally:
            workers.put(number)

    try:
        with ThreadPoolExecutor(2) as threads:
            yield from threads.map(one, todo)
    finally:
        for worker in pool.values():
            worker.stop()


class Worker:
    """A process that runs cases one after the other; a new one takes its place after a hang or a crash."""

    def __init__(self, run_case: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._run_case = run_case
        self._process: Any = None

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._run_case), daemon=True)
            self._process.start()
            theirs.close()
            self._pipe.recv()  # it has imported everything
        self._pipe.send(case)
        try:
            if self._pipe.poll(SECONDS):
                result: dict[str, Any] = self._pipe.recv()
                return result
            verdict = "hang"
        except EOFError:
            verdict = "crash"
        self.stop()
        return {k: case[k] for k in _SHOWN if k in case} | {"verdict": verdict, "message": ""}

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(pipe: Any, run_case: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))  # a huge number must not take the machine down
    imported()
    pipe.send("ready")
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        pipe.send(run_case(case))


def imported() -> None:
    """What all commands need, in this process."""
    os.environ.update(materials.environment())
    import torch

    torch.set_num_threads(1)
    import lowrank_ft_recipes.finetune  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Damage, run, judge; in this process."""
    folder = Path(case["root"]) / "mutants" / case["id"].replace("/", "_")
    shutil.rmtree(folder, ignore_errors=True)
    here = folder / "here"
    here.mkdir(parents=True)
    shutil.copytree(case["inputs"], here / "in")
    victim = here / "in" / case["target"]
    said = mutate(victim, random.Random(f"{case['seed']}/{case['target']}/{case['mutant']}"))
    before = _listing(folder)
    code, out, err = in_this_process(_arguments(case, here / "in"), here)
    verdict, message = judge(case, here, victim, code, out, err, before, folder)
    if verdict not in BAD:
        shutil.rmtree(folder)
    return {**{k: case[k] for k in _SHOWN}, "damage": said, "code": code,
            "verdict": verdict, "message": message.replace(case["root"], "ROOT")[-600:]}  # fmt: skip


def _arguments(case: dict[str, Any], given: Path) -> list[str]:
    """The command line of a case."""
    model = str(given / case["target"].partition("/")[0])
    if not Path(model).is_dir():
        model = str(given / "dense")
    data = ["--data", str(given / "text.jsonl"), "--block-size", "16"]
    sized = ["--param-ratio", "0.5"] if not model.endswith("compact") else []
    tune = ["finetune", "--model", model, "--dataset", str(given / "text.jsonl"), "--output-dir", "out"]
    for name, value in materials.SHORT.items():
        tune += [f"--{name}", str(value)]
    return {
        "plan": ["plan", model, "--json", *sized],
        "convert": ["convert", model, "--method", "svd", "--output-dir", "out", "--param-ratio", "0.5"],
        "convert-plan": ["convert", model, "--method", "svd", "--output-dir", "out", "--plan", str(given / "plan.json")],
        "eval": ["eval", model, "--json", *data],
        "merge": ["merge", model, "--output-dir", "out"],
        "report": ["report", model, "--output", "out.html"],
        "report-eval": ["report", str(given / "compact"), "--output", "out.html", "--eval", str(given / "eval.json")],
        "report-run": ["report", str(given / "run"), "--output", "out.html"],
        "export": ["export", str(given / _STEP), "--output-dir", "out"],
        "export-adapter": ["export", str(given / "adapter"), "--output-dir", "out"],
        "finetune": [*tune, *(["--param-ratio", "0.5"] if sized else [])],
        "finetune-yaml": ["finetune", "--config", str(given / "run.yaml"), "--output-dir", "out"],
        "resume": ["finetune", "--config", str(given / "run.yaml"), "--output-dir", "out",
                   "--resume-from-checkpoint", str(given / _STEP)],
    }[case["command"]]  # fmt: skip


def in_this_process(arguments: list[str], cwd: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, the ones that libraries write to directly included."""
    from accelerate.state import AcceleratorState
    from lowrank_ft_cli.main import main
    from lowrank_ft_recipes import finetune

    AcceleratorState._reset_state(reset_partial_state=True)
    files = [cwd.parent / "stdout", cwd.parent / "stderr"]
    with ExitStack() as stack:
        for number, file in enumerate(files, 1):
            stack.enter_context(_into(file, number))
        os.chdir(cwd)
        try:
            if arguments[0] == "finetune":  # without the launcher, which would be another process
                sys.argv = ["finetune.py", *arguments[1:]]
                finetune.main()
                code = 0
            else:
                code = main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
    out, err = (file.read_text(errors="replace") for file in files)
    for file in files:
        file.unlink()
    return code, out, err


@contextmanager
def _into(path: Path, number: int) -> Iterator[None]:
    """What goes to stdout (1) or stderr (2) goes to a file: by Python, and by libraries that know the number alone."""
    redirected = redirect_stdout if number == 1 else redirect_stderr
    saved = os.dup(number)
    with path.open("w", encoding="utf-8", errors="replace") as file, redirected(file):
        os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            file.flush()
            os.dup2(saved, number)
            os.close(saved)


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in folder.rglob("*"):
        facts = path.lstat()
        found[str(path.relative_to(folder))] = (0, 0) if path.is_dir() else (facts.st_size, facts.st_mtime_ns)
    return found


_INTERNAL = re.compile(
    r"^error: \w*(Error|Exception|Panic\w*|Warning): |object (has no attribute|is not \w+)|"
    r"argument of type|unsupported operand|^error: .{0,25}$|\bNoneType\b|must be str, not|indices must be"
)


def is_internal(message: str) -> bool:
    """Whether a message is that of an error which nobody foresaw. What a library said may stand in brackets."""
    sentence = re.sub(r"\([^()]*(\([^()]*\)[^()]*)*\)", "", message.partition("which transformers refuses (")[0])
    return "shows the traceback)" in message or _INTERNAL.search(sentence) is not None


def judge(
    case: dict[str, Any], here: Path, victim: Path, code: int, out: str, err: str, before: dict[str, Any], folder: Path
) -> tuple[str, str]:
    """The verdict and what it rests on."""
    after = _listing(folder)
    touched = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    allowed = ("here/out", "here/out.html") if case["command"].startswith("report") else ("here/out",)
    outside = [t for t in touched if t not in allowed and not t.startswith("here/out/")]
    if "Traceback (most recent call last)" in err or "panicked at" in err:
        return "traceback", err
    if outside:
        return "outside", f"{outside[:5]}; {err}"
    if code == 0:
        problem = _unusable(case["command"], here, out)
        return ("silent", f"{problem}; {err}") if problem else ("ok", err[-200:])
    message = next((line for line in reversed(err.splitlines()) if line.startswith("error: ")), "")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    if not message or len(errors) > 1:
        return "internal", err or out
    if is_internal(message):
        return "internal", message
    if not _names(message, victim, here):
        return "unnamed", message
    tunes = case["command"] in ("finetune", "finetune-yaml", "resume")  # a run's records may stay
    result = [here / "out" / "config.json"] if tunes else [here / "out", here / "out.html"]
    if any(path.exists() for path in result):
        return "half", message
    return "error", message


def _names(message: str, victim: Path, here: Path) -> bool:
    """Whether it says which file, or the checkpoint that it belongs to; of options, their name is enough."""
    if victim.suffix == ".yaml":
        return True
    folder = str(victim.parent)
    return victim.name in message or (
        victim.parent != here / "in" and (folder in message or victim.parent.name in message)
    )


def _unusable(command: str, here: Path, out: str) -> str | None:
    """What is wrong with the result of a command that ended well."""
    if command in ("plan", "eval"):
        try:
            text = json.loads(out)
        except ValueError:
            return f"no JSON: {out[:100]}"
        odd = [name for name, value in _numbers(text) if not (abs(value) < float("inf"))]
        return f"{odd[0]} is no number" if odd else None
    if command.startswith("report"):
        page = here / "out.html"
        whole = page.is_file() and page.read_text().rstrip().endswith("</html>")
        return None if whole else "the page is not whole"
    return unusable_checkpoint(here / "out")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(inner, f"{name}.{key}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def unusable_checkpoint(folder: Path) -> str | None:
    """What keeps a checkpoint from being loaded and run; None if nothing does."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True)
        if info["missing_keys"] or info["unexpected_keys"]:
            return f"weights are missing or unexpected: {[*info['missing_keys'], *info['unexpected_keys']][:3]}"
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                return f"{name} holds NaN or infinity"
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3, 4]]))
    except Exception as error:
        return f"does not load: {type(error).__name__}: {error}"[:300]
    return None
