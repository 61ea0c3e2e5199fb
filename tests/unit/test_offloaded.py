"""Layers that accelerate keeps on disk or on the CPU: computed with where they are, or refused."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import infer_auto_device_map
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import lowrank_ft
from lowrank_ft.errors import TargetError
from lowrank_ft.export import save_compact
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
