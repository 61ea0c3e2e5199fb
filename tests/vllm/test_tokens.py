"""vLLM's own model code, with our linears, says what transformers says: float32, greedy, token by token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.vllm.models import MODELS, SPLIT, prompts

NEW = 20


def by_transformers(folder: Path, asked: list[list[int]], new_tokens: int) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # a token like any other, as with vLLM's ignore_eos
    tokens, scores = [], []
    for prompt in asked:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            answer = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
            )
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        tokens.append(answer[0, len(prompt) :].tolist())
        scores.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return {"tokens": tokens, "logprobs": scores}


def farthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    pairs = zip(one["logprobs"], other["logprobs"], strict=True)
    return max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True))


@pytest.fixture(scope="session")
def expected(folders) -> dict[str, Any]:
    return {name: by_transformers(folder, prompts(name), NEW) for name, folder in folders.items()}


def jobs(folders: dict[str, Path], names: Any, **engine: Any) -> list[dict[str, Any]]:
    return [
        {"name": n, "folder": str(folders[n]), "prompts": prompts(n), "new_tokens": NEW, "engine": engine}
        for n in names
    ]


@pytest.fixture(scope="session")
def whole(folders, serve) -> dict[str, Any]:
    return serve(jobs(folders, MODELS))


@pytest.fixture(scope="session")
def split(folders, serve) -> dict[str, Any]:
    return serve(jobs(folders, SPLIT, tensor_parallel_size=2, distributed_executor_backend="mp"))


def check(name: str, served: dict[str, Any], expected: dict[str, Any], record: dict[str, Any], processes: int) -> None:
    got, want = served[name], expected[name]
    assert "error" not in got, got["error"]
    assert len({t for answer in want["tokens"] for t in answer}) > 4, "an answer of few tokens proves little"
    distance = farthest(got, want)
    record.setdefault("tokens", {})[f"{name}, {processes}"] = {
        "model": MODELS[name][0],
        "form": MODELS[name][1],
        "processes": processes,
        "equal": got["tokens"] == want["tokens"],
        "logprobs differ by": float(f"{distance:.1e}"),
    }
    assert got["tokens"] == want["tokens"]
    assert distance < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_same_tokens_as_transformers(name, whole, expected, record):
    check(name, whole, expected, record, 1)


@pytest.mark.parametrize("name", SPLIT)
def test_same_tokens_over_two_processes(name, split, expected, record):
    check(name, split, expected, record, 2)
