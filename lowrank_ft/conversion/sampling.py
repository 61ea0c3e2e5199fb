"""Calibration text that a causal language model writes itself, so that nothing has to be downloaded.

Tokens are drawn from the model's own distribution, unchanged (temperature 1), from its begin-of-text token on: what a
model says is what it was trained on, near enough to fit its factors to it (Liu et al. 2023, arXiv 2305.17888, use such
text to train quantized models).

An instruct model writes chats in the same way: it gets its template up to where a user's words begin, and goes on with
the words, the end of the turn and the reply (Xu et al. 2024, arXiv 2406.08464). What the template puts between two turns
is not drawn, but put there; everything else is. A chat goes on with further turns to the end of the block.
"""

import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowrank_ft.console import progress_bar
from lowrank_ft.conversion.processes import ONE, Processes
from lowrank_ft.data.encoding import check_vocabulary
from lowrank_ft.data.turns import NoTurnsError, Turns, find_turns
from lowrank_ft.errors import DataError
from lowrank_ft.nn.modes import evaluating

_USER_SHARE = 4  # a user's turn takes at most this part of the block, so that there is a reply in it


@torch.no_grad()
def generates(model: Any) -> bool:
    """Whether transformers can generate with it; an encoder, or a model of another kind, cannot."""
    return bool(getattr(model, "can_generate", lambda: False)())


def sample_blocks(
    model: Any,
    blocks: int,
    length: int,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
    turns: Turns | None = None,
    processes: Processes = ONE,
) -> Tensor:
    """Let ``model`` write ``blocks`` texts of ``length`` tokens; int64 ``(blocks, length)`` on the CPU.

    A text goes on past an end-of-text token, as packed training data do. Each batch has a seed of its own.

    Args:
        turns: of the model's chat template, if the texts are to be chats; their beginning is part of ``length``.
        processes: each writes some of the batches, and all get all.

    Raises:
        DataError: the model cannot generate.
    """
    if not generates(model) or getattr(model.config, "is_encoder_decoder", False):
        raise DataError(
            f"a {type(model).__name__} cannot write its own calibration text; give --calibration-data FILE, "
            "or --method svd, which needs none"
        )
    first = _first_token(model)
    settings = model.generation_config
    ends = {*_ends_of_text(model), turns.to_assistant[0], turns.to_user[0]} if turns else set()
    written: dict[int, Tensor] = {}
    batch_size = min(batch_size, -(-blocks // processes.count))
    title = f"write calibration {'chats' if turns else 'text'}"
    bar = progress_bar(total=blocks * length, desc=title, unit="token", progress=progress)
    try:
        # The checkpoint's own settings may punish repetition or ban tokens.
        model.generation_config = type(settings)()
        with evaluating(model), torch.random.fork_rng(devices=_cuda_devices(model)):
            starts = range(0, blocks, batch_size)
            for start in starts[processes.rank :: processes.count]:
                torch.manual_seed(1_000_003 * seed + start)
                count = min(batch_size, blocks - start)
                if turns:
                    prompt = torch.tensor([turns.begin]).expand(count, -1)
                elif first is None:
                    prompt = torch.randint(model.config.get_text_config().vocab_size, (count, 1))
                else:
                    prompt = torch.full((count, 1), first)
                new = length - prompt.shape[1]
                ids = model.generate(
                    prompt.to(model.device), attention_mask=torch.ones_like(prompt).to(model.device), do_sample=True,
                    temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=new, max_new_tokens=new, eos_token_id=None,
                    pad_token_id=0, use_cache=True,
                    logits_processor=[_TakeTurns(turns, ends, count, length // _USER_SHARE)] if turns else [],
                )  # fmt: skip
                written[start] = ids.cpu()
                bar.update(min(blocks * length, processes.count * ids.numel()))
    finally:
        bar.close()
        model.generation_config = settings
    found = {start: ids for each in processes.collect(written) for start, ids in each.items()}
    return torch.cat([found[start] for start in starts])


def own_turns(model: Any, tokenizer: Any, length: int) -> Turns | None:
    """Of the chats that a model can write in blocks of ``length`` tokens; None where it writes none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        turns = find_turns(tokenizer)
        around = len(turns.begin) + len(turns.to_assistant)
        if 2 * around > length:
            raise NoTurnsError(f"the chat template takes {around} tokens of a block of {length}")
    except NoTurnsError as reason:
        print(f"note: the model writes plain text and no chats: {reason}", file=sys.stderr)
        return None
    ids = torch.tensor([*turns.begin, *turns.to_assistant, *turns.to_user])
    check_vocabulary(model, ids, "its chat template")
    return turns


@dataclass
class _Row:
    """Whose words are drawn, how many there are so far, and what of the template comes before the next."""

    user: bool = True
    words: int = 0
    fixed: list[int] = field(default_factory=list)


class _TakeTurns:
    """Changes logits ``(rows, vocabulary)`` so that a chat keeps to its template: a processor of ``generate``.

    All tokens that end a text mean the end of a turn, so their probabilities are added up in the template's own. A turn
    has at least one token.
    """

    def __init__(self, turns: Turns, ends: Collection[int], rows: int, most_of_user: int) -> None:
        self.turns, self.ends, self.most_of_user = turns, sorted(ends), most_of_user
        self.rows = [_Row() for _ in range(rows)]
        self.begun = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row, last, logits in zip(self.rows, input_ids[:, -1].tolist(), scores, strict=True):
            if self.begun:
                self._read(row, last)
            self._constrain(row, logits)
        self.begun = True
        return scores

    def _read(self, row: _Row, token: int) -> None:
        if row.fixed:
            row.fixed.pop(0)
        elif token in self.ends:
            row.fixed = list(self._switch(row)[1:])
            row.user, row.words = not row.user, 0
        else:
            row.words += 1

    def _constrain(self, row: _Row, logits: Tensor) -> None:
        """In place."""
        end = self._switch(row)[0]
        if row.fixed or (row.user and row.words >= self.most_of_user):
            logits.fill_(-torch.inf)
            logits[row.fixed[0] if row.fixed else end] = 0.0
            return
        any_end = logits[self.ends].logsumexp(0)
        logits[self.ends] = -torch.inf
        if row.words:
            logits[end] = any_end

    def _switch(self, row: _Row) -> tuple[int, ...]:
        return self.turns.to_assistant if row.user else self.turns.to_user


def _ends_of_text(model: Any) -> list[int]:
    ids = model.generation_config.eos_token_id
    ids = model.config.get_text_config().eos_token_id if ids is None else ids
    return list(ids) if isinstance(ids, list) else [] if ids is None else [ids]


def _first_token(model: Any) -> int | None:
    config = model.config.get_text_config()
    for token in (config.bos_token_id, config.eos_token_id):
        token = token[0] if isinstance(token, list) else token
        if token is not None:
            return int(token)
    return None


def _cuda_devices(model: Any) -> list[int]:
    return [model.device.index or 0] if model.device.type == "cuda" else []
