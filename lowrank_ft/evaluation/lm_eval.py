"""Tasks of lm-evaluation-harness, the optional dependency behind the extra ``eval``; imported when they are used.

The harness knows its own tasks by name, most of which download their data; others are files that one names.
"""

import contextlib
import difflib
import functools
import importlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_ft.errors import ConfigError, DataError, MissingPackageError, first_line


@dataclass(frozen=True)
class Score:
    """One metric of one task, over ``items`` of its questions.

    Attributes:
        stderr: standard error of ``value``; None where the harness estimates none.
        higher_is_better: None where the harness does not say.
    """

    value: float
    stderr: float | None
    higher_is_better: bool | None
    items: int | None


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
        DataError: a task's data cannot be read, which for most tasks of the harness means: not be downloaded.
    """
    task_manager = _harness("lm_eval.tasks").TaskManager
    folders = [name for name in names if Path(name).is_dir()]
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
        except Exception as error:  # datasets', the Hub's, YAML's, or that of code that a task brings
            raise DataError(
                f"--tasks {' '.join(names)} cannot be read: {first_line(error)}; tasks of the harness download their data"
            ) from error
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def run_tasks(
    model: Any, tokenizer: Any, tasks: dict[str, Any], batch_size: int = 8, limit: int | None = None
) -> Scores:
    """Score a causal language model, without examples in the prompt unless the task brings its own number of them.

    Args:
        tasks: from :func:`load_tasks`; they may be run several times.
        limit: the first so many items of each task; None means all.
    """
    evaluator, models = _harness("lm_eval.evaluator"), _harness("lm_eval.models.huggingface")
    with _quiet():
        lm = models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        if os.environ.get("TQDM_DISABLE"):  # the harness sets `disable` itself, which beats the environment
            for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                setattr(lm, kind, functools.partial(getattr(lm, kind), disable_tqdm=True))
        # Not simple_evaluate: it also asks git and pip about the machine, which takes seconds and prints their errors.
        return _scores(evaluator.evaluate(lm=lm, task_dict=tasks, limit=limit, log_samples=False))


def _scores(results: dict[str, Any]) -> Scores:
    """The harness writes ``{"acc,none": 0.5, "acc_stderr,none": 0.1, ...}`` for each task; ``none`` is a filter."""
    table: Scores = {}
    for task, numbers in {**results["results"], **results.get("groups", {})}.items():
        better = results.get("higher_is_better", {}).get(task, {})
        items = results.get("n-samples", {}).get(task, {}).get("effective", numbers.get("sample_len"))
        for key, value in numbers.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = numbers.get(f"{metric}_stderr,{kept}")
            known = isinstance(stderr, (int, float)) and math.isfinite(stderr)
            name = metric if kept == "none" else f"{metric} ({kept})"
            score = Score(float(value), float(stderr) if known else None, better.get(metric), items)
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
