"""A real chat model: ``LOWRANK_FT_SMOLLM2_COMPACT`` is the folder of SmolLM2-135M-Instruct after ``lowrank-ft convert``."""

import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.vllm.test_tokens import by_transformers, farthest

QUESTIONS = ["What is the capital of France?", "Write a short poem about the sea.", "Explain what a prime number is."]
NEW = 32


def test_same_tokens_as_transformers(serve, record):
    path = os.environ.get("LOWRANK_FT_SMOLLM2_COMPACT")
    if not path:
        pytest.skip("LOWRANK_FT_SMOLLM2_COMPACT names no folder; make vllm-suite COMPACT=FOLDER sets it")
    folder = Path(path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)["input_ids"]
        for q in QUESTIONS
    ]
    job = {"name": "smollm2", "folder": str(folder), "prompts": asked, "new_tokens": NEW}
    got, want = serve([job])["smollm2"], by_transformers(folder, asked, NEW)
    assert "error" not in got, got["error"]
    distance = farthest(got, want)
    record.setdefault("tokens", {})["smollm2, 1"] = {
        "model": "SmolLM2-135M-Instruct at 0.8, 3 key-value heads of 9",
        "form": "pivoted",
        "processes": 1,
        "equal": got["tokens"] == want["tokens"],
        "logprobs differ by": float(f"{distance:.1e}"),
    }
    assert got["tokens"] == want["tokens"]
    assert distance < 1e-3
