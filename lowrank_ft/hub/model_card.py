"""The README.md of an exported checkpoint."""

from collections.abc import Mapping
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from lowrank_ft.hub.source import is_hub_id
from lowrank_ft.nn import lowrank_layers
from lowrank_ft.plan import count_parameters

_PLUGIN = """Without the package, `{auto_class}.from_pretrained("{repo}", trust_remote_code=True)` runs the loader in
`lowrank_plugin.py`, which is part of this repository."""
_OWN_CODE = "The model has Python code of its own (`trust_remote_code=True`), so the package is needed to load it."

PLACEHOLDER = "path/or/hub-id"

_AUTO_CLASSES = (
    "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification", "AutoModelForQuestionAnswering", "AutoModelForImageClassification",
    "AutoModelForSpeechSeq2Seq",
)  # fmt: skip

_TEMPLATE = """---
{card_data}
---

# {title}

A low-rank version of {base}: every pretrained linear `W` of its blocks is replaced by two thin ones, `U V`, so the
checkpoint is smaller and does fewer multiplications per token. Made with `lowrank-ft`.

{table}

## Load it

```python
import lowrank_ft  # pip install lowrank-ft
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repo}")
```

{without_package} Other loaders stop with a size mismatch rather than give random
weights. For software that knows dense checkpoints only: `lowrank-ft merge {repo} --output-dir DIR`.
{command}"""


def model_card(
    model: PreTrainedModel,
    *,
    base_model: str | None = None,
    results: Mapping[str, object] | None = None,
    command: str | None = None,
    repo: str = PLACEHOLDER,
) -> str:
    """The card's text, with its YAML header."""
    layers = [layer for _, layer in lowrank_layers(model)]
    dense = sum(layer.in_features * layer.out_features for layer in layers)
    factored = sum(layer.rank * (layer.in_features + layer.out_features) for layer in layers)
    hub_id = base_model if is_hub_id(base_model) else None
    parameters = count_parameters(model)
    rows: dict[str, object] = {
        "parameters": f"{parameters:,}",
        "factored linears": f"{len(layers)}, ranks {_span([layer.rank for layer in layers])}",
        "param ratio of the factored linears": f"{factored / dense:.3f}" if dense else "-",
        **(results or {}),
    }
    data = ModelCardData(base_model=hub_id, library_name="transformers", tags=["lowrank-ft", "low-rank", "compressed"])
    auto_class = next((a for a in _AUTO_CLASSES if _loads(getattr(transformers, a), model)), "AutoModel")
    has_own_code = "AutoConfig" in (getattr(model.config, "auto_map", None) or {})
    without_package = _OWN_CODE if has_own_code else _PLUGIN
    text = _TEMPLATE.format(
        card_data=data.to_yaml(),
        title=f"{(hub_id or 'model').split('/')[-1]}, low-rank",
        base=f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else "a dense model",
        table="\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]),
        auto_class=auto_class,
        repo=repo,
        without_package=without_package.format(auto_class=auto_class, repo=repo),
        command=f"\n## How it was made\n\n```\n{command}\n```\n" if command else "",
    )
    return ModelCard(text, ignore_metadata_errors=False).content


def _loads(auto_class: Any, model: PreTrainedModel) -> bool:
    mapping = auto_class._model_mapping
    return type(model.config) in mapping and mapping[type(model.config)] is type(model)


def _span(ranks: list[int]) -> str:
    if not ranks:
        return "-"
    return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
