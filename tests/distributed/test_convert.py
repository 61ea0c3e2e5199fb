"""``lowrank-ft convert`` in two processes: the result of one, proof that there were two, and what happens when one dies."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import DEMO_MODEL, ROOT
from tests.distributed.convert_driver import converted

TWO = ["--", "--num_processes", "2"]


@pytest.fixture
def flags(prose_file):
    return [
        "--param-ratio", "0.6", "--calibration-data", prose_file, "--calibration-tokens", "6144", "--own-share", "0",
        "--calibration-block-size", "128", "--dtype", "float32", "--method", "anchored",
    ]  # fmt: skip


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(128)[None] % 500).logits


def record_of(folder):
    return json.loads((folder / "conversion.json").read_text())


def assert_same_conversion(two, one, tolerance):
    found, wanted = logits(two), logits(one)
    assert ((found - wanted).norm() / wanted.norm()).item() < tolerance
    record, expected = record_of(two), record_of(one)
    assert (record["processes"], expected["processes"]) == (2, 1)
    for key in ("plan", "calibration", "method", "allocation"):
        assert record[key] == expected[key], key
    assert list(record["linears"]) == list(expected["linears"])
    for name, entry in expected["linears"].items():
        assert record["linears"][name]["output_error"] == pytest.approx(entry["output_error"], rel=1e-3), name
    for block, known in zip(record["blocks"], expected["blocks"], strict=True):
        assert block["error_after"] == pytest.approx(known["error_after"], rel=1e-3)


@pytest.mark.parametrize(
    ("how", "tolerance"),
    [
        # AdamW's first steps turn rounding errors of gradients near zero into signs.
        (["--refine-epochs", "1", "--distill-epochs", "0.5"], 1e-4),
        (["--refine-epochs", "0", "--stream"], 1e-5),
    ],
    ids=["in memory, trained", "by block"],
)
def test_two_processes_give_the_result_of_one(cli, tmp_path, flags, how, tolerance):
    cli("convert", DEMO_MODEL, *flags, *how, "--output-dir", tmp_path / "one")
    done = cli("convert", DEMO_MODEL, *flags, *how, "--output-dir", tmp_path / "two", *TWO)
    assert done.stdout == f"{tmp_path / 'two'}\n"
    assert done.stderr.count("param ratio") == 1  # one process speaks
    assert_same_conversion(tmp_path / "two", tmp_path / "one", tolerance)


def test_experts_that_one_process_does_not_see(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    search_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [*command, "-m", "tests.distributed.convert_driver", tmp_path / "out.safetensors"], check=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path},
    )  # fmt: skip
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["processes"] == "2"
    found = load_file(tmp_path / "out.safetensors")["logits"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experts that no token reached
        wanted = converted()
    assert ((found - wanted).norm() / wanted.norm()).item() < 1e-4


def children_of(process):
    """The converting processes that a launcher started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        ours = f"TEST_RUN={process}".encode() in environment
        rank = next((e.removeprefix(b"RANK=").decode() for e in environment if e.startswith(b"RANK=")), None)
        if ours and rank is not None and b"lowrank_ft_cli.main" in command:
            found[rank] = int(folder.name)
    return found


def begun(tmp_path, command):
    """Two processes that have converted a block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TEST_RUN": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "lowrank_ft_cli.main", *command, *TWO],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    part = tmp_path / ".out.unfinished" / "part-00001.safetensors"
    until = time.monotonic() + 300
    while not part.exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.002)
    return process


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="finds the processes in /proc")


@needs_proc
def test_one_process_dies_and_the_next_run_goes_on(cli, tmp_path, flags):
    flags = ["convert", str(DEMO_MODEL), *map(str, flags), "--stream", "--refine-epochs", "1"]
    cli(*flags, "--output-dir", tmp_path / "whole")
    out = ["--output-dir", str(tmp_path / "out")]
    process = begun(tmp_path, [*flags, *out])
    os.kill(children_of(tmp_path)["1"], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: the conversion was killed, probably because memory ran out; start fewer processes" in errors
    assert not children_of(tmp_path)  # nobody is left waiting
    assert not (tmp_path / "out").exists()
    done = cli(*flags, *out)  # and one process is enough for it
    assert "note: going on after " in done.stderr
    assert ((logits(tmp_path / "out") - logits(tmp_path / "whole")).norm() / logits(tmp_path / "whole").norm()) < 1e-4


@needs_proc
def test_stopping_the_command_stops_its_processes(tmp_path, flags):
    """What Slurm, a container or ``timeout`` sends reaches the launcher alone."""
    command = ["convert", str(DEMO_MODEL), *map(str, flags), "--stream", "--refine-epochs", "50"]
    process = begun(tmp_path, [*command, "--output-dir", str(tmp_path / "out")])
    assert len(children_of(tmp_path)) == 2
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: interrupted; the same command goes on if it had --stream" in errors
    assert not children_of(tmp_path)
