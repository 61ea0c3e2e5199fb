"""A model as lm-evaluation-harness asks it: the harness' own ``HFLM``, in less time, and resumable.

The harness asks for each choice of a question by itself, and sorts all requests by length. Here

    choices     of one context are scored together, the context read once (:mod:`.continuations`)
    batches     are made from all requests before known answers are left out, so that a run that goes on has the
                batches of one that was not killed, and the same scores to the last bit
    softmax     is in float32 also where the weights have 16 bits

Imports the harness, so it is imported only when tasks are run.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from lowrank_ft.console import progress_bar
from lowrank_ft.errors import NonFiniteError
from lowrank_ft.evaluation.answers import Answers, key_of
from lowrank_ft.evaluation.continuations import continuation_scores, shares_contexts

Request = tuple[Any, list[int], list[int]]
"""The texts, the token ids of the context, and those of the continuation."""

_ROWS_PER_ITEM = 4
"""Choices per item of a batch, on average at most; longer lists of choices are cut, which bounds the memory."""


class TaskModel(HFLM):
    """Answers from the model, or from what it has answered before.

    Args:
        model: a causal language model.
        batch_size: items per forward pass.
        answers: where answers are looked up and kept; None for neither.

    Raises:
        NonFiniteError: (when asked) a log-likelihood is not a number. The harness would take the first choice.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int, answers: Answers | None, progress: bool = False
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
        self._answers = answers
        self._size = batch_size
        self._progress = progress
        self._shares = shares_contexts(model)
        self._bar: Any = None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation after its context; the harness cuts texts into tokens."""
        with self._watch("tasks", len(requests)):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts; the harness cuts them into windows and asks for these."""
        with self._watch("tasks", None):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that the model writes. What is drawn at random is not kept, or every draw would be the same."""
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        keys = [key_of(["generate", c, r.args[1]]) for c, r in zip(contexts, requests, strict=True)]
        # Longest first, and only one kind of settings in a batch, as the harness does.
        order = sorted(range(len(keys)), key=lambda i: (_settings(requests[i]), -len(contexts[i]), contexts[i]))
        same = [list(group) for _, group in itertools.groupby(order, key=lambda i: _settings(requests[i]))]
        found: dict[int, str] = {}
        with self._watch("tasks", len(requests)):
            for batch in (part for group in same for part in _cut(group, self._size)):
                answers = None if requests[batch[0]].args[1].get("do_sample", False) else self._answers
                found |= {i: answers.get(keys[i]) for i in batch if answers and keys[i] in answers}
                if left := [i for i in batch if i not in found]:
                    texts = super().generate_until([requests[i] for i in left], disable_tqdm=True)
                    found |= dict(zip(left, texts, strict=True))
                    if answers:
                        answers.add({keys[i]: found[i] for i in left})
                self._bar.update(len(batch))
        return [found[i] for i in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        keys = [key_of([context, continuation]) for _, context, continuation in requests]
        found: dict[str, tuple[float, bool]] = {}
        for batch in self._batches(requests):
            if self._answers is not None:
                known = {keys[i]: self._answers.get(keys[i]) for i in batch if keys[i] in self._answers}
                found |= {key: (float(likelihood), bool(first)) for key, (likelihood, first) in known.items()}
            left = list({keys[i]: i for i in batch if keys[i] not in found}.values())
            if left:
                scores = self._scores([requests[i] for i in left])
                if any(math.isnan(likelihood) for likelihood, _ in scores):
                    raise NonFiniteError("a log-likelihood is not a number")
                new = {keys[i]: score for i, score in zip(left, scores, strict=True)}
                found |= new
                if self._answers is not None:
                    self._answers.add(new)
            if self._bar is not None:
                self._bar.update(len(batch))
        return [found[key] for key in keys]

    def _batches(self, requests: list[Request]) -> Iterator[list[int]]:
        """Places in ``requests``: contexts of one length and several choices each; then those without company."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            shared = self._shares and len(context) + len(continuation) <= self.max_length + 1  # or it is cut
            by_context.setdefault(tuple(context) if shared else (-1, i), []).append(i)
        alone = [i for group in by_context.values() if len(group) == 1 for i in group]
        groups = [
            part for group in by_context.values() if len(group) > 1 for part in _cut(group, _ROWS_PER_ITEM * self._size)
        ]

        def size(group: list[int]) -> tuple[int, int]:
            return len(requests[group[0]][1]), max(len(requests[i][2]) for i in group)

        groups.sort(key=lambda group: (*(-n for n in size(group)), requests[group[0]][1]))
        for _, same in itertools.groupby(groups, key=lambda group: size(group)[0]):
            batch: list[list[int]] = []
            for group in same:
                rows = sum(map(len, batch)) + len(group)
                if batch and (len(batch) == self._size or rows > _ROWS_PER_ITEM * self._size):
                    yield [i for each in batch for i in each]
                    batch = []
                batch.append(group)
            yield [i for each in batch for i in each]
        alone.sort(key=lambda i: (-len(requests[i][1]) - len(requests[i][2]), requests[i][1], requests[i][2]))
        yield from _cut(alone, self._size)

    def _scores(self, requests: list[Request]) -> list[tuple[float, bool]]:
        """Of one batch, whose contexts are of one length where they are shared."""
        together: dict[tuple[int, ...], list[list[int]]] = {}
        for _, context, continuation in requests:
            together.setdefault(tuple(context), []).append(continuation)
        lengths = {len(context) for context in together}
        longest = max(len(context) + len(continuation) for _, context, continuation in requests)
        if not self._shares or len(lengths) > 1 or longest > self.max_length + 1 or len(together) == len(requests):
            return super()._loglikelihood_tokens(requests, disable_tqdm=True)
        contexts = torch.tensor(list(together), device=self.device)
        scores = continuation_scores(self.model, contexts, list(together.values()))
        by_context = {context: iter(each) for context, each in zip(together, scores, strict=True)}
        return [next(by_context[tuple(context)]) for _, context, _ in requests]

    @contextlib.contextmanager
    def _watch(self, title: str, total: int | None) -> Iterator[None]:
        with progress_bar(total=total, desc=title, unit="request", progress=self._progress) as self._bar:
            yield
        self._bar = None


def _settings(request: Any) -> str:
    return json.dumps(request.args[1], sort_keys=True, default=str)


def _cut(places: list[int], size: int) -> Iterator[list[int]]:
    return (places[i : i + size] for i in range(0, len(places), size))
