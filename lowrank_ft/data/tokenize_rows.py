"""Tokenize the rows of a dataset by ``datasets.map``: on several processes, once, and from its cache the next time.

Rows that cannot be used are left out, counted and named. In a launched run the first process of each node comes first,
and the others then read what it left in the cache.
"""

import os
import sys
import warnings
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from lowrank_ft.data.chats import UnusableChatError, read_chat, read_tools
from lowrank_ft.data.encoding import encode_chat, text_ends
from lowrank_ft.data.examples import TokenizedData
from lowrank_ft.errors import DataError, first_line

SHAREGPT_COLUMN = "conversations"
MANY_ROWS = 10_000
MOST_LEFT_OUT = 0.05
"""A larger share of rows that are left out, or cut, is a warning."""
_ENCODING = 1
"""Part of the key in the cache of ``datasets``: raise it when the same row is to give other tokens."""
_TRUNCATED = "truncated"
_TEXTS = Features({"input_ids": List(Value("int32")), "problem": Value("string")})
_CHATS = Features({**_TEXTS, "counted": List(Value("bool"))})


def tokenize_texts(
    rows: Dataset, column: str, name: str, tokenizer: Any, strict: bool = False, num_proc: int | None = None
) -> np.ndarray:
    """Token ids of all texts, end to end; each begins and ends as :func:`lowrank_ft.data.encoding.token_ids` says.

    Raises:
        DataError: there is no row; or with ``strict``, one holds no text.
    """
    _require_rows(rows, name)
    encoded = _map(rows, _encode_texts, num_proc, tokenizer=tokenizer, column=column)
    _report(encoded["problem"], name, "texts", strict, "")
    return _flat(encoded, "input_ids").astype(np.int32)


def tokenize_chats(
    rows: Dataset,
    column: str,
    name: str,
    tokenizer: Any,
    most_tokens: int,
    strict: bool = False,
    num_proc: int | None = None,
) -> TokenizedData:
    """One example of at most ``most_tokens`` for each chat, with loss on the assistant's replies.

    Raises:
        DataError: the tokenizer has no chat template, no chat can be used, or with ``strict`` one cannot.
    """
    _require_rows(rows, name)
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the tokenizer has no chat template; use one that has, or train on --text-column")
    encoded = _map(rows, _encode_chats, num_proc, tokenizer=tokenizer, column=column, most_tokens=most_tokens)
    lengths = np.concatenate([pc.list_value_length(c).to_numpy() for c in encoded.data["input_ids"].chunks])
    remedy = f"raise --block-size above {most_tokens}"
    _report(encoded["problem"], name, "chats", strict, remedy)
    kept = lengths[lengths > 0]
    if not len(kept):
        raise DataError(
            f"none of the {len(rows)} chats of {name} has an assistant's reply within {most_tokens} tokens; "
            "raise --block-size, or check the roles"
        )
    ids, counted = _flat(encoded, "input_ids"), _flat(encoded, "counted")
    return TokenizedData(ids.astype(np.int32), np.concatenate([[0], np.cumsum(kept)]), counted.astype(bool))


def _require_rows(rows: Dataset, name: str) -> None:
    if len(rows) == 0:
        raise DataError(f"{name} has no rows; give data with at least one")


def _map(rows: Dataset, encode: Any, num_proc: int | None, **kwargs: Any) -> Dataset:
    if num_proc is None and len(rows) >= MANY_ROWS:
        num_proc = min(8, os.cpu_count() or 1)
    return rows.map(
        encode,
        batched=True,
        num_proc=num_proc if num_proc and num_proc > 1 else None,
        remove_columns=rows.column_names,
        fn_kwargs={**kwargs, "encoding": _ENCODING},
        features=_CHATS if encode is _encode_chats else _TEXTS,  # a batch may have nothing to tell the types from
        desc="tokenize",
    )


def _encode_texts(batch: dict[str, list[Any]], tokenizer: Any, column: str, encoding: int) -> dict[str, list[Any]]:
    begin, end = text_ends(tokenizer)
    ids: list[list[int]] = []
    problems: list[str] = []
    for text in batch[column]:
        if isinstance(text, str) and text:
            # Long documents are meant: the blocks are cut afterwards, so the length warning would mislead.
            ids.append([*begin, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *end])
            problems.append("")
        else:
            ids.append([])
            problems.append("it is empty" if text == "" else "it is null" if text is None else "it is no text")
    return {"input_ids": ids, "problem": problems}


def _encode_chats(
    batch: dict[str, list[Any]], tokenizer: Any, column: str, most_tokens: int, encoding: int
) -> dict[str, list[Any]]:
    tools = batch.get("tools") or [None] * len(batch[column])
    encoded = [_encode_row(c, t, tokenizer, most_tokens) for c, t in zip(batch[column], tools, strict=True)]
    return {
        "input_ids": [ids for ids, _, _ in encoded],
        "counted": [counted for _, counted, _ in encoded],
        "problem": [problem for _, _, problem in encoded],
    }


def _encode_row(chat: Any, tools: Any, tokenizer: Any, most_tokens: int) -> tuple[list[int], list[bool], str]:
    ids, counted, problem = tokenize_chat(chat, tools, tokenizer)
    if problem:
        return [], [], problem
    if not any(counted[1:most_tokens]):
        return [], [], f"its reply begins after {most_tokens} tokens"
    return ids[:most_tokens], counted[:most_tokens], _TRUNCATED if len(ids) > most_tokens else ""


def tokenize_chat(chat: Any, tools: Any, tokenizer: Any) -> tuple[list[int], list[bool], str]:
    """Of one row: token ids, which of them are replies, and "" or the reason why it cannot be used."""
    try:
        ids, counted = encode_chat(read_chat(chat), tokenizer, read_tools(tools))
    except UnusableChatError as error:
        return [], [], str(error)
    except Exception as error:  # what a template raises, or jinja about it
        return [], [], f"the chat template refuses it ({first_line(error)})"
    return (ids, counted, "") if any(counted) else ([], [], "it has no assistant's reply")


def _report(problems: Any, name: str, what: str, strict: bool, remedy: str) -> None:
    """Say once what is left out and what is cut, and warn where that is much."""
    rows = defaultdict(list)
    for number, problem in enumerate(problems, start=1):
        if problem:
            rows[problem].append(number)
    cut = rows.pop(_TRUNCATED, [])
    if strict and rows:
        first = min(rows, key=lambda reason: rows[reason][0])
        raise DataError(
            f"{name}, row {rows[first][0]}: {first}; correct it, or leave --strict-data out to skip such rows"
        )
    if os.environ.get("RANK", "0") != "0":
        return
    left_out, total = sum(map(len, rows.values())), len(problems)
    if left_out:
        print(f"note: {left_out} of {total} {what} of {name} are left out:", file=sys.stderr)
        for reason, numbers in sorted(rows.items(), key=lambda item: -len(item[1])):
            shown = ", ".join(map(str, numbers[:3])) + (", ..." if len(numbers) > 3 else "")
            print(f"  {len(numbers)} x {reason} (row {shown})", file=sys.stderr)
    if cut:
        print(f"note: {len(cut)} of {total} {what} of {name} are cut to the block size; {remedy}", file=sys.stderr)
    if left_out + len(cut) > MOST_LEFT_OUT * total:
        fix = f"; {remedy}" if remedy and (cut or any("begins after" in reason for reason in rows)) else ""
        warnings.warn(
            f"{(left_out + len(cut)) / total:.0%} of the {what} of {name} are left out or cut{fix}", stacklevel=4
        )


def _flat(encoded: Dataset, column: str) -> np.ndarray:
    """All lists of a column, end to end."""
    return np.concatenate([c.flatten().to_numpy(zero_copy_only=False) for c in encoded.data[column].chunks])
