"""The OpenAI server with a compact checkpoint: a chat is answered, and requests of several lengths at once as alone.

With ``LOWRANK_FT_SMOLLM2_COMPACT``, a folder of SmolLM2 converted, the chat is with that; else with the trained tiny Llama.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.conftest import ROOT
from tests.vllm.test_tokens import by_transformers

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
TEXTS = ["def", "import os\nimport sys\n\n\ndef main():\n    ", "class Node:\n", "for i in range(10):\n    print("]
NEW = 16


@pytest.fixture(scope="session")
def model(folders) -> Path:
    return Path(os.environ.get("LOWRANK_FT_SMOLLM2_COMPACT") or folders["trained"])


@pytest.fixture(scope="session")
def server(model, tmp_path_factory) -> Iterator[str]:
    """The address of a server, which ends with the tests."""
    where = tmp_path_factory.mktemp("server")
    (where / "template.jinja").write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "compact", "--dtype", "float32", "--max-model-len", "256"]
    command += ["--enforce-eager", "--max-num-seqs", "4"]
    if not (model / "chat_template.jinja").exists():
        command += ["--chat-template", str(where / "template.jinja")]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_WORKER_MULTIPROCESSING_METHOD": "fork",
    }  # fmt: skip
    log = where / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1800):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=120)


def ask(address: str, path: str, **content: Any) -> dict[str, Any]:
    body = json.dumps({"model": "compact", "temperature": 0, "max_tokens": NEW, **content}).encode()
    request = urllib.request.Request(f"{address}/v1/{path}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=900) as answer:
        return json.loads(answer.read())


def test_a_chat_is_answered_as_by_transformers(server, model, record):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = ask(server, "chat/completions", messages=messages)
    said, finish = answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = None if tokenizer.chat_template else TEMPLATE
    ids = tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True)["input_ids"]
    (tokens,) = by_transformers(model, [ids], NEW)["tokens"]
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    record["chat"] = {"asked": messages[0]["content"], "answered": said}
    assert finish in ("length", "stop")
    assert said.strip() == tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_requests_at_once_are_answered_as_alone(server, model, record):
    """Continuous batching: prompts of several lengths, for answers of several lengths, share the steps."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = [(tokenizer(text)["input_ids"], NEW - 3 * i) for i, text in enumerate(TEXTS)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(
            pool.map(lambda a: ask(server, "completions", prompt=a[0], max_tokens=a[1], ignore_eos=True), asked)
        )
    for answer, (ids, length) in zip(answers, asked, strict=True):
        (tokens,) = by_transformers(model, [ids], length)["tokens"]
        assert answer["usage"]["completion_tokens"] == length
        assert answer["choices"][0]["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
    record["at once"] = len(asked)
