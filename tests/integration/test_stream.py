"""``lowrank-ft convert --stream``: the same result with one block in memory, also after it was broken off."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from lowrank_ft.checkpoints.on_disk import open_on_disk
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.checkpoints.unfinished import Unfinished, open_unfinished
from lowrank_ft.nn import LowRankLinear
from tests.conftest import DEMO_MODEL, tiny_gpt2
from tests.integration.test_cli import assert_one_line_error

SVD = ["--method", "svd", "--param-ratio", "0.6"]


@pytest.fixture
def fit(prose_file):
    """Flags of a short calibrated conversion, and what a conversion in memory has to leave out to be the same."""
    return ["--param-ratio", "0.6", "--calibration-data", prose_file, "--calibration-tokens", "4096"], [
        "--own-share", "0", "--distill-epochs", "0",
    ]  # fmt: skip


def weights(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_weights(one, other):
    found, wanted = weights(one), weights(other)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def break_off(self, *arguments, add=Unfinished.add):
    """In the place of :meth:`Unfinished.add`: somebody interrupts after two blocks."""
    add(self, *arguments)
    if len(self.parts) == 2:
        raise KeyboardInterrupt


def test_weights_that_are_replaced_die_at_once(tmp_path):
    """In circles of Python objects they would stay for many more blocks."""
    disk = open_on_disk(Source(str(DEMO_MODEL)), torch.float32, "cpu", tmp_path)
    block = disk.load("model.layers.0")
    dense = weakref.ref(block.mlp.up_proj)
    gc.disable()
    try:
        block.mlp.up_proj = LowRankLinear.like(block.mlp.up_proj, 4)
        assert dense() is None
    finally:
        gc.enable()


def without_times(folder):
    record = json.loads((folder / "conversion.json").read_text())
    return {k: v for k, v in record.items() if k not in ("seconds", "command")}


@pytest.mark.parametrize("build", [None, tiny_gpt2], ids=["llama", "conv1d"])
def test_plain_svd(command, tmp_path, build):
    source = DEMO_MODEL
    if build is not None:
        source = tmp_path / "source"
        build().save_pretrained(source)
    for name, flags in (("whole", []), ("streamed", ["--stream"])):
        assert command("convert", source, *SVD, *flags, "--output-dir", tmp_path / name).returncode == 0
    assert_same_weights(tmp_path / "streamed", tmp_path / "whole")
    assert without_times(tmp_path / "streamed") == without_times(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_nothing_is_read_to_find_out_where_weights_are(command, tmp_path, monkeypatch):
    """transformers reads all of them on its way to a model on disk; that is left for those that it has to rename."""
    monkeypatch.setattr("lowrank_ft.checkpoints.on_disk.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    assert command("convert", DEMO_MODEL, *SVD, "--stream", "--output-dir", tmp_path / "out").returncode == 0


@pytest.mark.parametrize("method", ["activation", "anchored"])
def test_the_calibrated_factors_are_those_of_a_conversion_in_memory(command, tmp_path, fit, method):
    flags, whole = fit
    stores = tmp_path / "stores"
    stores.mkdir()
    flags = [*flags, "--method", method, "--dtype", "float32"]
    flags += ["--refine-epochs", "1"] if method == "anchored" else []
    assert command("convert", DEMO_MODEL, *flags, *whole, "--output-dir", tmp_path / "whole").returncode == 0
    done = command(
        "convert", DEMO_MODEL, *flags, "--stream", "--activations-dir", stores, "--output-dir", tmp_path / "streamed"
    )
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "streamed", tmp_path / "whole")
    assert without_times(tmp_path / "streamed") == without_times(tmp_path / "whole")
    assert list(stores.iterdir()) == []


def test_it_loads_in_a_fresh_process(cli, python, tmp_path, fit):
    cli("convert", DEMO_MODEL, *fit[0], "--stream", "--output-dir", tmp_path / "out")
    code = (
        "import lowrank_ft, torch; from transformers import AutoModelForCausalLM; "
        "m = AutoModelForCausalLM.from_pretrained('out'); print(m.dtype, m(torch.arange(9)[None]).logits.isfinite().all())"
    )
    assert python("-c", code).stdout.split() == ["torch.bfloat16", "tensor(True)"]
    report = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert report["metadata"]["total_size"] > 0


@pytest.mark.parametrize("flags", [["--method", "svd"], ["--method", "activation"]], ids=["svd", "activation"])
def test_experts(command, tmp_path, fit, flags, monkeypatch):
    """They are factored one by one, and stored as stacks, also by a conversion that was broken off."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=2048, num_key_value_heads=2, num_local_experts=4, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, tmp_path / "source")
    common, whole = ([*flags, "--param-ratio", "0.7"], []) if "svd" in flags else ([*flags, *fit[0]], fit[1])
    done = command("convert", tmp_path / "source", *common, *whole, "--output-dir", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "add", break_off)
        command("convert", tmp_path / "source", *common, "--stream", "--output-dir", tmp_path / "out")
    done = command("convert", tmp_path / "source", *common, "--stream", "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "out", tmp_path / "whole")
    assert without_times(tmp_path / "out") == without_times(tmp_path / "whole")
    assert any(".experts.factors." in name for name in weights(tmp_path / "out"))


@pytest.mark.parametrize("method", ["svd", "anchored"])
def test_it_goes_on_where_it_was_broken_off(command, tmp_path, fit, method, monkeypatch):
    flags = [*(SVD if method == "svd" else [*fit[0], "--method", "anchored", "--refine-epochs", "1"]), "--stream"]
    assert command("convert", DEMO_MODEL, *flags, "--output-dir", tmp_path / "whole").returncode == 0
    add = Unfinished.add
    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "add", break_off)
        done = command("convert", DEMO_MODEL, *flags, "--output-dir", tmp_path / "out")
    assert_one_line_error(done, "interrupted; 2 blocks are done and kept, and the same command goes on")
    assert not (tmp_path / "out").exists()
    blocks = []
    monkeypatch.setattr(Unfinished, "add", lambda self, *a: (blocks.append(a[0]), add(self, *a)))
    done = command("convert", DEMO_MODEL, *flags, "--output-dir", tmp_path / "out")
    assert "note: going on after 2 blocks that are done\n" in done.stderr
    assert blocks == [f"model.layers.{i}" for i in (2, 3, 4)]
    assert_same_weights(tmp_path / "out", tmp_path / "whole")
    assert without_times(tmp_path / "out") == without_times(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


def test_a_killed_process(cli, tmp_path, fit):
    flags = ["convert", str(DEMO_MODEL), *map(str, fit[0]), "--stream"]
    cli(*flags, "--output-dir", tmp_path / "whole")
    out = ["--output-dir", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-m", "lowrank_ft_cli.main", *flags, *out],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    part = tmp_path / ".out.unfinished" / "part-00001.safetensors"
    until = time.monotonic() + 300
    while not part.exists() and time.monotonic() < until:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert part.exists()
    assert not (tmp_path / "out").exists()
    cli(*flags, *out)
    assert_same_weights(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / ".out.unfinished").exists()


@pytest.fixture
def begun(command, tmp_path, monkeypatch):
    """A source, and an unfinished conversion of it."""
    source = tmp_path / "source"
    shutil.copytree(DEMO_MODEL, source)
    with monkeypatch.context() as patch:
        patch.setattr("lowrank_ft_cli.run_stream._run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        command("convert", source, *SVD, "--stream", "--output-dir", tmp_path / "out")
    assert (tmp_path / ".out.unfinished" / "state.json").is_file()
    return source


def test_other_weights_are_noticed(command, tmp_path, begun):
    model = AutoModelForCausalLM.from_pretrained(begun)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(begun)
    done = command("convert", begun, *SVD, "--stream", "--output-dir", tmp_path / "out")
    assert_one_line_error(done, "holds an unfinished conversion with another weights file model.safetensors (")
    assert not (tmp_path / "out").exists()


def test_other_options_are_noticed(command, tmp_path, begun):
    flags = ["--method", "svd", "--param-ratio", "0.5", "--stream", "--output-dir", tmp_path / "out"]
    assert_one_line_error(command("convert", begun, *flags), "holds an unfinished conversion with another size (")
    shutil.rmtree(tmp_path / ".out.unfinished")
    assert command("convert", begun, *flags).returncode == 0


def test_two_commands_at_one_output(command, tmp_path):
    with open_unfinished(tmp_path / "out"):
        done = command("convert", DEMO_MODEL, *SVD, "--stream", "--output-dir", tmp_path / "out")
    assert_one_line_error(done, "another command is converting to")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full(command, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lowrank_ft.checkpoints.unfinished.save_file", full)
        done = command("convert", DEMO_MODEL, *SVD, "--stream", "--output-dir", tmp_path / "out")
    assert_one_line_error(done, "Free some space, and the same command goes on")
    assert command("convert", DEMO_MODEL, *SVD, "--stream", "--output-dir", tmp_path / "out").returncode == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--param-ratio", "0.6"], "with --stream the model cannot write its own calibration text"),
        (["--param-ratio", "0.6", "--calibration-data", "self"], "give --calibration-data FILE, or --method svd"),
        (["--max-loss", "5%"], "--max-loss needs the whole model in memory, and --stream keeps one block there"),
        ([*SVD, "--distill-epochs", "1"], "--distill-epochs needs the whole model in memory"),
        ([*SVD, "--adapter"], "--adapter needs the whole model in memory"),
    ],
)
def test_what_needs_the_whole_model(command, tmp_path, flags, message):
    done = command("convert", DEMO_MODEL, *flags, "--stream", "--output-dir", tmp_path / "out")
    assert_one_line_error(done, message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            T5EncoderModel,
            "the blocks of this T5EncoderModel hand on more than hidden states (",
        ),
        (T5ForConditionalGeneration, "cannot be calibrated block by block (its blocks are 2 chains and not one)"),
    ],
)
def test_blocks_that_are_not_alone(command, tmp_path, prose_file, kind, message):
    """T5's first block makes the position bias of all others, and its decoder is a second chain."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=2048,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    kind(config).save_pretrained(tmp_path / "t5")
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "t5")
    flags = ["--param-ratio", "0.6", "--calibration-data", prose_file, "--calibration-tokens", "4096", "--stream"]
    done = command("convert", tmp_path / "t5", *flags, "--output-dir", tmp_path / "out")
    assert_one_line_error(done, message)
    shutil.rmtree(tmp_path / ".out.unfinished", ignore_errors=True)
    assert command("convert", tmp_path / "t5", *SVD, "--stream", "--output-dir", tmp_path / "out").returncode == 0


def test_a_plan_by_energy(command, tmp_path):
    flags = ["--method", "svd", "--energy", "0.8"]
    for name, more in (("whole", []), ("streamed", ["--stream"])):
        assert command("convert", DEMO_MODEL, *flags, *more, "--output-dir", tmp_path / name).returncode == 0
    assert_same_weights(tmp_path / "streamed", tmp_path / "whole")


def test_a_model_that_is_larger_than_memory(command, tmp_path, fit, monkeypatch):
    monkeypatch.setattr("lowrank_ft_cli.run_stream.free_bytes", lambda _: 2**20)
    done = command("convert", DEMO_MODEL, *fit[0], "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (
        "MB of memory to be converted, and 1.05 MB are free, so one block is read at a time (--stream)" in done.stderr
    )
    assert len(list((tmp_path / "out").glob("model-*"))) == 6
    done = command(
        "convert", DEMO_MODEL, "--rank", "8", "--output-dir", tmp_path / "self", "--calibration-tokens", "2048"
    )
    assert done.returncode == 0, done.stderr
    assert "warning: the model needs about" in done.stderr
    assert "with --stream the model cannot write its own calibration text" in done.stderr


def test_distillation_that_does_not_fit(command, tmp_path, fit, monkeypatch):
    monkeypatch.setattr("lowrank_ft_cli.calibration.free_bytes", lambda _: 2**20)
    done = command("convert", DEMO_MODEL, *fit[0], "--output-dir", tmp_path / "out")
    assert "note: distillation would need about" in done.stderr
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["distill_epochs"] == 0
    flags = ["--distill-epochs", "1", "--overwrite"]
    done = command("convert", DEMO_MODEL, *fit[0], *flags, "--output-dir", tmp_path / "out")
    assert "note: distillation" not in done.stderr
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["distill_epochs"] == 1


def test_a_truncated_shard_is_named(command, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, source)
    file = next(source.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    done = command("convert", source, *SVD, "--stream", "--output-dir", tmp_path / "out")
    assert_one_line_error(done, f"{file} is truncated or corrupt")
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_no_number_is_named(command, tmp_path, fit):
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    model.model.layers[2].input_layernorm.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, tmp_path / "source")
    done = command("convert", tmp_path / "source", *fit[0], "--stream", "--output-dir", tmp_path / "out")
    assert_one_line_error(done, "model.layers.2: input_layernorm.weight (128,) holds 1 NaN or infinite values")
