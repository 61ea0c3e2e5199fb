"""Files of strangers: each damage ends in one sentence that names the file and the field, and soon."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from lowrank_ft.checkpoints.architecture import skeleton
from lowrank_ft.checkpoints.files import INDEX_FILE, safetensors_files
from lowrank_ft.checkpoints.from_training import _adapter_scale, _dtype, load_adapter
from lowrank_ft.checkpoints.models import load_model
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.conversion.record import read_conversion
from lowrank_ft.errors import CheckpointError, CheckpointNotFoundError, LowRankError, PlanError
from lowrank_ft.factorization.plan import Plan, make_plan
from tests.conftest import DEMO_MODEL, tiny_llama


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


LAYERS = 10**9
COMPACT = {"quant_method": "lowrank", "format_version": 1, "ranks": {"model.layers.0.mlp.up_proj": 4}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"hidden_size": 10**12}, "hidden_size is 1e+12, and the largest tensor has"),
        ({"num_hidden_layers": LAYERS}, "num_hidden_layers is 1e+09, and the checkpoint has 21 tensors"),
        ({"num_hidden_layers": float(LAYERS)}, "num_hidden_layers is 1e+09, and the checkpoint has 21 tensors"),
        ({"text_config": {"num_hidden_layers": LAYERS}}, "text_config.num_hidden_layers is 1e+09"),
        ({"num_labels": 10**9}, "num_labels is 1e+09"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be 1 or more"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]"),
        ({"rope_parameters": {"rope_type": 3}}, "rope_parameters is {'rope_type': 3"),
        ({"hidden_act": "nope"}, "hidden_act is 'nope'"),
        ({"layer_types": ["x"]}, "layer_types is ['x']"),
        ({"model_type": 3}, "model_type is a whole number; it must be a text"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is a text; it must be a list"),
        ({"architectures": ["logging"]}, "config.json describes no model"),
        ({"auto_map": [1]}, "auto_map is a list; it must be an object"),
        ({"id2label": ["x"]}, "id2label is a list; it must be an object"),
        ({"quantization_config": [1]}, "quantization_config is a list; it must be an object"),
        ({"quantization_config": {**COMPACT, "ranks": [1]}}, "quantization_config.ranks is a list"),
        ({"quantization_config": {**COMPACT, "ranks": {"a": "4"}}}, "quantization_config.ranks['a'] is a text"),
        ({"quantization_config": {**COMPACT, "format_version": "1"}}, "quantization_config.format_version is a text"),
    ],
)
def test_a_damaged_field_of_a_config_is_named(copy, fields, message):
    change_config(copy, **fields)
    with pytest.raises(CheckpointError) as caught:
        source = Source(str(copy))
        skeleton(source.load_config(), str(copy))
    assert message in str(caught.value)
    assert "config.json" in str(caught.value)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


NESTED = 100_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "holds a list; it must be an object"),
        (b"null", "holds null; it must be an object"),
        (b'{"model_type": "llama", "hidden_size": NaN}', "it holds NaN"),
        (b'{"a": ' + b"[" * NESTED + b"]" * NESTED + b"}", "is nested too deep"),
        (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "is nested too deep"),
        (b"\xff\xfe{", "is not UTF-8 text (byte 0)"),
        (b"", "is no valid JSON"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", INDEX_FILE, "plan.json"])
def test_what_is_no_object_is_refused_wherever_one_is_read(copy, name, content, message):
    read = {
        "config.json": lambda: Source(str(copy)).load_config(),
        INDEX_FILE: lambda: Source(str(copy)).tensors(),
        "plan.json": lambda: Plan.load(copy / "plan.json"),
    }[name]
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    (copy / name).write_bytes(content)
    with pytest.raises((CheckpointError, PlanError)) as caught:
        read()
    assert message in str(caught.value)
    assert str(copy / name) in str(caught.value)


@pytest.mark.parametrize(
    "file",
    [3, None, ["x"], "", ".", "../other/model.safetensors", "/tmp/model.safetensors", "a\\b.safetensors", "x.bin"],
)
def test_an_index_names_files_beside_it_only(copy, file):
    (copy.parent / "other").mkdir()
    (copy / "model.safetensors").rename(copy.parent / "other" / "model.safetensors")
    (copy / INDEX_FILE).write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    with pytest.raises(CheckpointError, match="must be a .safetensors file in the same folder"):
        safetensors_files(copy)


def test_the_files_that_are_read_are_those_that_transformers_loads(whole, copy):
    """It takes the single file where there are an index and shards, too, as of an earlier save by another tool."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(copy.parent / "shards", max_shard_size="20KB")
    for path in (copy.parent / "shards").glob("model*"):
        path.rename(copy / path.name)
    assert safetensors_files(copy) == [copy / "model.safetensors"]
    loaded, single = LlamaForCausalLM.from_pretrained(copy), LlamaForCausalLM.from_pretrained(whole)
    assert torch.equal(loaded.lm_head.weight, single.lm_head.weight)


@pytest.mark.parametrize("table", [None, [], {}, "x"])
def test_an_index_without_a_table(copy, table):
    (copy / "model.safetensors").unlink()
    (copy / INDEX_FILE).write_text(json.dumps({"weight_map": table}))
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map is"):
        safetensors_files(copy)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "nope"}, "hidden_act is 'nope'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": [1]}}, "rope_parameters is {"),
        ({"num_key_value_heads": -1}, "num_key_value_heads is -1"),
        ({"quantization_config": {**COMPACT, "ranks": {"a": 10**30}}}, "quantization_config.ranks['a'] is 1e+30"),
    ],
)
def test_loading_names_the_field_that_planning_would(copy, fields, message):
    change_config(copy, **fields)
    with pytest.raises(CheckpointError) as caught:
        load_model(Source(str(copy)))
    assert message in str(caught.value)
    assert "config.json" in str(caught.value)


def test_a_tokenizer_beside_a_damaged_config(copy):
    change_config(copy, model_type={})
    with pytest.raises(CheckpointError, match=r"config\.json: model_type is an object; it must be a text"):
        Source(str(copy)).load_tokenizer()


def test_a_tokenizer_over_which_its_library_panics(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["model"]["continuing_subword_prefix"] = "32"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="has no tokenizer that loads"):
        Source(str(tmp_path)).load_tokenizer()


@pytest.mark.parametrize(
    ("read", "name", "content", "message"),
    [
        (_dtype, "run.json", '{"export_dtype": "load"}', "run.json: export_dtype is 'load'; it must be a dtype"),
        (_dtype, "run.json", "[]", "run.json holds a list; it must be an object"),
        (_adapter_scale, "trainer_state.json", '{"must_match": null}', "trainer_state.json: must_match is null"),
        (
            _adapter_scale,
            "trainer_state.json",
            '{"must_match": {"trainable": "lora", "lora_r": 0}}',
            "lora_r 0; both must",
        ),
        (load_adapter, "adapter_config.json", "[1]", "adapter_config.json holds a list; it must be an object"),
        (
            load_adapter,
            "adapter_config.json",
            '{"peft_type": "LOWRANK", "base_model_name_or_path": 3}',
            "names no base model",
        ),
    ],
)
def test_files_of_training_name_themselves(tmp_path, read, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises((CheckpointError, CheckpointNotFoundError)) as caught:
        read(tmp_path / name if read is _dtype else tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_truncated_header_and_a_shape_that_does_not_fit(copy):
    file = copy / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"][:5].clone()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="does not load"):
        load_model(Source(str(copy)))
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or corrupt"):
        Source(str(copy)).tensors()


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("linears",), {}, "linears, which is an object"),
        (("linears", 0), [], "linears[0], which is a list"),
        (("linears", 0, "name"), None, "linears[0].name, which is null"),
        (("linears", 1, "shape"), [3], "linears[1].shape, which is a list"),
        (("linears", 1, "shape"), [3, "4"], "linears[1].shape[1], which is a text"),
        (("linears", 0, "rank"), True, "a rank there is a whole number, or null for dense"),
        (("linears", 0, "rank"), 10**6, "exceeds min(out_features, in_features)"),
        (("model_parameters",), 1.5, "model_parameters, which is a number"),
        (("rank_pattern",), [1], "rank_pattern, which is a list"),
        (("plan_version",), 9, "plan_version is 9"),
    ],
)
def test_a_garbled_plan_names_the_file_and_the_entry(tmp_path, where, value, message):
    path = tmp_path / "plan.json"
    plan = json.loads(json.dumps(make_plan(tiny_llama(), rank=4).to_dict()))
    entry = plan
    for key in where[:-1]:
        entry = entry[key]
    entry[where[-1]] = value
    path.write_text(json.dumps(plan))
    with pytest.raises(LowRankError) as caught:
        Plan.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("linears", [1]), ("blocks", 3), ("blocks", [3]), ("calibration", 5), ("plan", [1]),
     ("linears", {"a": {"spectrum": [1], "spectrum_index": [float("inf")]}})],
)  # fmt: skip
def test_a_garbled_record_of_a_conversion_names_the_entry(tmp_path, name, value):
    (tmp_path / "conversion.json").write_text(json.dumps({"format_version": 1, name: value}))
    entry = "a" if name == "linears" and isinstance(value, dict) else name
    with pytest.raises(CheckpointError, match=rf"conversion\.json is incomplete or damaged .*in {entry}, "):
        read_conversion(tmp_path)
