"""What guessing scores on multiple-choice tasks: the floor that a score is read against.

    majority = max_k (items whose answer is choice k) / items        always the most frequent answer
    chance   = mean over items of (right choices) / (choices)        a random one

A model that knows nothing scores near these, and above 0.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowrank_ft.errors import DataError, first_line

METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
"""The metrics that are the share of items whose answer is right."""


@dataclass(frozen=True)
class Guessing:
    """Scores of two ways to guess, over ``items`` of a task."""

    majority: float
    chance: float
    items: int


def guessing(name: str, task: Any, limit: int | None = None) -> Guessing | None:
    """Count the answers of the first ``limit`` items of a task of the harness.

    Returns:
        None for a task that is not multiple choice, or that scores by code of its own.

    Raises:
        DataError: the choices or the answer of an item cannot be read.
    """
    if task.get_config("output_type") != "multiple_choice" or callable(task.get_config("process_results")):
        return None
    places: Counter[int | None] = Counter()
    chance, items, without = 0.0, 0, 0
    for item, doc in enumerate(itertools.islice(task.eval_docs, limit), start=1):
        try:
            choices = task.doc_to_choice(doc)
            answer = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            right = {_place(a, choices) for a in (answer if isinstance(answer, list) else [answer])} - {None}
            chance += len(right) / len(choices)
        except Exception as error:  # of templates, of code that a task brings, or there are no choices
            raise DataError(
                f"task {name}: item {item} has no choices or no answer that can be read ({first_line(error)}); correct it"
            ) from error
        places.update(right)
        items += 1
        without += not right
    if without:
        print(
            f"note: task {name}: the answer of {without:,} of {items:,} items is none of their choices; they count as wrong",
            file=sys.stderr,
        )
    most = max(places.values(), default=0)
    return Guessing(most / items, chance / items, items) if items else None


def of_group(members: list[Guessing | None], by_size: bool) -> Guessing | None:
    """The same for a group, which averages its tasks, each weighted by its items or all alike."""
    known = [m for m in members if m is not None]
    if not known or len(known) < len(members):
        return None
    weights = [m.items if by_size else 1 for m in known]
    majority, chance = (
        sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
        for values in ([m.majority for m in known], [m.chance for m in known])
    )
    return Guessing(majority, chance, sum(m.items for m in known))


def of_groups(tasks: Mapping[str, Guessing | None], groups: Mapping[str, Any]) -> dict[str, Guessing | None]:
    """For each group that the harness has a score for, by its name."""
    found = {}
    for name, group in groups.items():
        members = [tasks.get(task.task_name) for task in group.get_all_tasks()]
        found[name] = of_group(members, all(m.weight_by_size for m in group.aggregate_metric_list or ()))
    return found


def _place(answer: Any, choices: list[Any]) -> int | None:
    """Index of an answer that is given as an index or as the text of a choice; None for any other."""
    if isinstance(answer, str):
        return choices.index(answer) if answer in choices else None
    return int(answer) if 0 <= int(answer) < len(choices) else None
