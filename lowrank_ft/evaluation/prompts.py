"""Prompts for a chat model: a short list of the project's own, or those of a file or dataset."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from lowrank_ft.data.chats import UnusableChatError, read_chat
from lowrank_ft.data.sources import read_rows, require_column
from lowrank_ft.data.tokenize_rows import SHAREGPT_COLUMN
from lowrank_ft.errors import DataError

Prompt = str | list[dict[str, Any]]
"""A question, or a chat that ends with one."""

PROMPTS: tuple[Prompt, ...] = (
    "What is the capital of Italy, and which river flows through it?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse in winter.",
    "List five things to pack for a day in the mountains.",
    "A train leaves at 14:20 and arrives at 16:05. How long does the journey take?",
    "Write a Python function that returns the largest number of a list.",
    "Translate into French: The library opens at nine in the morning.",
    "Rewrite this sentence so that it is polite: Send me the report now.",
    "Summarize in one sentence: The bridge was closed for repairs in May. Buses took a longer way until it opened again "
    "in August, and many shops near it lost customers.",
    "What is the difference between a virus and a bacterium?",
    "My houseplant has yellow leaves. What could be the reason?",
    "Is this review positive or negative? The soup was cold, and nobody said sorry.",
    "Give me a recipe for pancakes without eggs.",
    "Who wrote the play Romeo and Juliet, and when?",
    "Write an e-mail of three sentences that moves a meeting from Monday to Tuesday.",
    "Tell me a story about a fox who wants to learn to swim, in about five sentences.",
)


def read_prompts(name: str, split: str = "test", config: str | None = None, limit: int | None = None) -> list[Prompt]:
    """The prompts of a text file, one a line; or of a dataset with a column ``prompt``, ``messages`` or ``conversations``.

    Of a chat, what comes before its last reply is the prompt. Rows that hold none are left out; a note counts them.

    Args:
        limit: the first so many only.

    Raises:
        DataError: it cannot be read, has no such column, or no prompt.
    """
    rows = read_rows(name, split, config)
    left_out: Counter[str] = Counter()
    if Path(name).suffix.lower() in (".txt", ".md"):
        prompts: list[Prompt] = [line.strip() for text in rows["text"] for line in text.splitlines() if line.strip()]
        prompts = prompts[:limit]
    else:
        wanted = ("prompt", "messages", SHAREGPT_COLUMN)
        column = next((c for c in wanted if c in rows.column_names), "")
        if not column:
            require_column(name, wanted[:2], rows.column_names, "rename the one that holds prompts or chats")
        prompts = []
        for value in rows[column]:
            try:
                prompts.append(_prompt(value, is_chat=column != "prompt"))
            except UnusableChatError as reason:
                left_out[str(reason)] += 1
            if len(prompts) == limit:
                break
    reasons = ", ".join(f"{count} x {reason}" for reason, count in left_out.most_common())
    if not prompts:
        raise DataError(f"{name} holds no prompt{f': {reasons}' if reasons else ''}; give one a line, or chats")
    if left_out:
        total = len(prompts) + left_out.total()
        print(f"note: {left_out.total()} of {total} prompts of {name} are left out: {reasons}", file=sys.stderr)
    return prompts


def shown(prompt: Prompt) -> str:
    """What the user said last."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _prompt(value: Any, is_chat: bool) -> Prompt:
    if not is_chat and isinstance(value, str):
        if not value.strip():
            raise UnusableChatError("it is empty")
        return value
    if value is None:
        raise UnusableChatError("it is null")
    chat = read_chat(value)
    while chat and chat[-1]["role"] != "user":
        chat.pop()
    if not chat:
        raise UnusableChatError("it has no user's message")
    return chat
