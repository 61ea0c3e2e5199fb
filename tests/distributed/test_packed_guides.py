"""Packed guides over two processes: FSDP2 shards their bytes and rounds none of them, DDP copies them."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def test_two_processes_compute_what_one_does(tmp_path):
    pytest.importorskip("bitsandbytes")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "tests.distributed.packed_guide_driver", str(tmp_path),
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        report = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert report["world"] == 2
        assert max(report["fsdp"], report["ddp"]) < 1e-5
        assert report["share"] == pytest.approx(0.5, abs=0.01)
        assert report["dropped"]
        assert report["left"] == 0
