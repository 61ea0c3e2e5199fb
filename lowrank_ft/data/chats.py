"""Chats from the rows of a dataset: several spellings are read, and what cannot be used is told with its reason.

[{"role": "user", "content": "..."}, ...]     as chat templates take them; text parts and JSON in a string, too
[{"from": "human", "value": "..."}, ...]      ShareGPT
"""

import json
from typing import Any

from lowrank_ft.errors import DataError

_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}


class UnusableChatError(DataError):
    """A row that holds no chat to train on; the message is the reason."""


def read_chat(value: Any) -> list[dict[str, Any]]:
    """Messages as chat templates take them.

    Args:
        value: a list of messages, or JSON of one.

    Raises:
        UnusableChatError: it is something else, or a message has no role or no content.
    """
    value = _decoded(value)
    if not isinstance(value, list) or not value:
        raise UnusableChatError("it has no messages" if value in (None, [], {}) else "it is no list of messages")
    return [_message(item) for item in value]


def read_tools(value: Any) -> list[Any] | None:
    """The tools of a chat: a list, JSON of one, or a list with JSON in it; None where there are none."""
    value = _decoded(value)
    if not isinstance(value, list):
        return None
    return [without_nulls(_decoded(tool)) for tool in value] or None


def without_nulls(value: Any) -> Any:
    """Without the empty fields that a table of rows with different fields fills in."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def _message(item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise UnusableChatError("a message is no mapping of role and content")
    message = without_nulls(item)
    role, content = message.pop("from", None), message.pop("value", None)
    role = message.pop("role", role)
    content = message.pop("content", content)
    if not isinstance(role, str) or not role:
        raise UnusableChatError("a message has no role")
    if isinstance(content, list):
        content = _joined(content)
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise UnusableChatError("the content of a message is null" if content is None else "a content is no text")
    return {"role": _ROLES.get(role, role), "content": content, **message}


def _joined(parts: list[Any]) -> str:
    texts = [part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise UnusableChatError("a content has parts that are no text")
    return "".join(str(text) for text in texts)


def _decoded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise UnusableChatError("it is a string, and no JSON") from None
