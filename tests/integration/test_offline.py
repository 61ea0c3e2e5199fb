"""A model in the Hub's local cache is used where the Hub cannot be reached, as transformers does."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import DEMO_MODEL

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OFFLINE = {"HF_HUB_OFFLINE": "1"}
UNREACHABLE = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_ETAG_TIMEOUT": "1"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache as the Hub's client lays it out: a branch, a commit, and its files as links to blobs."""
    repository = tmp_path / "cache" / "models--me--tiny"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(DEMO_MODEL.iterdir())):
        if file.is_file():
            shutil.copy(file, repository / "blobs" / f"{number:040x}")
            os.symlink(f"../../blobs/{number:040x}", snapshot / file.name)
    return tmp_path / "cache"


def commands(python, cache: Path, network: dict[str, str], *lines: str):
    """Run several commands in one fresh process, which reads its Hub settings as it starts."""
    script = "import sys; from lowrank_ft_cli.main import main; print([main(a.split()) for a in sys.argv[1:]])"
    return python("-c", script, *lines, **network, HF_HUB_CACHE=str(cache))


@pytest.mark.parametrize("network", [OFFLINE, UNREACHABLE], ids=["offline", "unreachable"])
def test_a_cached_model_needs_no_hub(python, cache, tmp_path, network):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 60)
    done = commands(
        python, cache, network,
        "plan me/tiny --param-ratio 0.6",
        "convert me/tiny --rank 4 --method svd --output-dir out",
        "eval me/tiny --data text.txt --block-size 64",
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[0, 0, 0]", done.stderr
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (entry["base_model"], entry["base_revision"]) == ("me/tiny", COMMIT)
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())


def test_what_is_not_in_the_cache_is_said(python, cache):
    next(cache.glob("*/snapshots/*/model.safetensors")).unlink()
    done = commands(python, cache, OFFLINE, "plan me/other --rank 4", "plan me/tiny --rank 4")
    assert done.stdout.splitlines()[-1] == "[1, 1]"
    assert "me/other is no folder here, and the Hub cannot be reached" in done.stderr
    assert "me/tiny is not whole in the Hub's local cache" in done.stderr
    assert "Traceback" not in done.stderr
