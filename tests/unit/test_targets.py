import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    FalconConfig,
    FalconForCausalLM,
    HunYuanMoEV1Config,
    MambaConfig,
    MambaModel,
)  # fmt: skip

from lowrank_ft.errors import TargetError
from lowrank_ft.factorization.plan import make_plan
from lowrank_ft.factorization.remainder import dense_parts
from lowrank_ft.factorization.targets import find_linears, matches, pattern_value, select_targets
from tests.conftest import tiny_gpt2, tiny_llama

NAMES = [
    "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.10.mlp.up_proj", "lm_head",
    "q_proj", "encoder.xq_proj", "transformer.h.0.attn.c_attn",
]  # fmt: skip


@pytest.mark.parametrize(
    "patterns",
    [
        ["q_proj"],
        ["up_proj", "lm_head"],
        ["mlp.up_proj"],
        ["1.mlp.up_proj"],
        ".*mlp.*",
        r".*\.0\..*",
        "q_proj",
        ["proj"],
    ],
)
def test_matching_is_that_of_peft(patterns):
    for name in NAMES:
        expected = bool(check_target_module_exists(LoraConfig(target_modules=patterns), name))
        assert matches(name, patterns) is expected, name


@pytest.mark.parametrize(
    "table", [{"q_proj": 1}, {"mlp.*": 1}, {"layers.1.mlp.up_proj": 1}, {"up_proj": 1, ".*1.*": 2}]
)
def test_rank_pattern_is_that_of_peft(table):
    for name in NAMES:
        assert pattern_value(name, table) == table.get(get_pattern_key(table.keys(), name)), name


def test_default_is_every_linear_of_the_blocks():
    assert len(select_targets(tiny_llama())) == 14
    assert [s.name for s in select_targets(tiny_gpt2())][:2] == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
    ]
    bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48))
    names = [s.name for s in select_targets(bert)]
    assert len(names) == 12
    assert "pooler.dense" not in names


def test_conv1d_shapes_are_out_by_in():
    spec = next(s for s in find_linears(tiny_gpt2()) if s.name.endswith("c_attn"))
    assert (spec.shape, spec.transposed, spec.bias) == ((96, 32), True, True)


def test_the_head_is_a_target_only_when_it_is_named():
    model = tiny_llama(tie_word_embeddings=False)
    assert "lm_head" not in [s.name for s in select_targets(model, "all-linear")]
    assert [s.name for s in select_targets(model, ["lm_head"])] == ["lm_head"]


@pytest.mark.parametrize("meta", [False, True])
def test_a_tied_head_is_refused(meta):
    with torch.device("meta" if meta else "cpu"):
        model = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(TargetError, match="lm_head shares its weight"):
        select_targets(model, ["lm_head"])


def test_near_misses_are_listed():
    with pytest.raises(TargetError, match="'q_prj' matches no linear of the model; did you mean q_proj"):
        select_targets(tiny_llama(), ["q_prj"])
    with pytest.raises(TargetError, match="the linears are q_proj, k_proj"):
        select_targets(tiny_llama(), ["zzzzzz"])


def test_other_bad_patterns():
    with pytest.raises(TargetError, match="no valid regular expression"):
        select_targets(tiny_llama(), "(")
    with pytest.raises(TargetError, match="removes every target"):
        select_targets(tiny_llama(), ["q_proj"], ".*proj")
    with pytest.raises(TargetError, match="nothing to factorize"):
        select_targets(nn.Sequential(nn.ReLU()))
    with pytest.raises(TargetError, match="name no linear; name target_modules out of"):
        select_targets(tiny_llama(), [])


def test_narrow_gates_are_left_out_unless_named():
    model = nn.ModuleList([nn.ModuleDict({"gate": nn.Linear(64, 4), "up": nn.Linear(64, 64)})])
    assert [s.name for s in select_targets(model)] == ["0.up"]
    assert [s.name for s in select_targets(model, ["gate"])] == ["0.gate"]


@pytest.mark.parametrize("router", ["gate.wg", "router.classifier", "moe.router.proj"])
def test_linears_that_choose_experts_are_left_out_unless_named(router):
    """As wide as other linears where there are many experts."""
    owner, _, leaf = router.rpartition(".")
    block = nn.Module()
    block.up = nn.Linear(64, 64)
    parent = block
    for part in owner.split("."):
        parent.add_module(part, nn.Module())
        parent = getattr(parent, part)
    parent.add_module(leaf, nn.Linear(64, 32))
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"attention": nn.Module(), "mlp": block})])
    model.layers[0]["attention"].k_proj = nn.Linear(64, 32)  # as many outputs as there are experts, by chance
    model.config = HunYuanMoEV1Config(num_experts=32)
    names = [s.name for s in select_targets(model)]
    assert names == ["layers.0.attention.k_proj", "layers.0.mlp.up"]
    assert f"layers.0.mlp.{router}" not in [s.name for s in select_targets(model, "all-linear")]
    assert [s.name for s in select_targets(model, [leaf])] == [f"layers.0.mlp.{router}"]
    (part,) = [p for p in dense_parts(model, make_plan(model, rank=8)) if router in p.kind]
    assert part.why == "it chooses experts"


def test_falcons_own_linears_are_linears():
    """They were not counted, and Falcon was refused as a model without repeated blocks."""
    model = FalconForCausalLM(FalconConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    leaves = {s.name.rpartition(".")[2] for s in select_targets(model)}
    assert leaves == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize(("inside", "message"), [
    (OwnLinear(32, 32), r"has only linears of classes of its own in its repeated blocks \(OwnLinear\)"),
    (nn.Linear(32, 8), "has no linear of at least 16 inputs and outputs in its repeated blocks"),
    (nn.ReLU(), "has no repeated blocks with linears"),
])  # fmt: skip
def test_why_there_is_no_default_target_is_said(inside, message):
    model = nn.ModuleDict({"layers": nn.ModuleList([inside]), "pooler": nn.Linear(32, 32)})
    with pytest.raises(TargetError, match=message + "; name target_modules out of .*pooler"):
        select_targets(model)


@pytest.mark.parametrize("meta", [False, True])
def test_blocks_that_share_a_weight_are_left_out_unless_named(meta):
    with torch.device("meta" if meta else "cpu"):
        model = tiny_llama()
    key = "model.layers.{}.mlp.up_proj.weight"
    if meta:  # as transformers declares it, before it carries it out
        model.all_tied_weights_keys = {key.format(1): key.format(0)}
    else:
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    names = [s.name for s in select_targets(model)]
    assert len(names) == 12
    assert not any("up_proj" in name for name in names)
    with pytest.raises(
        TargetError, match=r"layers\.0\.mlp\.up_proj shares its weight with model\.layers\.1\.mlp\.up_proj"
    ):
        select_targets(model, ["up_proj"])


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_a_linear_whose_weight_is_read_by_its_owner_is_left_out_unless_named(targets):
    model = MambaModel(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, time_step_rank=16))
    leaves = [s.name.rpartition(".")[2] for s in select_targets(model, targets)]
    assert leaves == ["in_proj", "x_proj", "out_proj"]
    assert [s.name for s in select_targets(model, ["dt_proj"])] == ["layers.0.mixer.dt_proj"]
