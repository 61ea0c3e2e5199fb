"""What was frozen stays frozen, and a name that is meant as a name is told apart from an expression."""

import pytest
import torch
from peft import get_peft_model
from transformers import GPT2LMHeadModel

import lowrank_ft
from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.errors import RankError, TargetError
from tests.conftest import tiny_gpt2, tiny_llama


def half_frozen() -> GPT2LMHeadModel:
    model = tiny_gpt2()
    model.transformer.h[0].requires_grad_(False)
    return model


def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("guide", [None, "dense"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_convert_and_merge_keep_what_is_frozen(calibrated, guide, ids):
    model = half_frozen()
    before = trainable(model)
    calibration = Calibration([{"input_ids": ids}], "ids", refine_epochs=1, distill_epochs=1) if calibrated else None
    lowrank_ft.convert(model, rank=6, calibration=calibration, guide=guide)
    assert not any(n.startswith("transformer.h.0.") for n in trainable(model))
    assert "transformer.h.1.mlp.c_fc.U.weight" in trainable(model)
    lowrank_ft.end_guidance(model)
    lowrank_ft.merge(model)
    assert trainable(model) == before


def test_unloading_an_adapter_frees_no_bias():
    model = get_peft_model(tiny_gpt2(), lowrank_ft.LowRankConfig(r=6))
    compact = model.base_model.compact_and_unload()
    assert all(n.endswith((".U.weight", ".V.weight")) for n in trainable(compact))
    assert trainable(compact)


def test_rank_zero_in_a_pattern_is_refused_by_peft_as_by_convert():
    config = lowrank_ft.LowRankConfig(r=4, rank_pattern={"q_proj": 0})
    with pytest.raises(RankError, match="rank 0 for .*q_proj is not positive"):
        get_peft_model(tiny_llama(), config)
    with pytest.raises(RankError, match="rank 0 for .*q_proj is not positive"):
        lowrank_ft.convert(tiny_llama(), rank=4, rank_pattern={"q_proj": 0})


def test_a_suffix_as_a_string_is_told_what_a_string_means():
    with pytest.raises(TargetError, match=r"regular expression for whole names; .* give a list: \['q_proj'\]"):
        lowrank_ft.convert(tiny_llama(), rank=4, target_modules="q_proj")
    with torch.no_grad(), pytest.raises(TargetError, match="did you mean q_proj"):
        lowrank_ft.convert(tiny_llama(), rank=4, target_modules=["q_prj"])
