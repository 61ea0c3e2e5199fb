"""Perplexity, size, speed, task scores and replies of one model, or of two side by side.

The numbers are plain, so that they can be written as JSON: under ``model``, and with a baseline under ``baseline``,
``difference`` and ``agreement``; replies to prompts under ``talk``.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_ft.checkpoints.architecture import check_causal_lm
from lowrank_ft.checkpoints.files import weight_bytes
from lowrank_ft.checkpoints.models import check_finite, load_model
from lowrank_ft.checkpoints.names import is_hub_id
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.data.encoding import check_vocabulary, text_ends, token_ids
from lowrank_ft.data.examples import context_length
from lowrank_ft.data.sources import read_rows, require_column, texts
from lowrank_ft.errors import ConfigError, NonFiniteError
from lowrank_ft.evaluation.answers import check_cache_dir
from lowrank_ft.evaluation.drafting import draft
from lowrank_ft.evaluation.lm_eval import load_tasks, run_tasks
from lowrank_ft.evaluation.perplexity import agreement, evaluate_blocks, sequences
from lowrank_ft.evaluation.prompts import PROMPTS, Prompt, read_prompts
from lowrank_ft.evaluation.talk import MAX_NEW_TOKENS, talk
from lowrank_ft.factorization.plan import count_parameters


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, and on what. Both models of a comparison are measured in the same way.

    Attributes:
        data: a text, jsonl or parquet file, or a dataset on the Hub, with ``data_split`` and ``data_config``.
        text_column: the column that holds the text.
        block_size: tokens of context; None for 1024, or what the models allow.
        stride: tokens between the beginnings of blocks that overlap; None where they do not.
        max_tokens: the first so many tokens of the text only.
        tasks: names of tasks of lm-evaluation-harness.
        limit: the first so many items of each task, and the first so many prompts, only.
        cache_dir: a folder that keeps the models' answers to tasks, for runs that go on; None writes nothing.
        talk: measure replies to prompts, see :func:`lowrank_ft.evaluation.talk.talk`.
        prompts: a text file with one a line, or a jsonl or parquet file or dataset with ``prompt`` or ``messages``; None
            for a short list of the package's own. Naming some means ``talk``.
        max_new_tokens: tokens of a reply, at most; None for 128.
        batch_size: blocks, items or prompts per forward pass.
    """

    data: str | None = None
    data_split: str = "test"
    data_config: str | None = None
    text_column: str = "text"
    block_size: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    tasks: Sequence[str] | None = None
    limit: int | None = None
    cache_dir: str | None = None
    batch_size: int = 8
    talk: bool = False
    prompts: str | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and settings of what is not measured."""
        if not (self.data or self.tasks or self.talks):
            raise ConfigError("there is nothing to measure; give --data, --tasks or --talk")
        for name, least in (("batch_size", 1), ("stride", 1), ("max_tokens", 2), ("limit", 1), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{_flag(name)} is {value}; it must be {least} or more")
        text, items, talks = (
            ("--data", self.data),
            ("--tasks or --talk", self.tasks or self.talks),
            ("--talk", self.talks),
        )
        tasks = ("--tasks", self.tasks)
        needs = {
            "cache_dir": tasks,
            "stride": text,
            "max_tokens": text,
            "block_size": text,
            "limit": items,
            "max_new_tokens": talks,
        }
        for name, (about, given) in needs.items():
            if getattr(self, name) is not None and not given:
                flag = _flag(name)
                raise ConfigError(f"{flag} applies to {about}, which is not given; add {about} or leave {flag} out")

    @property
    def talks(self) -> bool:
        """Whether replies are wanted."""
        return self.talk or bool(self.prompts)


def compare(
    source: Source,
    baseline: Source | None,
    settings: EvaluationSettings,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Measure a model, and a baseline with the same settings.

    Returns:
        ``model``; on a text, its name as ``data``; with a baseline ``baseline``, ``difference`` and, on a text,
        ``agreement``, which is None where the two do not read it as the same tokens. With replies, ``talk``:
        ``max_new_tokens``, ``agreement`` and ``replies`` of :func:`lowrank_ft.evaluation.talk.talk`, whose other numbers are
        under ``talk`` of each model. With an agreement, ``draft`` (:class:`lowrank_ft.evaluation.drafting.Draft`).

    Raises:
        ConfigError: a model is no causal language model, or does not allow the block size.
        DataError: the text cannot be read, or is too short.
    """
    sources = [source] if baseline is None else [source, baseline]
    configs = [s.load_config() for s in sources]
    for s, config in zip(sources, configs, strict=True):
        check_causal_lm(config, s)
    block_size = None
    if settings.data:  # one for both, or the numbers could not be compared
        sizes = [(getattr(c, "max_position_embeddings", None), s.name) for s, c in zip(sources, configs, strict=True)]
        block_size = min(context_length(settings.block_size, positions, name) for positions, name in sizes)
        if settings.stride is not None and settings.stride > block_size:
            raise ConfigError(f"--stride {settings.stride} exceeds the block size {block_size}; lower it")
    if settings.cache_dir is not None:
        check_cache_dir(settings.cache_dir)
    rows = read_texts(settings) if settings.data else None
    tasks = load_tasks(list(settings.tasks)) if settings.tasks else None
    prompts = _prompts(settings) if settings.talks else None

    measured = [measure(s, rows, tasks, block_size, settings, dtype, device, progress) for s in sources]
    results: dict[str, Any] = {"model": measured[0].numbers}
    if settings.data:
        results["data"] = str(settings.data) if is_hub_id(str(settings.data)) else Path(settings.data).name
    if len(measured) == 2:
        results["baseline"] = measured[1].numbers
        results["difference"] = difference(*(m.numbers for m in measured))
        mine, base = (m.compared for m in measured)
        if mine and base:
            results["agreement"] = agreement_of(mine, base, settings.batch_size, progress)
    if prompts:
        add_talk(results, measured, prompts, settings, progress)
    add_draft(results)
    return results


def add_draft(results: dict[str, Any]) -> None:
    """What the model is worth as a draft of the baseline, by its agreement on the baseline's replies, or else on the text."""
    agreed = (results.get("talk") or {}).get("agreement") or results.get("agreement")
    if agreed:
        cost = results["model"]["bytes"] / results["baseline"]["bytes"]
        results["draft"] = asdict(draft(agreed["top1"], cost))


def _prompts(settings: EvaluationSettings) -> list[Prompt]:
    if settings.prompts:
        return read_prompts(settings.prompts, settings.data_split, settings.data_config, settings.limit)
    return list(PROMPTS[: settings.limit])


def add_talk(
    results: dict[str, Any],
    measured: "Sequence[Measured]",
    prompts: list[Prompt],
    settings: EvaluationSettings,
    progress: bool = False,
) -> None:
    """Let the models reply, and put what that gives into the results, see :func:`compare`."""
    mine, base = measured[0], measured[1] if len(measured) == 2 else Measured({})
    most = settings.max_new_tokens or MAX_NEW_TOKENS
    found = talk(
        mine.model, mine.tokenizer, prompts, base.model, base.tokenizer, most, settings.batch_size, progress=progress
    )
    for side in ("model", "baseline"):
        if side in found:
            results[side]["talk"] = found.pop(side)
    results["talk"] = {"max_new_tokens": most, **found}


def read_texts(settings: EvaluationSettings) -> list[str]:
    """The texts that ``data`` names.

    Raises:
        DataError: there are none, or not in that column.
    """
    assert settings.data is not None
    rows = read_rows(settings.data, settings.data_split, settings.data_config)
    require_column(settings.data, [settings.text_column], rows.column_names, "choose with --text-column")
    return list(texts(rows, settings.text_column, settings.data))


@dataclass(frozen=True)
class Measured:
    """A model's numbers; itself and what it read, where it read a text; itself and its tokenizer, where it is to talk."""

    numbers: dict[str, Any]
    compared: "Compared | None" = None
    model: Any = None
    tokenizer: Any = None


@dataclass(frozen=True)
class Compared:
    """``ids (tokens,)``, and ``blocks`` and ``labels (n, block_size)`` that were cut from it."""

    model: Any
    ids: Tensor
    blocks: Tensor
    labels: Tensor | None


def measure(
    source: Source,
    rows: list[str] | None,
    tasks: dict[str, Any] | None,
    block_size: int | None,
    settings: EvaluationSettings,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    progress: bool = False,
) -> Measured:
    """Numbers of one model, under its own tokenizer."""
    folder = source.download()
    tokenizer = source.load_tokenizer()
    if dtype == "auto" and device == "cpu":
        dtype = torch.float32  # without matrix units for 16 bits, a CPU takes several times as long in them
    model = load_model(source, dtype, device)
    numbers: dict[str, Any] = {
        "name": source.name,
        "parameters": count_parameters(model),
        "bytes": weight_bytes(folder),
    }
    compared = None
    if rows is not None and block_size is not None:
        ids = torch.from_numpy(token_ids(rows, tokenizer)[: settings.max_tokens]).long()
        blocks, labels = sequences(ids, block_size, settings.stride, text_ends(tokenizer)[0])
        check_vocabulary(model, blocks, str(settings.data), source.name)
        result = evaluate_blocks(model, blocks, settings.batch_size, progress=progress, labels=labels)
        if not math.isfinite(result.loss):
            raise _not_a_number(model, source.name, f"the loss is {result.loss}")
        numbers |= {
            "block_size": block_size,
            "stride": settings.stride,
            "tokens": result.tokens,
            "loss": result.loss,
            "perplexity": result.perplexity,
            "tokens_per_second": result.tokens_per_second,
        }
        compared = Compared(model, ids, blocks, labels)
    if tasks:
        try:
            scores = run_tasks(
                model, tokenizer, tasks, settings.batch_size, settings.limit, settings.cache_dir, progress
            )
        except NonFiniteError:
            raise _not_a_number(model, source.name, "a log-likelihood of the tasks is nan") from None
        except IndexError:
            check_vocabulary(model, torch.tensor(max(tokenizer.get_vocab().values())), "the tasks", source.name)
            raise
        numbers["tasks"] = {task: {m: asdict(score) for m, score in s.items()} for task, s in scores.items()}
    return Measured(numbers, compared, *((model, tokenizer) if settings.talks else ()))


def _not_a_number(model: Any, name: str, found: str) -> NonFiniteError:
    check_finite(model, name)  # raises, where it is the weights
    advice = "correct its config.json" if model.dtype == torch.float32 else "try --dtype float32"
    return NonFiniteError(f"{name}: {found}, though every weight is a number; {advice}")


def agreement_of(mine: Compared, base: Compared, batch_size: int = 8, progress: bool = False) -> dict[str, Any] | None:
    """Agreement with the baseline; None, and a note, where the two do not read the text as the same tokens."""
    sizes = [c.model.config.get_text_config().vocab_size for c in (mine, base)]
    reason = ""
    if sizes[0] != sizes[1]:
        reason = f"the vocabularies have {sizes[0]} and {sizes[1]} tokens"
    elif not torch.equal(mine.ids, base.ids):
        reason = "the tokenizers cut the text into different tokens"
    if reason:
        print(f"note: no agreement with the baseline is shown, because {reason}", file=sys.stderr)
        return None
    return asdict(agreement(mine.model, base.model, mine.blocks, batch_size, progress=progress, labels=mine.labels))


def difference(mine: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Model minus baseline, of every number that both have."""
    keys = ("parameters", "bytes", "loss", "perplexity", "tokens_per_second")
    found: dict[str, Any] = {key: mine[key] - base[key] for key in keys if key in mine}
    if "tasks" in mine:
        found["tasks"] = {
            task: {metric: score["value"] - base["tasks"][task][metric]["value"] for metric, score in scores.items()}
            for task, scores in mine["tasks"].items()
        }
    return found


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
