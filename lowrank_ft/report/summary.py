"""The main table, dense against low-rank, of the model card and of the report; and the evaluation that goes into it.

An evaluation is what ``lowrank-ft eval --json`` prints: numbers under ``model``, perhaps under ``baseline``, and
perhaps more that belongs to both. Numbers that are not known here are shown under their own names.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lowrank_ft.console import human_count
from lowrank_ft.costs.flops import Comparison
from lowrank_ft.errors import DataError

Results = Mapping[str, Any]
"""What ``lowrank-ft eval --json`` prints."""

FLOPS_NOTE = (
    "FLOPs: two per multiply-add, over all linears, output head included, each once per token; of experts, as many as a token "
    "meets. Attention scores, which grow with the context, are not in it, nor are norms and activations."
)

# Said elsewhere, or no result of its own.
_NOT_RESULTS = ("name", "parameters", "bytes", "block_size", "tokens", "stride", "max_tokens", "max_new_tokens")
_ALONE = ("model", "baseline", "difference")
_KNOWN = {
    "perplexity": ("perplexity", "{:.3f}"),
    "loss": ("loss, nats per token", "{:.4f}"),
    "tokens_per_second": ("forward speed, tokens/s", "{:,.0f}"),
    "agreement: kl": ("KL divergence from the baseline, nats per token", "{:.4f}"),
    "agreement: top1": ("same most likely token as the baseline", "{:.1%}"),
    "talk: repetition": ("repeated 4-grams in replies", "{:.1%}"),
    "talk: stopped": ("replies that end by themselves", "{:.1%}"),
    "talk: reply_tokens": ("tokens of a reply", "{:.1f}"),
    "talk: agreement: kl": ("KL divergence from the baseline on its replies, nats per token", "{:.4f}"),
    "talk: agreement: top1": ("same most likely token as the baseline on its replies", "{:.1%}"),
}

_SUBTRACTED = ("loss", "talk: repetition", "talk: stopped")
SHOWN_REPLIES = 5


class Row(NamedTuple):
    """One line of the table, ready to be shown; empty where there is nothing to say."""

    name: str
    dense: str
    compact: str
    change: str


def read_evaluation(path: str | Path) -> Results:
    """The output of ``lowrank-ft eval --json``.

    Raises:
        DataError: it cannot be read, or is something else.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is no readable JSON ({' '.join(str(error).split())}); lowrank-ft eval --json writes it"
        ) from None
    models = [data.get(k, {}) for k in ("model", "baseline")] if isinstance(data, dict) else [None]
    if not all(isinstance(m, dict) for m in models) or not models[0]:
        raise DataError(f"{path} has no results under 'model'; write it with lowrank-ft eval --json")
    return data


def size_rows(comparison: Comparison) -> list[Row]:
    dense, compact = comparison.dense, comparison.compact
    return [
        Row("parameters", f"{dense.parameters:,}", f"{compact.parameters:,}", change(dense.parameters, compact.parameters)),
        Row("FLOPs per token", human_count(dense.flops), human_count(compact.flops), change(dense.flops, compact.flops)),
        Row(
            "multiply-adds per token, factored linears", f"{dense.factored_multiply_adds:,}",
            f"{compact.factored_multiply_adds:,}", change(dense.factored_multiply_adds, compact.factored_multiply_adds),
        ),
    ]  # fmt: skip


def evaluation_rows(evaluation: Results | None) -> list[Row]:
    """The known numbers first, then tasks and others by name."""
    if not evaluation:
        return []
    models = [evaluation.get(k) or {} for k in ("model", "baseline")]
    after, before = ({**_numbers({k: v for k, v in m.items() if k != "tasks"}), **task_scores(m)} for m in models)
    both = _numbers({k: v for k, v in evaluation.items() if k not in _ALONE})
    rows = []
    for key in sorted(after, key=lambda k: list(_KNOWN).index(k) if k in _KNOWN else len(_KNOWN)):
        name, shown = _shown(key, after[key])
        if key not in before:
            rows.append(Row(name, "", shown, ""))
        elif key in _KNOWN and key not in _SUBTRACTED:
            rows.append(Row(name, _shown(key, before[key])[1], shown, change(before[key], after[key])))
        else:  # of a score, a share or a loss, a percentage would say little
            rows.append(Row(name, _shown(key, before[key])[1], shown, f"{after[key] - before[key]:+.4f}"))
    return rows + [Row(_shown(k, v)[0], "", _shown(k, v)[1], "") for k, v in both.items()]


class Replies(NamedTuple):
    """What both models say to one prompt, and how long each reply is; empty where the dense one was not asked."""

    prompt: str
    dense: str
    dense_length: str
    compact: str
    compact_length: str


def side_by_side(evaluation: Results | None) -> list[Replies]:
    """The first few replies of an evaluation, as far as they are what ``lowrank-ft eval --talk --json`` prints."""
    talk = (evaluation or {}).get("talk")
    found = talk.get("replies") if isinstance(talk, Mapping) else None
    entries = [e for e in found if isinstance(e, Mapping)] if isinstance(found, list) else []
    return [
        Replies(str(e.get("prompt", "")), *_reply(e.get("baseline")), *_reply(e.get("model")))
        for e in entries[:SHOWN_REPLIES]
    ]


def _reply(entry: Any) -> tuple[str, str]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("text"), str):
        return "", ""
    length = f"{entry.get('tokens', '?')} tokens" + ("" if entry.get("ended") else ", cut off")
    return entry["text"], length


def _shown(key: str, value: float) -> tuple[str, str]:
    name, form = _KNOWN.get(key, (key.replace("_", " "), "{:.4g}"))
    return name, form.format(value)


def task_scores(entry: Mapping[str, Any]) -> dict[str, float]:
    """``tasks: {task: {metric: {"value": 0.5, ...}}}`` by task and metric."""
    tasks = entry.get("tasks") or {}
    return {
        f"{task}, {metric}": score["value"]
        for task, scores in (tasks.items() if isinstance(tasks, Mapping) else ())
        for metric, score in (scores.items() if isinstance(scores, Mapping) else ())
        if isinstance(score, Mapping) and _is_number(score.get("value"))
    }


def main_table(comparison: Comparison, evaluation: Results | None = None) -> str:
    """The table in Markdown."""
    rows = [*size_rows(comparison), *evaluation_rows(evaluation)]
    lines = ["| | dense | low-rank | change |", "|---|---:|---:|---:|"]
    lines += ["| " + " | ".join(cell(c) for c in row) + " |" for row in rows]
    return "\n".join([*lines, "", FLOPS_NOTE])


def change(before: float, after: float) -> str:
    """``-34.5%``; empty where there is nothing to compare with."""
    return f"{after / before - 1:+.1%}" if before else ""


def _numbers(entry: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """All finite numbers that are results, those of nested entries under joined names."""
    found: dict[str, float] = {}
    for key, value in entry.items():
        if key in _NOT_RESULTS:
            continue
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{key}: ")
        elif _is_number(value):
            found[f"{prefix}{key}"] = value
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def cell(text: str) -> str:
    """A name or number for a table in Markdown, where it means nothing but itself."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
    return re.sub(r"([|\[\]`*])", r"\\\1", text)
