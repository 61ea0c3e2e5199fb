"""Tasks of lm-evaluation-harness, the optional dependency behind the extra ``eval``; imported when they are used.

The harness knows its own tasks by name, most of which download their data; others are files that one names.
"""

import contextlib
import difflib
import importlib
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lowrank_ft.errors import ConfigError, DataError, LowRankError, MissingPackageError, first_line
from lowrank_ft.evaluation.answers import Answers, facts_of
from lowrank_ft.evaluation.guessing import METRICS, Guessing, guessing, of_groups


@dataclass(frozen=True)
class Score:
    """One metric of one task, over the first ``items`` of its ``items_in_all`` questions.

    Attributes:
        stderr: standard error of ``value``; None where the harness estimates none.
        higher_is_better: None where the harness does not say.
        majority: what always giving the most frequent answer scores; None where that cannot be told.
        chance: what a random answer scores; None likewise.
    """

    value: float
    stderr: float | None
    higher_is_better: bool | None
    items: int | None
    items_in_all: int | None = None
    majority: float | None = None
    chance: float | None = None


Scores = dict[str, dict[str, Score]]
"""By task and metric. Groups of tasks, such as ``mmlu``, come after their members."""


_FEWSHOT_SEED = 1234
"""Which examples a task with examples in its prompt shows; the harness' own default, so that scores compare."""


def load_tasks(names: list[str]) -> dict[str, Any]:
    """Find the tasks and read their data.

    Args:
        names: tasks, groups or tags of the harness, where ``*`` stands for anything; YAML files; or folders of them,
            each of which stands for all its tasks.

    Returns:
        What the harness evaluates: its own objects under ``tasks``, ``groups`` and ``group_map``.

    Raises:
        MissingPackageError: the harness is not installed.
        ConfigError: a name is unknown, or a folder holds no task.
        DataError: a YAML file or a task's data cannot be read, which for most tasks of the harness means: not be
            downloaded.
    """
    task_manager = _harness("lm_eval.tasks").TaskManager
    folders = [name for name in names if Path(name).is_dir()]
    for name in names:
        _check_yaml(name)
    with _quiet():
        # To index the harness' own tasks takes seconds.
        own = any(name not in folders and not _is_file(name) for name in names)
        manager = task_manager(include_path=folders or None, include_defaults=own)
        found: dict[str, None] = {}
        for name in names:
            if name in folders:
                matches = task_manager(include_path=name, include_defaults=False).all_subtasks
                problem = "holds no task; name a folder with YAML files of tasks"
            else:
                matches = [name] if _is_file(name) or name in manager.all_tasks else manager.match_tasks([name])
                near = difflib.get_close_matches(name, manager.all_tasks, n=3)
                hint = f"did you mean {' or '.join(near)}" if near else "lm-eval ls tasks lists those of the harness"
                problem = f"is no task; {hint}; a task of your own is named by its YAML file or folder"
            if not matches:
                raise ConfigError(f"--tasks {name!r} {problem}")
            found.update(dict.fromkeys(matches))
        try:
            loaded: dict[str, Any] = manager.load(list(found))
        except LowRankError:
            raise
        except Exception as error:  # datasets', the Hub's, YAML's, or that of code that a task brings
            hint = "tasks of the harness download their data" if own else "correct the task's YAML file, or its data"
            raise DataError(f"--tasks {' '.join(names)} cannot be read: {first_line(error)}; {hint}") from error
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: dict[str, Any],
    batch_size: int = 8,
    limit: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> Scores:
    """Score a causal language model, without examples in the prompt unless the task brings its own number of them.

    Args:
        tasks: from :func:`load_tasks`; they may be run several times.
        limit: the first so many items of each task; None means all.
        cache_dir: a folder for the model's answers. A run that was killed goes on where it was, and answers that are
            there already are not computed again. None writes nothing.

    Raises:
        DataError: an item has no choices or no answer.
        NonFiniteError: a log-likelihood is not a number.
        ConfigError, OutputError: from :class:`Answers`.
    """
    evaluator = _harness("lm_eval.evaluator")
    from lowrank_ft.evaluation.task_model import TaskModel  # imports the harness

    guesses = {name: guessing(name, task, limit) for name, task in tasks["tasks"].items()}
    guesses |= of_groups(guesses, tasks.get("groups", {}))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        answers = None
        if cache_dir is not None:
            answers = stack.enter_context(Answers(cache_dir, facts_of(model, tokenizer)))
            if len(answers):
                print(f"note: {len(answers):,} answers of this model are in {cache_dir} already", file=sys.stderr)
        lm = TaskModel(model, tokenizer, batch_size, answers, progress)
        # Not simple_evaluate: it also asks git and pip about the machine, which takes seconds and prints their errors.
        return _scores(evaluator.evaluate(lm=lm, task_dict=tasks, limit=limit, log_samples=False), guesses)


def _scores(results: dict[str, Any], guesses: Mapping[str, Guessing | None]) -> Scores:
    """The harness writes ``{"acc,none": 0.5, "acc_stderr,none": 0.1, ...}`` for each task; ``none`` is a filter."""
    table: Scores = {}
    for task, numbers in {**results["results"], **results.get("groups", {})}.items():
        better = results.get("higher_is_better", {}).get(task, {})
        counts = results.get("n-samples", {}).get(task, {})
        items = counts.get("effective", numbers.get("sample_len"))
        guess = guesses.get(task)
        for key, value in numbers.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = numbers.get(f"{metric}_stderr,{kept}")
            known = isinstance(stderr, (int, float)) and math.isfinite(stderr)
            name = metric if kept == "none" else f"{metric} ({kept})"
            floor = (guess.majority, guess.chance) if guess and metric in METRICS else (None, None)
            error = float(stderr) if known else None
            score = Score(float(value), error, better.get(metric), items, counts.get("original"), *floor)
            table.setdefault(task, {})[name] = score
    return table


def _harness(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"--tasks needs lm-evaluation-harness, which does not import ({first_line(error)}); "
            'run pip install "lowrank-ft[eval]"'
        ) from error


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness' warnings about what is on purpose here, such as a model that is loaded already."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _AnyTags(yaml.SafeLoader):
    """Reads the form of a YAML file without running what it names."""


_AnyTags.add_multi_constructor("!", lambda loader, suffix, node: suffix)


def _check_yaml(name: str) -> None:
    """Raise a DataError for a YAML file, or one in a folder, that is none; the harness leaves those out in silence."""
    path = Path(name)
    files = sorted(path.rglob("*.yaml")) if path.is_dir() else [path] if _is_file(name) else []
    for file in files:
        try:
            found = yaml.load(file.read_text(encoding="utf-8"), Loader=_AnyTags)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            where = getattr(error, "problem_mark", None)
            line = f", line {where.line + 1}" if where else ""
            reason = getattr(error, "problem", None) or first_line(error)
            raise DataError(f"--tasks: {file}{line} is no YAML ({reason}); correct it") from error
        if not isinstance(found, dict):
            raise DataError(f"--tasks: {file} is no task; a task is a mapping with task, output_type and so on")
