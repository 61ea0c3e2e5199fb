"""Damage that used to end in a wrong result or in an accident; found by ``make reliability``."""

import json
import re
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from lowrank_ft.checkpoints.architecture import check_headers, skeleton
from lowrank_ft.checkpoints.atomic import check_output_dir
from lowrank_ft.checkpoints.from_training import load_adapter
from lowrank_ft.checkpoints.models import load_model
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.errors import CheckpointError, NonFiniteError, OutputError, TrainingStateError
from lowrank_ft.integrations.peft import LowRankConfig
from lowrank_ft.training.resume import STATE_FILE, read_state
from tests.conftest import tiny_gpt2, tiny_llama
from tests.reliability.materials import make_dense


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return make_dense(tmp_path_factory.mktemp("given") / "given")


@pytest.fixture
def dense(given, tmp_path):
    return shutil.copytree(given / "dense", tmp_path / "dense")


def change(path, **fields):
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "gone"}))


def spoil(path, name):
    tensors = load_file(path)
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("hidden_size", r"config\.json describes \S+ as \(\d+, 4096\), and the weights have it as \(\d+, 32\)"),
        ("num_hidden_layers", r"config\.json describes a model of .* is model\.layers\.2\."),
    ],
)
def test_a_config_that_lost_a_field_describes_another_model(dense, command, field, message):
    change(dense / "config.json", **{field: "gone"})
    done = command("plan", dense, "--param-ratio", "0.5")
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_report_looks_at_the_headers(dense, command, tmp_path):
    command("convert", dense, "--rank", "4", "--method", "svd", "--output-dir", tmp_path / "compact")
    whole = command("report", tmp_path / "compact", "--output", tmp_path / "a.html")
    assert whole.returncode == 0, whole.stderr
    weights = tmp_path / "compact" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = command("report", tmp_path / "compact", "--output", tmp_path / "b.html")
    assert (done.returncode, "model.safetensors is truncated or corrupt" in done.stderr) == (1, True)


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, tie_word_embeddings=True)
    )


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama, t5, lambda: tiny_llama(tie_word_embeddings=True)])
def test_whole_checkpoints_fit(tmp_path, make):
    make().save_pretrained(tmp_path)
    source = Source(str(tmp_path))
    check_headers(skeleton(source.load_config(), "x"), source.tensors(), "x")


def test_weights_that_are_no_numbers_are_named_with_their_file(dense, given, command, tmp_path):
    spoil(dense / "model.safetensors", "model.layers.0.mlp.up_proj.weight")
    text = given / "text.jsonl"
    for arguments in (
        ("eval", dense, "--data", text, "--block-size", "16"),
        ("convert", dense, "--rank", "4", "--method", "svd", "--output-dir", tmp_path / "out"),
    ):
        done = command(*arguments)
        assert done.returncode == 1
        assert f"error: {dense}: model.layers.0.mlp.up_proj.weight (48, 32) holds 1 NaN" in done.stderr
        assert done.stdout == ""


def test_an_overflow_of_good_weights_is_no_result(dense, given, command, tmp_path):
    model = load_model(Source(str(dense)))
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38)
        model.model.norm.weight.mul_(1e30)
    model.save_pretrained(dense)
    done = command("eval", dense, "--data", given / "text.jsonl", "--block-size", "16")
    assert (done.returncode, "though every weight is a number" in done.stderr) == (1, True)


@pytest.fixture
def adapter(dense, tmp_path):
    get_peft_model(load_model(Source(str(dense))), LowRankConfig(r=4)).save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(dense))
    return tmp_path / "adapter"


@pytest.mark.parametrize("fields", [{"rank_pattern": 3}, {"task_type": "0"}, {"r": 0}, {"layers_to_transform": "text"}])
def test_a_garbled_adapter_names_itself(adapter, fields):
    change(adapter / "adapter_config.json", **fields)
    with pytest.raises(CheckpointError, match=r"the adapter in .*adapter does not load: adapter_config\.json or"):
        load_adapter(adapter)


def test_an_adapter_with_a_part_missing_or_no_numbers(adapter):
    path = adapter / "adapter_model.safetensors"
    whole = load_file(path)
    name = next(n for n in whole if n.endswith("up_proj.lowrank_U"))
    save_file({n: t for n, t in whole.items() if n != name}, path)
    with pytest.raises(CheckpointError, match="missing adapter keys"):
        load_adapter(adapter)
    save_file(whole, path)
    spoil(path, name)
    with pytest.raises(NonFiniteError, match=rf"{adapter}: model\.layers\.0\.mlp\.up_proj\.U\.weight"):
        load_adapter(adapter)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="does not load"):
        load_adapter(adapter)


def test_code_of_a_base_model_that_only_the_adapter_names_is_not_run(adapter, dense, command, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.Mine"}
    change(dense / "config.json", model_type="mine", architectures=["Mine"], auto_map=own)
    (dense / "mine.py").write_text("raise SystemExit('this code has run')")
    export = ["export", adapter, "--output-dir", tmp_path / "out", "--trust-remote-code"]
    done = command(*export)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {dense}, which {adapter}/adapter_config.json names as its base model, needs its own Python code; if you "
        f"trust its author, name it yourself: --base-model {dense} --trust-remote-code\n"
    )
    with pytest.raises(SystemExit, match="this code has run"):
        load_adapter(adapter, True, str(dense))


def test_the_base_model_of_an_adapter_is_named_by_a_flag(adapter, dense, command, tmp_path):
    change(adapter / "adapter_config.json", base_model_name_or_path=None)
    done = command("export", adapter, "--output-dir", tmp_path / "out")
    assert "adapter_config.json names no base model; name it with --base-model" in done.stderr
    done = command("export", adapter, "--output-dir", tmp_path / "out", "--base-model", dense)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["base_model"] == str(dense)
    done = command("export", tmp_path / "out", "--output-dir", tmp_path / "again", "--base-model", dense)
    assert (
        f"error: --base-model applies to a PEFT adapter, which {tmp_path / 'out'} is not; leave it out" in done.stderr
    )


GOOD = {"step": 2, "guided": True, "best_loss": None, "best_step": None, "must_match": {}, "scaler": {}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": "2"}, "step is a text"),
        ({"step": True}, "step is true"),
        ({"step": 0}, "step is 0, and the folder is step-00000002"),
        ({"scaler": None}, "scaler is null"),
        ({"guided": "gone"}, "lacks guided"),
        ({"more": 1}, "holds more, which this release does not know"),
    ],
)
def test_a_garbled_state_of_a_run(tmp_path, fields, message):
    folder = tmp_path / "step-00000002"
    folder.mkdir()
    (folder / STATE_FILE).write_text(json.dumps(GOOD))
    assert read_state(folder).step == 2
    change(folder / STATE_FILE, **fields)
    with pytest.raises(TrainingStateError, match=message) as caught:
        read_state(folder)
    assert str(folder / STATE_FILE) in str(caught.value)


def test_a_state_that_is_nested_without_end(tmp_path):
    (tmp_path / STATE_FILE).write_text('{"step": ' + "[" * 9000 + "]" * 9000 + "}")
    with pytest.raises(TrainingStateError, match="nested too deep"):
        read_state(tmp_path)


def test_names_that_cannot_be(dense, command, tmp_path):
    for long in ("n" * 300, "/".join(["d" * 200] * 30)):
        done = command("convert", dense, "--rank", "4", "--method", "svd", "--output-dir", long)
        assert (done.returncode, "(File name too long); name another" in done.stderr) == (1, True)
        assert command("plan", long, "--rank", "4").returncode == 1
    odd = b"\xff".decode(errors="surrogateescape")
    for arguments in (("convert", dense, "--output-dir", odd), ("plan", odd)):
        done = command(*arguments, "--rank", "4")
        assert (done.returncode, "is not UTF-8, which safetensors needs" in done.stderr) == (1, True)
    with pytest.raises(OutputError, match="nothing can be called"):
        check_output_dir(tmp_path / ("n" * 300))


def test_a_broken_tokenizer_that_comes_along_is_told(dense, command, tmp_path):
    (dense / "tokenizer.json").write_text("[1]")
    with pytest.warns(UserWarning, match=f"the tokenizer that came along from {dense} does not load"):
        done = command("convert", dense, "--rank", "4", "--method", "svd", "--output-dir", tmp_path / "out")
    assert done.returncode == 0
