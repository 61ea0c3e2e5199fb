"""A PEFT adapter where a whole model is meant: beside the weights, or on the model that is to be saved."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lowrank_ft
from lowrank_ft.checkpoints.models import load_model
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.errors import CheckpointError
from lowrank_ft.export import save_compact, save_dense
from tests.conftest import tiny_llama


def with_lora(model):
    torch.manual_seed(1)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return peft_model.eval()


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "both")
    with_lora(tiny_llama()).save_pretrained(tmp_path / "both")
    return tmp_path / "both"


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_it_is_refused_or_merged(folder, ids, tmp_path):
    with pytest.raises(CheckpointError, match="holds an adapter .* merge it with --adapter"):
        load_model(Source(str(folder)))
    model = load_model(Source(str(folder), adapter=True))
    torch.testing.assert_close(logits(model, ids), logits(with_lora(tiny_llama()), ids))
    assert all(p.requires_grad for p in model.parameters())
    lowrank_ft.convert(model, rank=6, exclude_modules=["q_proj"])
    save_compact(model, tmp_path / "compact")
    torch.testing.assert_close(logits(load_model(Source(str(tmp_path / "compact"))), ids), logits(model, ids))


def test_an_adapter_that_is_asked_for_has_to_be_there_and_whole(folder, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="no adapter to merge; leave --adapter out"):
        load_model(Source(str(tmp_path / "dense"), adapter=True))
    with_lora(tiny_llama(hidden_size=16)).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="does not fit its weights"):
        load_model(Source(str(folder), adapter=True))


def test_convert_says_so_before_it_reads_weights(folder, command, tmp_path):
    (folder / "model.safetensors").write_bytes(b"no weights")
    done = command("convert", folder, "--rank", "6", "--output-dir", tmp_path / "out", "--method", "svd")
    assert done.returncode != 0
    assert "holds an adapter" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("save", [save_compact, save_dense])
@pytest.mark.parametrize("kind", ["lora", "lowrank", "modules_to_save", "injected"])
def test_a_model_with_an_adapter_replaces_no_checkpoint(save, kind, tmp_path, ids):
    good = tiny_llama()
    save_compact(good, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    model = tiny_llama()
    if kind == "lora":
        model = with_lora(model)
    elif kind == "lowrank":
        model = get_peft_model(model, lowrank_ft.LowRankConfig(r=4))
    elif kind == "modules_to_save":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    else:
        model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match="carries an adapter of PEFT"):
        save(model, tmp_path / "out", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("save", [save_compact, save_dense])
def test_a_folder_that_does_not_load_is_not_published(save, tmp_path, monkeypatch):
    model = tiny_llama()
    if save is save_compact:
        lowrank_ft.convert(model, rank=6)
    original = type(model).save_pretrained

    def lossy(self, folder, **options):
        state = {k: v for k, v in self.state_dict().items() if k != "model.norm.weight"}
        original(self, folder, **{**options, "state_dict": state})

    monkeypatch.setattr(type(model), "save_pretrained", lossy)
    with pytest.raises(
        CheckpointError, match=r"it was deleted: 1 weights .* missing, the first being model.norm.weight"
    ):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
