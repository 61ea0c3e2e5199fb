"""From text and chats to token ids, and what makes two tokenizers the same."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_ft.errors import DataError

_PROBE = (
    'def f(x):\n\treturn {"a": 3.14159}  # 2024\r\n\n The café·s naïve Ünïcode — 东京 Москва עברית 🙂 <s></s> don\'t'
)


def token_ids(texts: Iterable[str], tokenizer: Any) -> np.ndarray:
    """All texts' tokens in one array: each begins as the tokenizer begins a text, and ends with its end-of-text token."""
    begin, end = text_ends(tokenizer)
    pieces = []
    for text in texts:
        # Long documents are meant: the blocks are cut afterwards, so the length warning would mislead.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces.append(np.array([*begin, *ids, *end], dtype=np.int32))
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)


def text_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids with which the tokenizer begins a text, and its end-of-text token; empty where it has none."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    bos = tokenizer.bos_token_id
    begin = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    return begin, end


def without_begin(ids: Tensor, begin: Sequence[int]) -> Tensor:
    """``ids (tokens,)`` without the tokens ``begin`` at their start, if they are there."""
    return ids[len(begin) :] if begin and ids[: len(begin)].tolist() == list(begin) else ids


def with_begin(blocks: Tensor, begin: Sequence[int]) -> Tensor:
    """``blocks (n, length)``, the tokens ``begin`` before each."""
    return torch.cat([torch.tensor(begin, dtype=blocks.dtype).expand(len(blocks), -1), blocks], dim=1)


def encode_chat(
    messages: list[dict[str, Any]], tokenizer: Any, tools: list[Any] | None = None
) -> tuple[list[int], list[bool]]:
    """Token ids of a chat in the tokenizer's own template, and which of them belong to the assistant's replies.

    A template that marks replies itself (``{% generation %}``) is believed. Otherwise a reply is the text that the
    template adds to the chat before it with its generation prompt: what the model will have to write when it serves.
    Some templates rewrite an earlier reply when a later turn is added (Qwen3 takes its reasoning out): such a reply is
    not what the model will write, and does not count.

    Args:
        tools: handed to the template.

    Raises:
        DataError: the template is missing, or no reply of the chat can be told apart.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the tokenizer has no chat template; use one that has, or train on --text-column")
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        encoded = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoded["input_ids"]), [bool(m) for m in encoded["assistant_masks"]]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    turns = [turn for turn, message in enumerate(messages) if turn > 0 and message.get("role") == "assistant"]
    replies = []
    for turn in turns:
        before = tokenizer.apply_chat_template(messages[:turn], tools=tools, tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: turn + 1], tools=tools, tokenize=False)
        if text.startswith(after) and after.startswith(before):
            replies.append((len(before), len(after)))
    if turns and not replies:
        raise DataError(
            "the chat template rewrites earlier turns, so replies cannot be told apart; "
            "use a template with {% generation %} marks"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    counted = [any(first <= start < last for first, last in replies) for start, _ in offsets]
    return list(encoded["input_ids"]), counted


def tokenizer_facts(tokenizer: Any, name: str) -> dict[str, Any]:
    """Name, hash and size of a tokenizer.

    The hash is over what the ids mean: the vocabulary, how a text begins and ends, and the ids of a fixed text in
    several scripts, which depend on merges and normalization. The name plays no part, so a copy has the same hash.

    Raises:
        DataError: the tokenizer has no end-of-text token.
    """
    begin, end = text_ends(tokenizer)
    if not end:
        raise DataError(
            f"the tokenizer of {name} has no end-of-text token, which goes between documents; set eos_token in its "
            "tokenizer_config.json"
        )
    vocabulary = tokenizer.get_vocab()
    probe = tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    described = json.dumps([sorted(vocabulary.items()), begin, end, list(probe)])
    return {
        "name": name,
        "sha256": hashlib.sha256(described.encode()).hexdigest(),
        "vocab_size": max([*vocabulary.values(), *begin, *end]) + 1,
        "end_of_text": end[0],
    }


def shown_tokenizer(facts: dict[str, Any]) -> str:
    """One line for people."""
    return f"{facts['name']} ({facts['vocab_size']} tokens, sha256 {facts['sha256'][:16]}...)"


def check_vocabulary(model: Any, ids: Tensor, name: str, tokenizer: str = "") -> None:
    """Raise a DataError where the tokenizer, perhaps named, gives an id that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = int(ids.max())
    if largest >= rows:
        raise DataError(
            f"the tokenizer{f' of {tokenizer}' if tokenizer else ''} gives {name} token ids up to {largest}, and the "
            f"model has {rows} embeddings; "
            "the tokenizer in the folder is not this model's"
        )
