"""The PEFT method, layer by layer: values and gradients against a naive reference, and what it refuses."""

import copy
import warnings

import pytest
import torch
from peft import PeftType, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lowrank_ft.integrations.peft.layer as layer_module
from lowrank_ft.errors import ConfigError, LowRankError, NonFiniteError, RankError, TargetError
from lowrank_ft.factorization.plan import make_plan
from lowrank_ft.factorization.solvers import truncated_svd
from lowrank_ft.integrations.peft import LowRankConfig, LowRankLayer, register
from lowrank_ft.integrations.peft.model import shortest_suffixes
from lowrank_ft.nn import LowRankLinear, compact_view, end_guidance, guided_layers, lowrank_layers, set_alpha

OUT, IN, RANK = 12, 10, 4


class Net(nn.Module):
    """One linear, ``nn.Linear`` or ``Conv1D``, and a head."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear
        self.head = nn.Linear(OUT, 3)

    def forward(self, x):
        return self.linear(x)


def make_net(kind: str = "linear", bias: bool = True, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    if kind == "conv1d":
        linear: nn.Module = Conv1D(OUT, IN)
        nn.init.normal_(linear.weight, std=0.3)
        nn.init.normal_(linear.bias)
    else:
        linear = nn.Linear(IN, OUT, bias=bias)
    return Net(linear).to(dtype)


def adapt(net: nn.Module, adapter: str = "default", **options):
    options = {"r": RANK, "target_modules": ["linear"]} | options
    return get_peft_model(net, LowRankConfig(**options), adapter_name=adapter)


def disturb(model: nn.Module, scale: float = 0.1) -> None:
    """Move the factors off their initial values, as training does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lowrank_U" in name or "lowrank_V" in name:
                p.add_(torch.randn_like(p) * scale)


def dense_of(net: Net) -> tuple[torch.Tensor, torch.Tensor | None]:
    base = net.linear.base_layer if hasattr(net.linear, "base_layer") else net.linear
    weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    return weight.detach().clone(), None if base.bias is None else base.bias.detach().clone()


def reference(guide, alpha, x, w, u, v, u0, v0, bias):
    """Both equations with explicit matrices."""
    if guide == "residual":
        matrix = u @ v + alpha * (w - u0 @ v0)
    else:
        matrix = u @ v
    y = x @ matrix.T
    return y if bias is None else y + bias


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(
    ("guide", "alpha"),
    [("none", 0.0), *(("residual", alpha) for alpha in (0.0, 0.25, 1.0))],
)
def test_forward_and_gradients_match_the_reference(kind, guide, alpha):
    net = make_net(kind)
    w, bias = dense_of(net)
    model = adapt(net, guide=guide, alpha=alpha)
    layer = net.linear
    u0, v0 = layer.lowrank_U["default"].detach().clone(), layer.lowrank_V["default"].detach().clone()
    disturb(model)
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 3, OUT, dtype=torch.float64)
    y = model(x)
    y.backward(grad)

    u = layer.lowrank_U["default"].detach().clone().requires_grad_()
    v = layer.lowrank_V["default"].detach().clone().requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    expected = reference(guide, alpha, x2, w, u, v, u0, v0, bias)
    expected.backward(grad)

    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(layer.lowrank_U["default"].grad, u.grad)
    torch.testing.assert_close(layer.lowrank_V["default"].grad, v.grad)
    assert layer.base_layer.weight.grad is None
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "base_model.model.linear.lowrank_U.default",
        "base_model.model.linear.lowrank_V.default",
    }


def test_without_bias():
    net = make_net(bias=False)
    w, _ = dense_of(net)
    model = adapt(net, r=1.0)
    x = torch.randn(5, IN, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ w.T, rtol=1e-5, atol=1e-6)


def test_residual_guide_at_alpha_one_is_the_pretrained_function_bit_for_bit():
    net = make_net()
    x = torch.randn(5, IN, dtype=torch.float64)
    expected = net(x)
    torch.testing.assert_close(adapt(net, alpha=1.0)(x), expected, rtol=0, atol=1e-15)


def test_starts_from_the_truncated_svd():
    net = make_net()
    factors = truncated_svd(dense_of(net)[0], RANK)
    adapt(net)
    torch.testing.assert_close(net.linear.lowrank_U["default"].data, factors.U.double())
    torch.testing.assert_close(net.linear.lowrank_V["default"].data, factors.V.double())


def test_random_initial_factors_have_the_scale_of_a_linear():
    net = Net(nn.Linear(400, OUT))
    adapt(net, r=8, init_weights=False)
    product = net.linear.lowrank_U["default"] @ net.linear.lowrank_V["default"]
    assert 0.7 < product.std().item() * 400**0.5 < 1.4


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_alpha_zero_never_multiplies_by_the_dense_weight(kind):
    net = make_net(kind)
    model = adapt(net)
    net.linear.base_layer.weight.data.fill_(float("nan"))
    assert torch.isfinite(model(torch.randn(2, IN, dtype=torch.float64))).all()


# The protocol of lowrank_ft.nn.guided


def test_guided_functions_drive_the_adapter():
    net = make_net()
    model = adapt(net, guide="residual")
    disturb(model)
    x = torch.randn(2, IN, dtype=torch.float64)
    compact = model(x)
    assert [name for name, _ in guided_layers(model)] == ["base_model.model.linear"]
    set_alpha(model, 0.5)
    guided = model(x)
    assert not torch.allclose(guided, compact)
    with compact_view(model):
        assert torch.equal(model(x), compact)
    assert torch.equal(model(x), guided)
    assert end_guidance(model) == 8 * RANK * (OUT + IN)
    assert torch.equal(model(x), compact)
    assert not list(guided_layers(model))
    net.linear.set_alpha(1.0)
    assert torch.equal(model(x), compact)
    assert not [k for k in model.state_dict() if "lowrank_U0" in k or "lowrank_V0" in k]


def test_an_adapter_without_guide_is_no_guided_layer():
    model = adapt(make_net(), guide="none")
    assert not list(guided_layers(model))


def test_alpha_survives_a_cast_to_half_precision():
    net = make_net(dtype=torch.float32)
    adapt(net, alpha=0.3)
    net.to(torch.bfloat16)
    alpha = net.linear.lowrank_alpha["default"]
    assert alpha.dtype == torch.float32
    assert alpha.item() == pytest.approx(0.3, abs=1e-7)


def test_alpha_reaches_a_compiled_graph_without_a_new_one():
    net = make_net(dtype=torch.float32)
    model = adapt(net, alpha=1.0)
    disturb(model)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend)
    x = torch.randn(2, IN)
    for alpha in (1.0, 0.7, 0.3, 0.0):
        set_alpha(model, alpha)
        torch.testing.assert_close(compiled(x), net(x))
    assert len(graphs) == 2  # one guided, one without the dense branch


def test_bfloat16_base_keeps_its_dtype_and_trains_float32_factors():
    net = make_net(dtype=torch.bfloat16)
    model = adapt(net, alpha=0.5)
    assert net.linear.lowrank_U["default"].dtype == torch.float32
    assert net.linear.lowrank_U0["default"].dtype == torch.float32
    assert model(torch.randn(2, IN, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_gives_its_own_dtype():
    model = adapt(make_net(dtype=torch.float32), alpha=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(2, IN)).dtype == torch.bfloat16


# Disable, merge, several adapters


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_disable_adapter_is_the_base_model(kind):
    net = make_net(kind)
    x = torch.randn(2, IN, dtype=torch.float64)
    expected = net(x)
    model = adapt(net)
    assert not torch.allclose(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(("guide", "alpha"), [("none", 0.0), ("residual", 0.0), ("residual", 0.4)])
def test_merge_keeps_the_function_and_unmerge_restores_the_bits(kind, guide, alpha):
    net = make_net(kind)
    model = adapt(net, guide=guide, alpha=alpha)
    disturb(model)
    before = net.linear.base_layer.weight.detach().clone()
    x = torch.randn(2, IN, dtype=torch.float64)
    expected = model(x)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), expected)
    if alpha == 0:
        u, v = net.linear.lowrank_U["default"], net.linear.lowrank_V["default"]
        merged = net.linear.base_layer.weight.T if kind == "conv1d" else net.linear.base_layer.weight
        torch.testing.assert_close(merged.data, (u @ v).data)
    with model.disable_adapter():
        model(x)  # unmerges
    assert torch.equal(net.linear.base_layer.weight, before)
    torch.testing.assert_close(model(x), expected)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_delta_weight_is_what_merge_adds():
    net = make_net("conv1d")
    model = adapt(net)
    before = net.linear.base_layer.weight.detach().clone()
    delta = net.linear.get_delta_weight("default")
    model.merge_adapter()
    torch.testing.assert_close(net.linear.base_layer.weight.data, before + delta)
    torch.testing.assert_close(net.linear.get_delta_weight("default"), delta)


def test_safe_merge_refuses_nan_and_changes_nothing():
    net = make_net()
    model = adapt(net)
    before = net.linear.base_layer.weight.detach().clone()
    net.linear.lowrank_U["default"].data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="default"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(net.linear.base_layer.weight, before)
    assert not net.linear.merged


def test_two_adapters_take_turns_and_add_up():
    net = make_net()
    w, bias = dense_of(net)
    model = adapt(net, "one")
    model.add_adapter("two", LowRankConfig(r=2, target_modules=["linear"], guide="residual", alpha=0.5))
    disturb(model)
    layer = net.linear
    x = torch.randn(4, IN, dtype=torch.float64)
    one = (layer.lowrank_U["one"] @ layer.lowrank_V["one"]).detach()
    start = layer.lowrank_U0["two"] @ layer.lowrank_V0["two"]
    two = (layer.lowrank_U["two"] @ layer.lowrank_V["two"]).detach() + 0.5 * (w - start)
    torch.testing.assert_close(model(x), x @ one.T + bias)
    model.set_adapter("two")
    torch.testing.assert_close(model(x), x @ two.T + bias)
    model.base_model.set_adapter(["one", "two"])
    both = x @ (w + (one - w) + (two - w)).T + bias
    torch.testing.assert_close(model(x), both)
    before = layer.base_layer.weight.detach().clone()
    model.merge_adapter(["one"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(["two"])
    torch.testing.assert_close(model(x), both)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)
    model.set_adapter("one")
    assert layer.lowrank_U["one"].requires_grad
    assert not layer.lowrank_U["two"].requires_grad
    model.delete_adapter("two")
    assert not [k for k in (*model.state_dict(), *dict(model.named_buffers())) if "two" in k]


# Ranks, targets, registration


def test_rank_pattern_overrides_r():
    net = tiny_llama()
    get_peft_model(net, LowRankConfig(r=4, rank_pattern={r"layers\.1\.mlp\.up_proj": 8, "down_proj": 0.5}))
    ranks = {n: m.lowrank_V["default"].shape[0] for n, m in net.named_modules() if isinstance(m, LowRankLayer)}
    assert ranks["model.layers.1.mlp.up_proj"] == 8
    assert ranks["model.layers.0.mlp.up_proj"] == 4
    assert ranks["model.layers.0.mlp.down_proj"] == 16


def test_a_plan_becomes_a_config_and_back():
    plan = make_plan(tiny_llama(), param_ratio=0.6, rank_pattern={r"layers\.1\.mlp\.up_proj": 5, "v_proj": 16})
    assert len(set(plan.ranks.values())) > 2
    assert any(p.rank is None for p in plan.linears)  # v_proj, of full rank
    config = LowRankConfig.from_plan(plan, guide="none")
    net = tiny_llama()
    get_peft_model(net, config)
    ranks = {n: m.lowrank_V["default"].shape[0] for n, m in net.named_modules() if isinstance(m, LowRankLayer)}
    assert ranks == plan.ranks
    again = config.to_plan(tiny_llama())
    assert again.ranks == plan.ranks
    assert again.converted_model_parameters == plan.converted_model_parameters
    # Layer 1 is not taken for layer 11.
    deep = LowRankConfig.from_plan(
        make_plan(tiny_llama(num_hidden_layers=12), rank=8, rank_pattern={"layers.1.mlp.*": 4})
    )
    assert deep.to_plan(tiny_llama(num_hidden_layers=12)).ranks["model.layers.11.mlp.up_proj"] == 8


def test_what_a_plan_and_a_config_cannot_say_to_each_other():
    plan = make_plan(tiny_llama(), rank=8)
    with pytest.raises(ConfigError, match="leave out r$"):
        LowRankConfig.from_plan(plan, r=4)
    with pytest.raises(ConfigError, match="leaves every linear dense"):
        LowRankConfig.from_plan(make_plan(tiny_llama(), rank=1.0))
    with pytest.raises(ConfigError, match="layers_to_transform has no place in a plan"):
        LowRankConfig(r=8, target_modules=["q_proj"], layers_to_transform=[0]).to_plan(tiny_llama())


def tiny_llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | {"tie_word_embeddings": False} | options)).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_default_and_all_linear_become_short_suffixes_that_fit_again(make, targets):
    net = make()
    model = get_peft_model(net, LowRankConfig(r=4, target_modules=targets, exclude_modules=["c_proj", "o_proj"]))
    config = model.peft_config["default"]
    assert all(not part.isdigit() for name in config.target_modules for part in name.split("."))
    adapted = {n for n, m in net.named_modules() if isinstance(m, LowRankLayer)}
    assert adapted
    assert not [n for n in adapted if n.endswith(("lm_head", "c_proj", "o_proj"))]
    again = make()
    get_peft_model(
        again, LowRankConfig(r=4, target_modules=config.target_modules, exclude_modules=["c_proj", "o_proj"])
    )
    assert {n for n, m in again.named_modules() if isinstance(m, LowRankLayer)} == adapted
    # A second adapter finds the same linears under the first.
    model.add_adapter("second", LowRankConfig(r=2, target_modules=targets, exclude_modules=["c_proj", "o_proj"]))
    assert model.peft_config["second"].target_modules == config.target_modules
    assert config.fan_in_fan_out is (make is tiny_gpt2)


def test_shortest_suffixes():
    blocks = {f"layers.{i}.{part}.dense" for i in range(2) for part in ("attention", "output")}
    assert shortest_suffixes(blocks, blocks) == {"dense"}
    assert shortest_suffixes(blocks, blocks | {"pooler.dense"}) == {"attention.dense", "output.dense"}
    assert shortest_suffixes({"layers.0.up"}, {"layers.0.up", "layers.1.up"}) == {"0.up"}
    assert shortest_suffixes({"up"}, {"up", "layers.1.up"}) == {"up"}


def test_layers_to_transform():
    net = tiny_llama()
    get_peft_model(net, LowRankConfig(r=4, target_modules=["up_proj"], layers_to_transform=[1]))
    assert [n for n, m in net.named_modules() if isinstance(m, LowRankLayer)] == ["model.layers.1.mlp.up_proj"]


def test_train_biases_of_adapted_linears():
    model = adapt(make_net(), bias="lowrank_only")
    assert "base_model.model.linear.base_layer.bias" in {n for n, p in model.named_parameters() if p.requires_grad}


def test_register_is_idempotent_and_extends_the_enum():
    register()
    register()
    assert PeftType("LOWRANK") is PeftType.LOWRANK is PeftType["LOWRANK"]
    assert list(PeftType).count(PeftType.LOWRANK) == 1
    assert copy.deepcopy(PeftType.LOWRANK) is PeftType.LOWRANK
    assert LowRankConfig().peft_type == "LOWRANK"


def test_no_conversion_to_lora():
    assert not adapt(make_net()).supports_lora_conversion()


def test_a_loaded_config_puts_off_the_svd_and_still_starts_from_it(tmp_path, monkeypatch):
    LowRankConfig(r=RANK, target_modules=["linear"]).save_pretrained(tmp_path)
    calls = []

    def spy(weight, rank, name):
        calls.append(name)
        return truncated_svd(weight, rank, name)

    monkeypatch.setattr(layer_module, "truncated_svd", spy)
    net = make_net()
    model = get_peft_model(net, LowRankConfig.from_pretrained(tmp_path))
    assert calls == []
    x = torch.randn(2, IN, dtype=torch.float64)
    y = model(x)
    assert calls == ["linear.weight"]
    assert torch.equal(y, adapt(make_net())(x))
    # Saving before any forward finds real factors, too.
    net = make_net()
    get_peft_model(net, LowRankConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path / "saved")
    assert net.linear.lowrank_U["default"].abs().sum() > 0


# Compact models


def _logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("through_peft_model", [True, False])
def test_compact_and_unload_computes_the_same_with_fewer_parameters(make, through_peft_model):
    net = make()
    dense_size = sum(p.numel() for p in net.parameters())
    model = get_peft_model(net, LowRankConfig(r=6, alpha=0.5, rank_pattern={"up_proj|c_fc": 32}))
    disturb(model, 0.02)
    ids = torch.randint(3, 60, (2, 8))
    with compact_view(model):
        expected = _logits(model, ids)
    bare = model.compact_and_unload() if through_peft_model else model.base_model.compact_and_unload()
    torch.testing.assert_close(_logits(bare, ids), expected)
    assert bare is net
    assert type(bare) is type(make())
    assert sum(p.numel() for p in bare.parameters()) < dense_size
    factored = dict(lowrank_layers(bare))
    assert bare.config.quantization_config["ranks"] == dict.fromkeys(factored, 6)
    # Rank 32 is full rank, so these are dense again, with the low-rank weight.
    past = [m for n, m in bare.named_modules() if n.endswith(("up_proj", "c_fc"))]
    assert len(past) == 2
    assert all(torch.linalg.matrix_rank(m.weight, rtol=1e-5) == 32 for m in past)
    assert not [n for n, _ in bare.named_modules() if "base_layer" in n]
    assert not hasattr(bare, "peft_config")


def test_compact_puts_modules_to_save_in_place():
    net = tiny_llama()
    model = get_peft_model(net, LowRankConfig(r=4, modules_to_save=["lm_head"]))
    with torch.no_grad():
        net.lm_head.modules_to_save["default"].weight.mul_(2)
    ids = torch.randint(3, 60, (2, 8))
    expected = _logits(model, ids)
    bare = model.compact_and_unload()
    assert type(bare.lm_head) is nn.Linear
    torch.testing.assert_close(_logits(bare, ids), expected)


def test_compact_of_a_merged_and_of_a_named_adapter():
    net = tiny_llama()
    model = get_peft_model(net, LowRankConfig(r=4, target_modules=["up_proj", "q_proj"]))
    model.add_adapter("second", LowRankConfig(r=5, target_modules=["up_proj"]))
    disturb(model, 0.02)
    ids = torch.randint(3, 60, (2, 8))
    model.set_adapter("second")
    expected = _logits(model, ids)
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        bare = model.compact_and_unload("second")
    torch.testing.assert_close(_logits(bare, ids), expected)
    assert {n.rpartition(".")[2]: m.rank for n, m in lowrank_layers(bare)} == {"up_proj": 5}


def test_compact_keeps_dtype_and_bias():
    net = make_net(dtype=torch.bfloat16)
    bare = adapt(net).compact_and_unload()
    assert isinstance(bare.linear, LowRankLinear)
    assert {p.dtype for p in bare.linear.parameters()} == {torch.bfloat16}
    assert bare.linear.bias is not None


def test_merge_and_unload_gives_a_stock_model():
    net = tiny_gpt2()
    model = get_peft_model(net, LowRankConfig(r=4))
    ids = torch.randint(3, 60, (2, 8))
    expected = _logits(model, ids)
    bare = model.merge_and_unload()
    torch.testing.assert_close(_logits(bare, ids), expected)
    assert {type(m).__name__ for m in bare.modules()} == {type(m).__name__ for m in tiny_gpt2().modules()}


# Errors: one line that says what, found, allowed, fix


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guide": "dense"}, "does not store W.*recipes/finetune.py"),
        ({"guide": "teacher"}, "guide 'teacher' is unknown; choose one of residual, none"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"alpha": 0.5, "guide": "none"}, "guide 'none'"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"target_modules": "x", "layers_to_transform": 1}, "`layers_to_transform` cannot be used"),
        ({"layers_pattern": "h"}, "`layers_to_transform` must also be specified"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        LowRankConfig(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"r": 11}, RankError, r"rank 11 exceeds min\(out_features, in_features\)=10 for linear"),
        ({"r": 0}, RankError, "rank 0 for linear is not positive"),
        ({"r": 1.5}, RankError, "fraction 1.5 for linear"),
        ({"rank_pattern": {"linear": 99}}, RankError, "rank 99"),
        ({"target_modules": ["linear", "norm"]}, TargetError, "norm is LayerNorm.*exclude_modules"),
        ({"target_modules": None}, TargetError, "has no repeated blocks"),
    ],
)
def test_adapter_errors(options, kind, message):
    net = make_net()
    net.norm = nn.LayerNorm(OUT)
    with pytest.raises(kind, match=message) as error:
        adapt(net, **options)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, LowRankError)


def test_nan_weight_is_named():
    net = make_net()
    net.linear.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"linear\.weight"):
        adapt(net)


def test_compact_errors():
    net = make_net()
    model = adapt(net, "one")
    model.add_adapter("two", LowRankConfig(r=2, target_modules=["linear"]))
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ConfigError, match="one, two"):
        model.compact_and_unload()
    with pytest.raises(ConfigError, match="no adapter 'three'; choose one of one, two"):
        model.compact_and_unload("three")


def test_compact_refuses_a_tied_head():
    net = tiny_llama(tie_word_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(net, LowRankConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(TargetError, match=r"lm_head shares its weight with model\.embed_tokens"):
        model.compact_and_unload()


def test_model_without_config_is_fine():
    bare = adapt(make_net()).compact_and_unload()
    assert isinstance(bare.linear, LowRankLinear)
