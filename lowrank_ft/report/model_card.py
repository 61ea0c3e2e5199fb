"""The README.md of an exported checkpoint."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from transformers import PreTrainedModel
from yaml import YAMLError

from lowrank_ft.checkpoints.format import PLACEHOLDER
from lowrank_ft.checkpoints.names import is_hub_id
from lowrank_ft.costs.flops import Comparison, compare
from lowrank_ft.errors import CheckpointError, CheckpointNotFoundError, first_line
from lowrank_ft.report.page import TEMPLATES
from lowrank_ft.report.summary import Results, cell, main_table, task_scores

_TABLE_BEGIN, _TABLE_END = "<!-- begin: main table -->", "<!-- end: main table -->"

_AUTO_CLASSES = (
    "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification", "AutoModelForQuestionAnswering", "AutoModelForImageClassification",
    "AutoModelForSpeechSeq2Seq",
)  # fmt: skip

_LICENCE = ("license", "license_name", "license_link")

_CARD, _DENSE_CARD = TEMPLATES / "card.md", TEMPLATES / "dense_card.md"


def model_card(
    model: PreTrainedModel,
    *,
    base_model: str | None = None,
    results: Mapping[str, object] | None = None,
    command: str | None = None,
    repo: str = PLACEHOLDER,
    evaluation: Results | None = None,
    datasets: Iterable[str] = (),
    picture: str | None = None,
    from_scratch: bool = False,
    base_card: Path | None = None,
) -> str:
    """The card's text, with its YAML header.

    Args:
        evaluation: what ``lowrank-ft eval --json`` prints, for the main table.
        datasets: names of the data that it was fitted to or trained on; those on the Hub go into the header.
        picture: file name of the rank map, beside the card.
        from_scratch: there never was a dense model.
        base_card: the folder of the model that it came from, whose card says under which licence.
    """
    comparison = compare(model)
    ranks = [p.rank for p in comparison.linears if p.rank is not None]
    ratio = comparison.param_ratio
    hub_id = base_model if is_hub_id(base_model) else None
    facts: dict[str, object] = {
        "factored linears": f"{len(ranks)}, ranks {_span(ranks)}",
        "param ratio of the factored linears": "-" if ratio is None else f"{ratio:.3f}",
        **(results or {}),
    }
    # The Hub knows four relations. Factors stand for weights in fewer numbers, as quantized ones do; training changes them.
    relation = None if hub_id is None else "finetune" if "training steps" in (results or {}) else "quantized"
    data = ModelCardData(
        base_model=hub_id,
        base_model_relation=relation,
        datasets=[name for name in datasets if is_hub_id(name) and "/" in name] or None,
        library_name="transformers",
        tags=["lowrank-ft", "low-rank", "compressed"],
        **_licence(base_card),
    )
    entry: Any = getattr(model.config, "quantization_config", None) or {}
    revision = entry.get("base_revision") if isinstance(entry, dict) else getattr(entry, "base_revision", None)
    if hub_id and revision:
        facts["revision of the base model"] = revision
    has_own_code = "AutoConfig" in (getattr(model.config, "auto_map", None) or {})
    card = ModelCard.from_template(
        data,
        template_path=str(_CARD),
        name=(hub_id or "model").split("/")[-1],
        base=f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else "a dense model",
        architecture=type(model).__name__,
        from_scratch=from_scratch,
        count=len(ranks),
        begin=_TABLE_BEGIN,
        end=_TABLE_END,
        table=main_table(comparison, evaluation),
        picture=picture,
        facts=_facts_table(facts),
        auto_class=_auto_class(model),
        generates=_auto_class(model) == _AUTO_CLASSES[0],
        repo=repo,
        has_own_code=has_own_code,
        command=_fenced(command) if command else None,
    )
    return card.content


def _licence(folder: Path | None) -> dict[str, Any]:
    """The fields on the licence in a folder's card; none where it has no card, or one that cannot be read."""
    if folder is None or not (folder / "README.md").is_file():
        return {}
    try:
        fields = metadata_load(folder / "README.md") or {}
    except (ValueError, OSError, YAMLError):
        return {}
    kept = {name: fields[name] for name in _LICENCE if isinstance(fields.get(name), str | list)}
    return kept if "license" in kept else {}


def dense_card(model: PreTrainedModel, results: Mapping[str, object], command: str) -> str:
    """The card of a dense model that was trained from scratch, as a baseline."""
    card = ModelCard.from_template(
        ModelCardData(library_name="transformers", tags=["lowrank-ft"]),
        template_path=str(_DENSE_CARD),
        architecture=type(model).__name__,
        auto_class=_auto_class(model),
        facts=_facts_table({"parameters": f"{model.num_parameters():,}", **results}),
        command=_fenced(command),
    )
    return card.content


def card_with_table(folder: Path, comparison: Comparison, evaluation: Results) -> str:
    """The text of a folder's card with its main table, and the results in its header, made anew; the rest stays as it is.

    Raises:
        CheckpointNotFoundError: there is no card.
        CheckpointError: the marks around the table are gone, or the header cannot be read.
    """
    path = folder / "README.md"
    if not path.is_file():
        raise CheckpointNotFoundError(f"{folder} has no README.md to update; leave --update-card out")
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(_TABLE_BEGIN)
    _, end, after = rest.partition(_TABLE_END)
    if not (begin and end):
        raise CheckpointError(
            f"{path} lacks the lines {_TABLE_BEGIN} and {_TABLE_END}; add them where the table should be"
        )
    try:
        card = ModelCard(
            f"{before}{begin}\n{main_table(comparison, evaluation)}\n{end}{after}", ignore_metadata_errors=True
        )
    except (ValueError, TypeError, YAMLError) as error:
        raise CheckpointError(f"the header of {path} cannot be read ({first_line(error)}); repair the YAML") from None
    found = eval_results(evaluation)
    if found:
        titles = [line[2:].strip() for line in card.text.splitlines() if line.startswith("# ")]
        header: Any = card.data
        header.model_name, header.eval_results = (titles or ["model"])[0], found
    return str(card)


def eval_results(evaluation: Results) -> list[EvalResult]:
    """What the Hub shows beside a model: perplexity and task scores, each with the dense model's after it."""
    text = str(evaluation.get("data") or "text")
    found = []
    for key, suffix in (("model", ""), ("baseline", ", dense model")):
        numbers = evaluation.get(key) or {}
        metrics: list[tuple[str, str, Any]] = [(text, "perplexity", numbers.get("perplexity"))]
        for name, score in task_scores(numbers).items():
            task, _, metric = name.rpartition(", ")
            metrics.append((task, metric, score))
        found += [
            EvalResult(
                task_type="text-generation", dataset_type=dataset, dataset_name=dataset, metric_type=metric,
                metric_name=f"{metric}{suffix}", metric_value=round(value, 4),
            )
            for dataset, metric, value in metrics
            if isinstance(value, int | float)
        ]  # fmt: skip
    return found


def _fenced(command: str) -> str:
    """Between marks that a command with such marks in its file names does not end."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", command))])
    return f"{fence}\n{command}\n{fence}"


def _facts_table(facts: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {cell(str(k))} | {cell(str(v))} |" for k, v in facts.items())])


def _auto_class(model: PreTrainedModel) -> str:
    return next((a for a in _AUTO_CLASSES if _loads(getattr(transformers, a), model)), "AutoModel")


def _loads(auto_class: Any, model: PreTrainedModel) -> bool:
    mapping = auto_class._model_mapping
    return type(model.config) in mapping and mapping[type(model.config)] is type(model)


def _span(ranks: list[int]) -> str:
    if not ranks:
        return "-"
    return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
