import json

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from lowrank_ft.conversion.convert import spectrum_of
from lowrank_ft.errors import PlanError, RankError
from lowrank_ft.factorization.options import SizeOptions
from lowrank_ft.factorization.plan import Plan, count_parameters, make_plan, reallocate
from lowrank_ft.factorization.ranks import RANK_MULTIPLE
from lowrank_ft.nn.forms import stored_as
from tests.conftest import tiny_gpt2, tiny_llama


def test_a_plan_costs_no_weights():
    with torch.device("meta"):
        model = tiny_llama()
    plan = make_plan(model, rank=8)
    assert plan == make_plan(tiny_llama(), rank=8)
    assert set(plan.ranks.values()) == {8}
    attention = 2 * (2 * 8 * (32 + 32)) + 2 * (2 * 8 * (32 + 16))
    mlp = 2 * (3 * 8 * (32 + 48))
    assert plan.trained_parameters == attention + mlp
    assert plan.factored_parameters == attention + mlp - 14 * 8 * 8


def test_the_converted_size_is_what_conversion_gives():
    from lowrank_ft.conversion.convert import convert

    for model in (tiny_llama(), tiny_llama(tie_word_embeddings=True), tiny_gpt2()):
        plan = convert(model, param_ratio=0.5)
        in_training = plan.trained_parameters - plan.factored_parameters
        assert count_parameters(model) == plan.converted_model_parameters + in_training
        with stored_as(model, "pivoted"):
            assert count_parameters(model) == plan.converted_model_parameters
        assert 0.45 < plan.param_ratio <= 0.5


def test_weights_in_4_bits_count_as_the_matrices_that_they_were(tmp_path, ids):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; pip install 'lowrank-ft[quantized]'")
    dense = tiny_llama(hidden_size=64, intermediate_size=128)
    dense.save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert sum(p.numel() for p in model.parameters()) < 0.7 * count_parameters(dense)
    assert count_parameters(model) == count_parameters(dense) == model.num_parameters()
    with torch.no_grad():
        model(ids)  # some CPUs pack the weights anew
    assert count_parameters(model) == count_parameters(dense)


def test_full_rank_stays_dense_and_says_so():
    plan = make_plan(tiny_llama(), rank=16)
    dense = {p.name.rpartition(".")[2]: p.note for p in plan.linears if p.rank is None}
    assert set(dense) == {"k_proj", "v_proj"}  # 16 x 32
    assert dense["k_proj"] == "rank 16 is full rank; kept dense"
    assert all(p.rank == 16 for p in make_plan(tiny_llama(), rank=16, keep_full_rank=True).linears)


def test_rank_pattern_overrides():
    plan = make_plan(tiny_llama(), rank=8, rank_pattern={"q_proj": 4, r"layers\.1\.mlp.*": 0.25})
    assert plan.ranks["model.layers.1.self_attn.q_proj"] == 4
    assert plan.ranks["model.layers.1.mlp.up_proj"] == 8
    assert plan.ranks["model.layers.0.mlp.up_proj"] == 8
    with pytest.raises(RankError, match="'nothing' matches none"):
        make_plan(tiny_llama(), rank=8, rank_pattern={"nothing": 4})


@pytest.mark.parametrize("multiple", [1, 16, 24])
def test_ranks_are_multiples_of_what_the_device_likes(multiple):
    with torch.device("meta"):
        model = tiny_llama(hidden_size=512, intermediate_size=1024)
    plan = make_plan(model, param_ratio=0.6, rank_multiple=multiple, exclude_modules=["k_proj", "v_proj"])
    assert all(rank % multiple == 0 for rank in plan.ranks.values())
    assert 0.55 < plan.param_ratio <= 0.6
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    spectra = {p.name: torch.linspace(2, 1, min(p.shape)) ** (i + 1) for i, p in enumerate(plan.linears)}
    again = reallocate(plan, spectra)
    assert again.ranks != plan.ranks
    assert all(rank % multiple == 0 for rank in again.ranks.values())


def test_the_multiple_is_checked_and_has_one_default():
    assert SizeOptions().rank_multiple == RANK_MULTIPLE
    assert SizeOptions().given() == []
    assert SizeOptions(rank_multiple=16).given() == ["rank_multiple"]
    with pytest.raises(RankError, match="rank_multiple is 0; it must be 1 or more"):
        make_plan(tiny_llama(), param_ratio=0.6, rank_multiple=0)


def test_energy_needs_spectra_and_keeps_enough():
    model = tiny_llama()
    with pytest.raises(RankError, match="spectra"):
        make_plan(model, energy=0.9)
    plan = make_plan(model, energy=0.9, spectrum=spectrum_of(model), keep_full_rank=True)
    for name, rank in plan.ranks.items():
        s = torch.linalg.svdvals(model.get_submodule(name).weight.double()).square()
        assert s[:rank].sum() >= 0.9 * s.sum() > s[: rank - 1].sum()


@pytest.mark.parametrize("sizes", [{}, {"rank": 4, "energy": 0.9}, {"rank": 4, "param_ratio": 0.5}])
def test_exactly_one_size(sizes):
    with pytest.raises(RankError, match="give exactly one size: rank, param_ratio or energy"):
        make_plan(tiny_llama(), **sizes)


def test_json_round_trip_and_editing(tmp_path):
    plan = make_plan(tiny_llama(), param_ratio=0.6)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    data = json.loads((tmp_path / "plan.json").read_text())
    data["linears"][0]["rank"] = 3
    assert Plan.from_dict(data).ranks["model.layers.0.self_attn.q_proj"] == 3
    data["linears"][0]["rank"] = 300
    with pytest.raises(RankError, match="exceeds"):
        Plan.from_dict(data)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"plan_version": 2}', '{"plan_version": 1, "linears": [{"name": "x"}]}']
)
def test_a_bad_plan_file_is_refused(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "plan.json")
