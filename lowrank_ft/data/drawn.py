"""Texts and chats drawn at random from a dataset: of a large one only a small part is read and tokenized.

Rows that cannot be used are left out, and one line says how many of them there were, and why.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from lowrank_ft.data.chats import UnusableChatError, read_chat
from lowrank_ft.data.sources import require_text
from lowrank_ft.data.tokenize_rows import SHAREGPT_COLUMN, tokenize_chat
from lowrank_ft.errors import DataError

CHAT_COLUMNS = ("messages", SHAREGPT_COLUMN)
_NO_TEXT = "it holds no text"


def holds_chats(rows: Dataset, column: str) -> bool:
    """Whether a column is one of chats: by its name, or by the first row that is not empty."""
    if column in CHAT_COLUMNS:
        return True
    first = next((value for row in rows if (value := row[column])), None)
    try:
        return first is not None and bool(read_chat(first))
    except UnusableChatError:
        return isinstance(first, list)


def draw_texts(rows: Dataset, column: str, name: str, characters: int, generator: torch.Generator) -> list[str]:
    """Texts of somewhat more than so many characters, or all; in the order in which the dataset has them.

    Raises:
        DataError: a row holds something else than a text.
    """
    found: dict[int, str] = {}
    left_out: Counter[str] = Counter()
    read = total = 0
    for i in _shuffled(rows, generator):
        read += 1
        value = rows[i][column]
        if value in (None, ""):
            left_out[_NO_TEXT] += 1
            continue
        found[i] = require_text(value, i + 1, column, name)
        total += len(found[i])
        if total > characters:
            break
    _tell(left_out, read, "rows", name)
    return [found[i] for i in sorted(found)]


def draw_chats(
    rows: Dataset, column: str, name: str, tokenizer: Any, tokens: int, generator: torch.Generator
) -> np.ndarray:
    """Token ids of whole chats in the tokenizer's template, end to end: as many as hold ``tokens``, or all.

    Raises:
        DataError: the tokenizer has no chat template, or no chat can be used.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"the tokenizer has no chat template, which the chats in column {column!r} of {name} need; copy "
            "chat_template.jinja of the model's instruct version into its folder, or name a column of text"
        )
    found: list[np.ndarray] = []
    left_out: Counter[str] = Counter()
    read = total = 0
    for i in _shuffled(rows, generator):
        read += 1
        row = rows[i]
        ids, _, problem = tokenize_chat(row[column], row.get("tools"), tokenizer)
        if problem:
            left_out[problem] += 1
            continue
        found.append(np.array(ids, dtype=np.int32))
        total += len(ids)
        if total >= tokens:
            break
    if not found:
        why = f": {_reasons(left_out)}" if left_out else ""
        raise DataError(
            f"none of the {read} chats of {name} can be used{why}; give chats with a question and a reply each"
        )
    _tell(left_out, read, "chats", name)
    return np.concatenate(found)


def _shuffled(rows: Dataset, generator: torch.Generator) -> Iterator[int]:
    yield from torch.randperm(len(rows), generator=generator).tolist()


def _tell(left_out: Counter[str], read: int, what: str, name: str) -> None:
    if left_out:
        count = sum(left_out.values())
        print(f"note: {count} of {read} {what} of {name} are left out: {_reasons(left_out)}", file=sys.stderr)


def _reasons(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in left_out.most_common())
