"""What stays dense is said, and what cannot be planned is refused."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig, MixtralConfig, MixtralForCausalLM

import lowrank_ft
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.errors import PlanError
from lowrank_ft.factorization.plan import Plan, make_plan
from lowrank_ft.factorization.remainder import dense_parts, dense_remainder, factored_share, notes
from lowrank_ft.factorization.solvers import gram_singular_values, singular_values
from lowrank_ft.training import ModelArguments
from recipes import finetune
from tests.conftest import DEMO_MODEL, tiny_llama


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=1, num_local_experts=4, vocab_size=50)
    )  # fmt: skip


def llama4():
    """Its experts compute in a way of their own."""
    return Llama4ForCausalLM(
        Llama4TextConfig(hidden_size=32, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=2, head_dim=16,
                         num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, vocab_size=50)
    )  # fmt: skip


def test_experts_that_stay_dense_are_said(command, tmp_path):
    model = llama4()
    left = dense_remainder(model, make_plan(model, rank=4))
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert sum(left.values()) == experts
    model.save_pretrained(tmp_path / "moe")
    done = command("plan", tmp_path / "moe", "--rank", "4")
    said = f"experts of 2 layers stay dense: {experts / model.num_parameters():.0%} of the parameters"
    assert f"note      {said} (model.layers.*.feed_forward.experts.gate_up_proj, " in done.stdout
    assert json.loads(command("plan", tmp_path / "moe", "--rank", "4", "--json").stdout)["stays_dense"] == left
    done = command("convert", tmp_path / "moe", "--rank", "4", "--method", "svd", "--output-dir", tmp_path / "out")
    assert f"note      {said} (" in done.stderr
    assert dense_remainder(tiny_llama(), make_plan(tiny_llama(), rank=4)) == {}
    assert notes(tiny_llama(), make_plan(tiny_llama(), rank=4)) == []


def test_a_fine_tuning_says_it_too(tmp_path, capsys):
    model = llama4()
    model.save_pretrained(tmp_path / "moe")
    arguments = ModelArguments(model=str(tmp_path / "moe"), rank=4, method="svd", guide="none")
    finetune.prepare_model(arguments, Source(str(tmp_path / "moe")), [])
    (said,) = notes(model, make_plan(model, rank=4))
    assert f"note: {said}\n" in capsys.readouterr().err


def test_every_matrix_is_either_planned_or_left_for_a_reason():
    for model in (mixtral(), llama4(), tiny_llama(tie_word_embeddings=True)):
        plan = make_plan(model, rank=4, exclude_modules=["k_proj"])
        parts = {part.kind: part for part in dense_parts(model, plan)}
        matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
        assert plan.target_parameters + sum(part.parameters for part in parts.values()) == matrices
        left = parts["model.layers.*.self_attn.k_proj.weight"]
        assert (left.why, left.layers) == ("not among the targets", 2)
        head = parts.pop("lm_head.weight", None)
        assert head is None or head.why == "the output head"
        inner = plan.target_parameters + sum(part.parameters for part in parts.values() if part.why != "an embedding")
        assert factored_share(model, plan) == plan.target_parameters / inner


def test_a_linear_of_full_rank_and_a_narrow_one_are_told_apart():
    model = tiny_llama()
    model.model.layers[1].gate = torch.nn.Linear(32, 8)
    plan = make_plan(model, rank=4, rank_pattern={"o_proj": 32})
    why = {part.kind: part.why for part in dense_parts(model, plan)}
    assert why["model.layers.*.self_attn.o_proj.weight"] == "rank 32 is full rank; kept dense"
    assert why["model.layers.*.gate.weight"] == "narrower than 16"
    assert why["model.embed_tokens.weight"] == "an embedding"


def test_a_large_linear_that_was_excluded_is_said():
    model = tiny_llama()
    lines = notes(model, make_plan(model, rank=4, exclude_modules=["up_proj"]))
    share = 2 * 32 * 48 / model.num_parameters()
    assert lines == [f"model.layers.*.mlp.up_proj stays dense: {share:.0%} of the parameters (not among the targets)"]


def test_quantized_sources_are_refused_by_name(command, tmp_path, monkeypatch, capsys):
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    model.save_pretrained(tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    for arguments in (["plan"], ["convert", "--output-dir", tmp_path / "out"]):
        done = command(arguments[0], tmp_path / "q", "--rank", "8", *arguments[1:])
        assert done.returncode == 1
        assert (
            "is quantized (bitsandbytes), and its weights are no matrices to factorize; name the model" in done.stderr
        )
    flags = ["--model", tmp_path / "q", "--rank", "8", "--dataset", "x.txt", "--output-dir", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, flags)])
    with pytest.raises(SystemExit):
        finetune.main()
    assert "is quantized (bitsandbytes), and its weights are no matrices" in capsys.readouterr().err


def test_a_plan_without_linears_is_refused():
    data = make_plan(tiny_llama(), rank=4).to_dict() | {"linears": []}
    with pytest.raises(PlanError, match="the plan names no linears"):
        Plan.from_dict(data)


def test_singular_values_of_the_record_are_those_of_an_svd():
    torch.manual_seed(0)
    for shape in ((40, 24), (24, 40), (24, 24)):
        weight = torch.randn(shape) * torch.logspace(0, -3, shape[1])
        torch.testing.assert_close(gram_singular_values(weight), singular_values(weight), rtol=1e-6, atol=1e-10)


def test_a_record_takes_no_svd(monkeypatch):
    monkeypatch.setattr(torch.linalg, "svdvals", lambda *_: pytest.fail("an SVD for the report alone"))
    record = lowrank_ft.conversion.record.ConversionRecord()
    lowrank_ft.convert(tiny_llama(), rank=4, record=record)
    assert all(entry.spectrum for entry in record.linears.values())


def test_guides_are_made_as_their_dense_weights_go(monkeypatch):
    """The dense weights of linears whose guide is made already must not be alive beside it."""
    import gc

    from lowrank_ft.nn import GuidedLowRankLinear

    model = tiny_llama()
    originals = [m.weight.detach().clone() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    ours = {id(w) for w in originals}
    alive = []
    stock = GuidedLowRankLinear.from_lowrank

    def watch(*arguments):
        gc.collect()
        held = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and id(t) not in ours]
        alive.append(sum(any(t.shape == w.shape and torch.equal(t, w) for t in held) for w in originals))
        return stock(*arguments)

    monkeypatch.setattr(GuidedLowRankLinear, "from_lowrank", watch)
    lowrank_ft.convert(model, rank=4, guide="residual")
    assert len(alive) == len(originals)
    assert alive == list(range(len(originals), 0, -1))
