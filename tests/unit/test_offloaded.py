"""Layers that accelerate keeps on disk or on the CPU: computed with where they are, or refused."""

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights, load_checkpoint_and_dispatch
from accelerate.utils import infer_auto_device_map
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import lowrank_ft
from lowrank_ft.errors import CheckpointError, TargetError
from lowrank_ft.export import save_compact
from lowrank_ft.nn.forms import stored_as
from tests.conftest import tiny_llama


def on_disk(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    device_map = dict.fromkeys(
        ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", device_map={**device_map, "model.layers.1": "disk"}, offload_folder=str(tmp_path / "off")
    )


@pytest.mark.parametrize(
    "build", [on_disk, lambda _: cpu_offload(tiny_llama(), torch.device("cpu"))], ids=["disk", "cpu"]
)
def test_what_is_offloaded_is_not_factorized(build, tmp_path):
    model = build(tmp_path)
    for call in (
        lambda: lowrank_ft.convert(model, rank=6),
        lambda: lowrank_ft.convert(model, energy=0.9),
        lambda: get_peft_model(model, lowrank_ft.LowRankConfig(r=6)),
    ):
        with pytest.raises(TargetError, match="is on the meta device .* load the model without offloading"):
            call()


@pytest.mark.parametrize("guide", ["none", "residual"])
def test_nor_is_an_adapter_computed_with_that_is_offloaded_later(guide, ids):
    model = get_peft_model(
        tiny_llama(), lowrank_ft.LowRankConfig(r=6, guide=guide, alpha=0.5 if guide != "none" else 0)
    )
    cpu_offload(model.base_model.model, torch.device("cpu"))
    with pytest.raises(TargetError, match="load the model without offloading"):
        model(input_ids=ids)


def test_no_device_map_comes_between_two_factors(tmp_path):
    model = tiny_llama()
    lowrank_ft.convert(model, rank=6)
    save_compact(model, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert "LowRankLinear" in loaded._no_split_modules
    assert "LlamaDecoderLayer" in loaded._no_split_modules
    classes = ["LowRankLinear"]  # as a user who lets blocks be split
    for size in range(2_000, 60_000, 4_000):
        places = infer_auto_device_map(loaded, {0: size, "cpu": 10**9}, no_split_module_classes=classes)
        assert not any(name.endswith((".U", ".V", ".U.weight", ".V.weight")) for name in places)


def compact(tmp_path, **overrides):
    model = tiny_llama(**overrides)
    lowrank_ft.convert(model, rank=6)
    save_compact(model, tmp_path / "m")
    return model


@pytest.mark.parametrize("size", [28_000, 34_000, 40_000])
def test_parts_on_disk_are_computed_with(size, tmp_path, ids):
    """The map that accelerate infers where memory is short, over blocks that may be split."""
    model = compact(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    places = infer_auto_device_map(loaded, {"cpu": size, "disk": 10**9}, no_split_module_classes=["LowRankLinear"])
    assert {"cpu", "disk"} <= set(places.values())
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", device_map=places, offload_folder=str(tmp_path / "off")
    )
    assert any(p.is_meta for p in offloaded.parameters())
    with torch.no_grad(), stored_as(model, "pivoted"):
        torch.testing.assert_close(offloaded(input_ids=ids).logits, model(input_ids=ids).logits)


def empty(folder):
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_empty_model_is_filled_by_accelerate(place, tied, tmp_path, ids):
    model = compact(tmp_path, tie_word_embeddings=tied)
    fresh = empty(tmp_path / "m")
    assert lowrank_ft.apply_config(fresh) == 14
    fresh.tie_weights()
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    filled = load_checkpoint_and_dispatch(
        fresh, str(tmp_path / "m"), device_map={**places, "model.layers.1": place}, offload_folder=str(tmp_path / "off"),
        offload_buffers=True,
    )  # fmt: skip
    with torch.no_grad(), stored_as(model, "pivoted"):
        torch.testing.assert_close(filled(input_ids=ids).logits, model(input_ids=ids).logits)


def test_without_it_the_tripwire_stops_accelerate(tmp_path):
    compact(tmp_path)
    with pytest.raises(ValueError, match=r'Trying to set a tensor of shape torch.Size\(\[1\]\) in "weight"'):
        load_checkpoint_and_dispatch(empty(tmp_path / "m"), str(tmp_path / "m"), device_map={"": "cpu"})


def test_a_config_is_applied_to_an_empty_model_of_a_compact_checkpoint_only(tmp_path):
    compact(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    dense = AutoModelForCausalLM.from_config(loaded.config)
    with init_empty_weights():
        other = type(dense)(type(loaded.config)(**{**loaded.config.to_dict(), "quantization_config": None}))
        fewer = empty(tmp_path / "m")
    fewer.config.quantization_config = {"quant_method": "lowrank", "ranks": {"elsewhere": 3}}
    for model, message in (
        (other, "names no factored linears"), (loaded, "has factored linears already"),
        (dense, r"has weights already.* make it inside accelerate\.init_empty_weights"),
        (fewer, "has none of the factored linears of the checkpoint, such as elsewhere"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            lowrank_ft.apply_config(model)
