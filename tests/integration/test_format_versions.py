"""Checkpoints of every version of the format: read, written, made into each other, and refused by older code."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lowrank_ft
from lowrank_ft.nn import lowrank_layers
from tests.conftest import tiny_gpt2, tiny_llama

STORED = Path(__file__).parent / "checkpoints"


def logits(folder, ids):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


@pytest.mark.parametrize("version", [1, 2])
def test_checkpoints_that_earlier_releases_wrote_are_read(version):
    folder = STORED / f"version-{version}"
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format_version"] == version
    wanted = torch.tensor(json.loads((STORED / "logits.json").read_text()))
    torch.testing.assert_close(logits(folder, torch.arange(8)[None])[0, -1], wanted, atol=2e-6, rtol=1e-4)
    size = sum(
        t.numel() for n, t in load_file(folder / "model.safetensors").items() if n.endswith(("U.weight", "V.weight"))
    )
    shapes = [(24, 16), (24, 16), (16, 24), (16, 16), (16, 16)]
    ranks = json.loads((folder / "config.json").read_text())["quantization_config"]["ranks"]
    shapes += [(8, 16)] * (len(ranks) - len(shapes))
    assert size == sum(6 * (a + b - (6 if version == 2 else 0)) for a, b in shapes)


def test_code_of_version_1_refuses_version_2_in_one_sentence(python, tmp_path):
    """The loader that version 1 shipped inside its checkpoints is that of the older release."""
    folder = shutil.copytree(STORED / "version-2", tmp_path / "new")
    shutil.copy(STORED / "version-1" / "lowrank_plugin.py", folder)
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    done = python("-c", code, check=False)
    assert done.returncode != 0
    assert "has lowrank format version 2, and this code reads up to 1; run pip install --upgrade" in done.stderr


@pytest.mark.parametrize("version", [1, 2])
def test_the_shipped_loader_reads_both_without_the_package(python, tmp_path, version):
    lowrank_ft.save_compact(AutoModelForCausalLM.from_pretrained(STORED / "version-1"), tmp_path / "out")
    plugin = tmp_path / "out" / "lowrank_plugin.py"
    folder = shutil.copytree(STORED / f"version-{version}", tmp_path / "in")
    shutil.copy(plugin, folder)
    done = python(
        "-c",
        "import sys; sys.modules['lowrank_ft'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM as A\n"
        f"m = A.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "print([round(x, 5) for x in m(torch.arange(8)[None]).logits[0, -1].tolist()])",
    )
    found = torch.tensor(json.loads(done.stdout.strip().splitlines()[-1]))
    wanted = torch.tensor(json.loads((STORED / "logits.json").read_text()))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_one_form_becomes_the_other_without_loss(make, command, tmp_path, ids):
    model = make()
    lowrank_ft.convert(model, rank=8)
    lowrank_ft.save_compact(model, tmp_path / "v1", form="factors", base_model="me/base")
    done = command("export", tmp_path / "v1", "--output-dir", tmp_path / "v2")
    assert done.returncode == 0, done.stderr
    assert "weights   " in done.stderr
    assert "%)" in done.stderr
    done = command("export", tmp_path / "v2", "--form", "factors", "--output-dir", tmp_path / "v1-again")
    assert done.returncode == 0, done.stderr
    configs = {n: json.loads((tmp_path / n / "config.json").read_text()) for n in ("v1", "v2", "v1-again")}
    entries = {n: c["quantization_config"] for n, c in configs.items()}
    assert [e["format_version"] for e in entries.values()] == [1, 2, 1]
    assert {e["base_model"] for e in entries.values()} == {"me/base"}
    wanted = logits(tmp_path / "v1", ids)
    for name in ("v2", "v1-again"):
        found = logits(tmp_path / name, ids)
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
        assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    sizes = {n: sum(t.numel() for t in load_file(tmp_path / n / "model.safetensors").values()) for n in entries}
    saved = sum(r * r for r in entries["v1"]["ranks"].values())
    orders = sum(t.numel() for n, t in load_file(tmp_path / "v2" / "model.safetensors").items() if n.endswith("order"))
    assert sizes["v1"] - sizes["v2"] == saved - orders
    assert sizes["v1-again"] == sizes["v1"]


def test_export_refuses_a_dense_folder(command, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    done = command("export", tmp_path / "dense", "--output-dir", tmp_path / "out")
    assert done.returncode == 1
    assert "is dense; export takes what training left, or a compact checkpoint" in done.stderr


@pytest.mark.parametrize(
    ("pivots", "message"),
    [
        (["x"], "quantization_config.pivots is a list"),
        ({"model.layers.0.mlp.up_proj": "left"}, "pivots['model.layers.0.mlp.up_proj'] is"),
        ({"model.layers.0.mlp.up_proj": 3}, "it must be output or input"),
    ],
)
def test_garbled_pivots_are_named(command, tmp_path, pivots, message):
    folder = shutil.copytree(STORED / "version-2", tmp_path / "bad")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["pivots"] = pivots
    (folder / "config.json").write_text(json.dumps(config))
    for arguments in (("merge", folder, "--output-dir", tmp_path / "out"), ("report", folder)):
        done = command(*arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert "config.json" in done.stderr


def test_a_loaded_checkpoint_saves_as_it_is_and_unpivots_for_training(tmp_path, ids):
    model = tiny_llama()
    lowrank_ft.convert(model, rank=8)
    lowrank_ft.save_compact(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys()
        == load_file(tmp_path / "out" / "model.safetensors").keys()
    )
    torch.testing.assert_close(logits(tmp_path / "again", ids), logits(tmp_path / "out", ids), atol=0, rtol=0)
    assert lowrank_ft.unpivot(loaded) == len(dict(lowrank_layers(loaded)))
    for name, layer in lowrank_layers(loaded):
        mine = model.get_submodule(name)
        gram = layer.U.weight.T @ layer.U.weight
        torch.testing.assert_close(gram, layer.V.weight @ layer.V.weight.T, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(gram.diagonal(), (mine.U.weight.T @ mine.U.weight).diagonal(), atol=1e-5, rtol=1e-4)
    loaded.save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]["format_version"] == 1
    torch.testing.assert_close(logits(tmp_path / "plain", ids), logits(tmp_path / "out", ids), atol=1e-5, rtol=1e-4)
