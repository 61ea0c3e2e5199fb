"""vLLM's other way to run a model, transformers' code inside vLLM (``--model-impl transformers``)."""

from typing import Any

import pytest

from tests.vllm.models import prompts
from tests.vllm.test_tokens import NEW, by_transformers, farthest


def job(folders, name: str, **engine: Any) -> dict[str, Any]:
    return {"name": name, "folder": str(folders[name]), "prompts": prompts(name), "new_tokens": NEW, "engine": engine}


@pytest.mark.parametrize("implementation", ["auto", "transformers"])
def test_without_the_plugin_vllm_refuses(implementation, folders, serve, record):
    """It does not serve random weights: an unknown method is an error."""
    served = serve([job(folders, "mixed", model_impl=implementation)], VLLM_PLUGINS="lora_filesystem_resolver")
    error = served["mixed"].get("error", "it was served")
    told = next((line.strip() for line in error.splitlines() if "Unknown quantization method: lowrank" in line), error)
    record.setdefault("without the plugin", {})[implementation] = told.partition(". Must be")[0]
    assert "Unknown quantization method: lowrank" in error


def test_with_the_plugin_it_serves_the_same_tokens(folders, serve, record):
    served = serve([job(folders, name, model_impl="transformers") for name in ("mixed", "bias-factors")])
    for name, got in served.items():
        assert "error" not in got, got["error"]
        want = by_transformers(folders[name], prompts(name), NEW)
        record.setdefault("model_impl transformers", {})[name] = {"equal": got["tokens"] == want["tokens"]}
        assert got["tokens"] == want["tokens"]
        assert farthest(got, want) < 1e-4
