"""Whether a chat model still talks: greedy replies to prompts, and what can be measured on them.

    agreement     on the baseline's replies, token by token: KL(baseline || model), and the share of the tokens for which
                  both rank the same one first
    repetition    share of a reply's 4-grams that stood in it before, mean over the replies
    stopping      share of the replies that end by themselves, before the most tokens that are allowed

A damaged model keeps a fair perplexity long after it has begun to say the same thing again and again, or does not stop.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_ft.console import progress_bar
from lowrank_ft.data.encoding import check_vocabulary
from lowrank_ft.data.examples import IGNORED
from lowrank_ft.errors import ConfigError, DataError, first_line
from lowrank_ft.evaluation.perplexity import agreement
from lowrank_ft.evaluation.prompts import Prompt, shown
from lowrank_ft.nn.modes import evaluating

MAX_NEW_TOKENS = 128
_GRAM = 4


@dataclass(frozen=True)
class Reply:
    """What a model wrote to one prompt.

    Attributes:
        prompt: token ids, in the chat template.
        ids: what was generated, with the token that ends it if it has ended.
        text: the same without special tokens.
        ended: it ended by itself.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    ended: bool

    @property
    def repetition(self) -> float:
        """See :func:`repetition`; the token that ends the reply is not one of its words."""
        return repetition(self.ids[:-1] if self.ended else self.ids)


def repetition(ids: Sequence[int]) -> float:
    """Share of the 4-grams that stood before, 0 to 1; 0 where there are fewer than two."""
    grams = [tuple(ids[i : i + _GRAM]) for i in range(len(ids) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def talk(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    baseline: Any = None,
    baseline_tokenizer: Any = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[str, Any]:
    """Replies of ``model``, and of ``baseline``, with what is measured on them.

    Args:
        prompts: a question each, or a chat that ends with one.
        baseline: the dense model; None for the model alone.
        baseline_tokenizer: by default that of the model.
        max_new_tokens: tokens of a reply, at most.

    Returns:
        ``model`` and ``baseline``, each with ``repetition``, ``stopped`` (0 to 1) and ``reply_tokens`` (mean).
        ``agreement``: ``kl`` (nats per token), ``top1`` (0 to 1) and ``tokens``, over the baseline's replies; None, and a
        note, where the two do not read the prompts as the same tokens. ``replies``: for each prompt ``prompt``, ``model``
        and ``baseline``, the last two with ``text``, ``tokens``, ``ended`` and ``repetition``. What belongs to a
        baseline is there only with one.

    Raises:
        ConfigError: a prompt and its reply do not fit into the positions of the model.
        DataError: there is no prompt, or a tokenizer has no chat template, one that refuses a prompt, or is not its model's.
    """
    sides = {"model": (model, tokenizer)}
    if baseline is not None:
        sides["baseline"] = (baseline, baseline_tokenizer or tokenizer)
    ends = sorted({end for side in sides.values() for end in _ends(*side)})
    written = {
        name: write_replies(*side, prompts, max_new_tokens, batch_size, ends, progress) for name, side in sides.items()
    }
    results: dict[str, Any] = {name: _summary(replies) for name, replies in written.items()}
    if baseline is not None:
        results["agreement"] = _agreement(model, baseline, written, batch_size, progress)
    results["replies"] = [
        {"prompt": shown(prompt), **{name: _facts(replies[i]) for name, replies in written.items()}}
        for i, prompt in enumerate(prompts)
    ]
    return results


@torch.no_grad()
def write_replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
    ends: Sequence[int] | None = None,
    progress: bool = False,
) -> list[Reply]:
    """Greedy replies, one for each prompt. The checkpoint's own generation settings do not count.

    Args:
        ends: ids that end a reply; by default those that model and tokenizer name.

    Raises:
        ConfigError, DataError: see :func:`talk`.
    """
    if not prompts:
        raise DataError("there is no prompt to reply to; give at least one")
    ends = _ends(model, tokenizer) if ends is None else ends
    encoded = [_encode(prompt, number, tokenizer) for number, prompt in enumerate(prompts, start=1)]
    check_vocabulary(model, torch.tensor([max(max(e) for e in encoded)]), "the prompts")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, encoded))
    if most is not None and longest + max_new_tokens > most:
        raise ConfigError(
            f"the longest prompt has {longest} tokens, and with {max_new_tokens} of a reply exceeds the {most} positions of "
            "the model; lower --max-new-tokens, or shorten the prompt"
        )
    settings, replies = model.generation_config, []
    bar = progress_bar(total=len(prompts), desc="replies", unit="reply", progress=progress)
    try:
        # The checkpoint's own settings may sample, punish repetition or ban tokens.
        model.generation_config = type(settings)()
        with evaluating(model):
            for start in range(0, len(encoded), batch_size):
                batch = encoded[start : start + batch_size]
                ids, mask = _pad(batch, left=True)
                written = model.generate(
                    ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False, use_cache=True,
                    max_new_tokens=max_new_tokens, eos_token_id=list(ends) or None, pad_token_id=0,
                )[:, ids.shape[1] :].tolist()  # fmt: skip
                replies += [_reply(p, new, ends, tokenizer) for p, new in zip(batch, written, strict=True)]
                bar.update(len(batch))
    finally:
        bar.close()
        model.generation_config = settings
    return replies


def _encode(prompt: Prompt, number: int, tokenizer: Any) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template, which replies need; evaluate a model that is no chat model with --data, or "
            "copy chat_template.jinja into its folder"
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # what a template raises, or jinja about it
        raise DataError(f"the chat template refuses prompt {number} ({first_line(error)}); take it out") from error
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _pad(rows: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
    """``(rows, longest)``: ids, and 1 where they are no padding."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


def _reply(prompt: list[int], new: list[int], ends: Sequence[int], tokenizer: Any) -> Reply:
    """Up to the first end; what follows it is padding."""
    length = next((i for i, token in enumerate(new) if token in ends), None)
    ids = new if length is None else new[: length + 1]
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Reply(tuple(prompt), tuple(ids), text, length is not None)


def _ends(model: Any, tokenizer: Any) -> list[int]:
    named = [model.generation_config.eos_token_id, tokenizer.eos_token_id]
    flat = [t for ids in named for t in (ids if isinstance(ids, list) else [ids])]
    return sorted({int(t) for t in flat if t is not None})


def _summary(replies: Sequence[Reply]) -> dict[str, float]:
    count = len(replies)
    return {
        "repetition": sum(r.repetition for r in replies) / count,
        "stopped": sum(r.ended for r in replies) / count,
        "reply_tokens": sum(len(r.ids) for r in replies) / count,
    }


def _facts(reply: Reply) -> dict[str, Any]:
    return {"text": reply.text, "tokens": len(reply.ids), "ended": reply.ended, "repetition": reply.repetition}


def _agreement(
    model: Any, baseline: Any, written: dict[str, list[Reply]], batch_size: int, progress: bool
) -> dict[str, Any] | None:
    """Teacher-forced: both models read the baseline's replies, and predict each token of them."""
    mine, base = written["model"], written["baseline"]
    sizes = [m.config.get_text_config().vocab_size for m in (model, baseline)]
    same = all(m.prompt == b.prompt for m, b in zip(mine, base, strict=True))
    if sizes[0] != sizes[1] or not same:
        why = "the tokenizers or chat templates differ" if sizes[0] == sizes[1] else (
            f"the vocabularies have {sizes[0]} and {sizes[1]} tokens")  # fmt: skip
        print(f"note: no agreement on replies is shown, because {why}", file=sys.stderr)
        return None
    # A causal model does not look to the right, so that padding there needs no mask.
    rows, _ = _pad([r.prompt + r.ids for r in base], left=False)
    labels = torch.full_like(rows, IGNORED)
    for i, reply in enumerate(base):
        span = slice(len(reply.prompt), len(reply.prompt) + len(reply.ids))
        labels[i, span] = rows[i, span]
    return asdict(agreement(model, baseline, rows, batch_size, progress=progress, labels=labels))
