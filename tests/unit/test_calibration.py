"""Calibration against naive computations in float64, and on every kind of architecture."""

import copy
import json
import warnings

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

from lowrank_ft.conversion.activations import Activations
from lowrank_ft.conversion.blockwise import Stream, _Block
from lowrank_ft.conversion.calibration import Calibration, first_batches
from lowrank_ft.conversion.chains import ChainInputs, block_of, capture, find_chains, siblings, token_mask
from lowrank_ft.conversion.convert import allocate, convert
from lowrank_ft.conversion.distill import difference
from lowrank_ft.conversion.moments import Moments
from lowrank_ft.conversion.received import InputGroups, dense_moments
from lowrank_ft.conversion.record import ConversionRecord
from lowrank_ft.conversion.sampling import sample_blocks
from lowrank_ft.conversion.sensitivity import output_gradients, output_importance, squared_spectra
from lowrank_ft.errors import ConfigError, DataError, DivergedError, LowRankError, NonFiniteError
from lowrank_ft.factorization.plan import make_plan
from lowrank_ft.factorization.solvers import Regression
from lowrank_ft.factorization.targets import find_linears
from lowrank_ft.nn import GUIDES, LowRankLinear, end_guidance, lowrank_layers, stored_form
from lowrank_ft.nn.modes import evaluating
from lowrank_ft.nn.replace import dense_weight
from tests.architectures import row
from tests.architectures.row import GROUPED, SMALL
from tests.conftest import tiny_gpt2, tiny_llama
from tests.numerics.test_regression import naive_regression

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32)
SWIN = tf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
T5, WHISPER = tf.T5Config(**row.T5), tf.WhisperConfig(**row.WHISPER)
ALBERT = tf.AlbertConfig(**{**SMALL, "num_hidden_layers": 3}, embedding_size=16)
DEBERTA = tf.DebertaV2Config(
    **SMALL, relative_attention=True, share_att_key=True, pos_att_type=["p2c", "c2p"], position_buckets=8,
    norm_rel_ebd="layer_norm",
)  # fmt: skip
SWITCH = tf.SwitchTransformersConfig(
    vocab_size=97, d_model=32, d_kv=8, d_ff=48, expert_capacity=64, num_layers=2, num_sparse_encoder_layers=1,
    num_decoder_layers=2, num_sparse_decoder_layers=1, num_heads=4, num_experts=4, decoder_start_token_id=0,
    router_jitter_noise=0.0,
)  # fmt: skip


def tokens(count=3, rows=4, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 97, (rows, length), generator=generator)} for _ in range(count)]


def padded(**kwargs):
    """Rows of different length, filled with zeros on the right."""
    batches = tokens(**kwargs)
    for batch in batches:
        rows, length = batch["input_ids"].shape
        batch["attention_mask"] = (
            torch.arange(length) < torch.linspace(length // 3, length, rows).round()[:, None]
        ) * 1
        batch["input_ids"] = batch["input_ids"] * batch["attention_mask"]
    return batches


def pairs():
    targets = tokens(length=9, seed=7)
    return [{**b, "decoder_input_ids": t["input_ids"]} for b, t in zip(padded(), targets, strict=True)]


def images():
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(4, 3, 32, 32, generator=generator)} for _ in range(3)]


def sounds():
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_features": torch.randn(4, 8, 32, generator=generator), "decoder_input_ids": t["input_ids"]}
        for t in tokens(length=9)
    ]


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class ExpertBlock(nn.Module):
    """Top-1 routing over linears; the last expert is never chosen, and is called with no token or not at all."""

    def __init__(self, experts, calls_empty):
        super().__init__()
        self.router = nn.Linear(32, experts, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))
        self.calls_empty = calls_empty

    def forward(self, hidden_states):
        flat = hidden_states.flatten(0, 1)
        scores = self.router(F.layer_norm(flat, (32,)))
        scores[:, -1] = -1e9
        weight, chosen = scores.softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().flatten()
            if len(rows) or self.calls_empty:
                out.index_add_(0, rows, weight[rows, None] * expert(flat[rows]))
        return hidden_states + out.view_as(hidden_states)


class ExpertModel(nn.Module):
    """A mixture of experts that are linears, without transformers."""

    def __init__(self, config=None, calls_empty=False):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(97, 32), nn.LayerNorm(32), nn.Linear(32, 97, bias=False)
        self.layers = nn.ModuleList(ExpertBlock(4, calls_empty) for _ in range(2))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return tf.modeling_outputs.CausalLMOutput(logits=self.head(self.norm(x)))


CASES = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**GROUPED), tokens),
    "gpt2": (
        tf.GPT2LMHeadModel,
        tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
        tokens,
    ),
    "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**GROUPED, head_dim=8), tokens),
    "opt, padded": (
        tf.OPTForCausalLM,
        tf.OPTConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
                     max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0),
        padded,
    ),
    "mixtral": (
        tf.MixtralForCausalLM, tf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2), tokens
    ),
    "experts": (ExpertModel, None, tokens),
    "switch": (tf.SwitchTransformersForConditionalGeneration, SWITCH, pairs),
    "bert": (tf.BertModel, tf.BertConfig(**SMALL), padded),
    "bert, masked": (tf.BertForMaskedLM, tf.BertConfig(**SMALL), padded),
    "bert, one logit": (tf.BertForSequenceClassification, tf.BertConfig(**SMALL, num_labels=1), padded),
    "bert, questions": (tf.BertForQuestionAnswering, tf.BertConfig(**SMALL), padded),
    "distilbert": (
        tf.DistilBertModel, tf.DistilBertConfig(vocab_size=97, dim=32, n_layers=2, n_heads=4, hidden_dim=48), padded
    ),
    "roberta, classifier": (
        tf.RobertaForSequenceClassification, tf.RobertaConfig(**SMALL, initializer_range=0.2), padded
    ),
    "albert": (tf.AlbertForMaskedLM, ALBERT, padded),
    "t5": (tf.T5ForConditionalGeneration, T5, pairs),
    "t5, bare": (tf.T5Model, T5, pairs),
    "vit": (tf.ViTForImageClassification, tf.ViTConfig(**SIZES), images),
    "swin": (tf.SwinForImageClassification, SWIN, images),
    "whisper": (tf.WhisperForConditionalGeneration, WHISPER, sounds),
}  # fmt: skip


def build(case, seed=0):
    cls, config, make = CASES[case]
    torch.manual_seed(seed)
    return cls(copy.deepcopy(config)).eval(), make()


def settings(batches, **kwargs):
    """Short: one pass of each."""
    return Calibration(batches, **{"refine_epochs": 1, "distill_epochs": 1.0, "distill_learning_rate": 1e-3, **kwargs})


def bare(batches, **kwargs):
    return settings(batches, **{"refine_epochs": 0, "distill_epochs": 0, **kwargs})


def answer(model, batch):
    with torch.no_grad():
        return model(**batch)[0]


def inputs_of(model, names, batch):
    """What each named linear is given, in a run of the whole model."""
    found = {}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda _, args, n=n: found.setdefault(n, args[0]))
        for n in names
    ]
    answer(model, batch)
    for handle in handles:
        handle.remove()
    return found


def product(layer):
    return layer.U.weight.detach().double() @ layer.V.weight.detach().double()


# --- every architecture, the whole way


@pytest.mark.filterwarnings("ignore:no calibration token reached")
@pytest.mark.parametrize("case", CASES)
def test_every_architecture_is_converted(case):
    model, batches = build(case)
    dense = copy.deepcopy(model)
    model.train()
    next(model.parameters()).requires_grad_(False)
    unused = next(model.children())
    unused.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    before = {n: (p, p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    record = ConversionRecord()
    calibration = settings(batches)
    plan = convert(model, param_ratio=0.4, method="anchored", calibration=calibration, allocation="loss", record=record)

    assert torch.equal(torch.get_rng_state(), state)
    assert plan.param_ratio <= 0.4
    assert stored_form(model)[0] == plan.ranks
    assert len(plan.ranks) >= 4
    assert set(record.linears) == set(plan.ranks)
    factored = {f"{n}.weight" for n in plan.ranks} | set(plan.ranks)  # stacks of experts are parameters themselves
    after = dict(model.named_parameters())
    for name, (parameter, value, requires_grad) in before.items():
        if name not in factored:
            assert after[name] is parameter, name
            trained = value.dim() == 1 and requires_grad and block_of(model, name.rpartition(".")[0])
            assert trained or torch.equal(parameter, value), name
            assert parameter.requires_grad == requires_grad, name
            assert parameter.grad is None, name
    assert {n: m.training for n, m in model.named_modules() if n in modes} == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, layer in lowrank_layers(model):
        assert layer.U.training == layer.V.training == layer.training == modes[name]
        assert torch.isfinite(product(layer)).all()

    model.eval()
    wanted, found = answer(dense, batches[0]), answer(model, batches[0])
    assert torch.isfinite(found).all()
    assert not torch.equal(found, wanted)
    plain = copy.deepcopy(dense)
    convert(plain, plan)

    def distance(m):
        return sum(difference(m(**b), dense(**b), b).item() for b in batches)

    with torch.no_grad():
        assert distance(model) < distance(plain)


@pytest.mark.filterwarnings("ignore:no calibration token reached")
@pytest.mark.parametrize("case", CASES)
def test_at_full_rank_every_architecture_computes_what_it_did(case):
    model, batches = build(case)
    wanted = [answer(model, b) for b in batches]
    plan = make_plan(model, rank=1.0, keep_full_rank=True)
    record = ConversionRecord()
    convert(model, plan, calibration=settings(batches, distill_epochs=0, damping=1e-4), record=record)
    assert len(stored_form(model)[0]) == len(plan.linears)
    assert all(b.error_after <= b.error_before < 1e-3 for b in record.blocks)
    for batch, expected in zip(batches, wanted, strict=True):
        torch.testing.assert_close(answer(model, batch), expected, atol=1e-3, rtol=1e-3)


CHAINS = {
    "llama": [["model.layers.0", "model.layers.1"]],
    "gpt2": [["transformer.h.0", "transformer.h.1"]],
    "bert": [["encoder.layer.0", "encoder.layer.1"]],
    "albert": [],
    "mixtral": [["model.layers.0", "model.layers.1"]],
    "t5": [["encoder.block.0", "encoder.block.1"], ["decoder.block.0", "decoder.block.1"]],
    "whisper": [
        ["model.encoder.layers.0", "model.encoder.layers.1"], ["model.decoder.layers.0", "model.decoder.layers.1"]
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", [*CHAINS, "vit", "swin"])
def test_chains_and_what_enters_them(case):
    model, batches = build(case)
    names = [s.name for s in find_linears(model)]
    blocks = siblings(model, [b for n in names if (b := block_of(model, n))])
    chains = find_chains(model, blocks, batches[0])
    if case in CHAINS:
        assert chains == CHAINS[case]
    else:
        assert len(chains) == 1
        assert len(chains[0]) == 2
    for chain in chains:
        inputs = capture(model, chain, batches, Activations())
        for i, batch in enumerate(batches):
            hidden, seen = inputs.hidden[i], {}
            handles = [
                model.get_submodule(n).register_forward_hook(lambda m, a, out, n=n, seen=seen: seen.setdefault(n, out))
                for n in chain
            ]
            answer(model, batch)
            for handle in handles:
                handle.remove()
            for name in chain:
                with torch.no_grad():
                    hidden = inputs.calls[name][i](model.get_submodule(name), hidden)
                expected = seen[name] if isinstance(seen[name], torch.Tensor) else seen[name][0]
                assert torch.equal(hidden, expected), name


def test_linears_that_read_the_same_tensor_are_found():
    model, batches = build("llama")
    block = model.model.layers[0]
    inputs = capture(model, ["model.layers.0"], batches, Activations())
    linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    received = InputGroups()
    for name, module in linears.items():
        module.register_forward_pre_hook(lambda m, args, name=name: received.note(name, m, args))
    inputs.calls["model.layers.0"][0](block, inputs.hidden[0])
    assert [[n.rpartition(".")[2] for n in names] for names, _ in received.groups] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


# --- moments and masks


def test_moments_are_the_naive_sums():
    generator = torch.Generator().manual_seed(0)
    moments, inputs, cross = Moments(), torch.zeros(6, 6).double(), torch.zeros(6, 6).double()
    for rows, length in ((3, 5), (2, 7)):
        a, b = (torch.randn(rows, length, 6, generator=generator) for _ in range(2))
        mask = torch.randint(0, 2, (rows, length), generator=generator)
        moments.add(a, b, mask)
        for r in range(rows):
            for t in range(length):
                if mask[r, t]:
                    x, y = a[r, t].double(), b[r, t].double()
                    inputs, cross = inputs + torch.outer(x, x), cross + torch.outer(y, x)
    torch.testing.assert_close(moments.inputs, inputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moments.cross, cross, atol=1e-5, rtol=1e-5)
    count = moments.tokens
    moments.add(torch.empty(0, 6), torch.empty(0, 6))
    moments.add(a, b, torch.zeros_like(mask))
    assert moments.tokens == count
    nothing = Moments()
    nothing.add(torch.empty(0, 6), torch.empty(0, 6))
    assert nothing.inputs is None


def test_moments_of_other_tokens_are_not_crossed():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 4, generator=generator), torch.randn(3, 4, generator=generator)
    moments = Moments()
    moments.add(a, b)
    assert torch.equal(moments.cross, moments.inputs)
    moments.add(a, 2 * a)  # summed in place, and yet each of them once
    torch.testing.assert_close(moments.inputs, 2 * a.double().T @ a.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moments.cross, 3 * a.double().T @ a.double(), atol=1e-5, rtol=1e-5)


def test_moments_refuse_nan_by_name():
    for bad in (float("nan"), float("inf")):
        x = torch.ones(2, 3, 4)
        x[0, 0, 0] = bad
        with pytest.raises(NonFiniteError, match=r"the inputs of layers\.3\.q_proj hold NaN or infinity"):
            Moments().add(x, x, None, "layers.3.q_proj")
        mask = torch.ones(2, 3)
        mask[0, 0] = 0
        Moments().add(x, x, mask, "layers.3.q_proj")  # it is padding


def test_moments_of_the_whole_model():
    model, batches = build("bert")
    names = [s.name for s in find_linears(model)]
    moments = dense_moments(model, names, batches)
    for name in names:
        total = torch.zeros_like(moments[name].inputs)
        for batch in batches:
            x = inputs_of(model, [name], batch)[name].double()
            mask = batch["attention_mask"].bool() if x.dim() == 3 else torch.ones(len(x), dtype=torch.bool)
            total += x[mask].T @ x[mask]
        torch.testing.assert_close(moments[name].inputs, total, atol=1e-4, rtol=1e-5)


def test_moments_of_a_block_that_runs_for_every_layer():
    """Each of its calls counts, and none ends the pass before the last."""
    model, batches = build("albert")
    names = list(make_plan(model, rank=4).ranks)
    received = {n: [] for n in names}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda m, args, n=n: received[n].append(args[0]))
        for n in names
    ]
    for batch in batches:
        answer(model, batch)
    for handle in handles:
        handle.remove()
    moments = dense_moments(model, names, batches)
    for name in names:
        assert len(received[name]) == 3 * len(batches)  # layers
        total = 0
        for i, x in enumerate(received[name]):
            x = x.double()[batches[i // 3]["attention_mask"].bool()]
            total = total + x.T @ x
        torch.testing.assert_close(moments[name].inputs, total, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("method", ["activation", "anchored"])
def test_a_linear_that_runs_twice_in_a_block_is_fitted_once_to_both(method, monkeypatch):
    """DeBERTa's queries and keys read the hidden states, and the positions."""
    torch.manual_seed(0)
    model, batches = tf.DebertaV2Model(DEBERTA).eval(), padded()
    fitted, stock = [], Regression.__call__

    def watch(solver, weight, rank, name="weight", importance=None):
        fitted.append(name)
        return stock(solver, weight, rank, name, importance)

    monkeypatch.setattr(Regression, "__call__", watch)
    plan = convert(model, rank=4, method=method, calibration=bare(batches))
    assert sorted(fitted) == sorted(f"{n}.weight" for n in plan.ranks)


def test_moments_of_a_linear_that_runs_twice_are_those_of_both_calls():
    torch.manual_seed(0)
    model, batches = tf.DebertaV2Model(DEBERTA).eval(), tokens()
    calibration, name = bare(batches), "encoder.layer.0.attention.self.query_proj"
    total, calls = 0, []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda m, args: calls.append(args[0].flatten(0, -2).double())
    )
    for batch in batches:
        answer(model, batch)
    handle.remove()
    assert len(calls) == 2 * len(batches)
    for x in calls:
        total = total + x.T @ x
    entering = Stream(capture(model, ["encoder.layer.0"], batches, Activations()), calibration)
    groups, _ = _Block(model, "encoder.layer.0", {name: 4}, "activation", calibration, {})._look(entering)
    torch.testing.assert_close(groups[0].moments.inputs, total, atol=1e-4, rtol=1e-5)


def test_experts_share_no_moments():
    """Two may receive the same tokens in one batch, and others in the next."""
    received = InputGroups()
    x = torch.randn(5, 8)
    for name in (
        "layers.0.experts.3.gate",
        "layers.0.experts.3.up",
        "layers.0.experts.7.gate",
        "layers.1.experts.3.up",
    ):
        received.note(name, nn.Identity(), (x,))
    assert [names for names, _ in received.groups] == [
        ["layers.0.experts.3.gate", "layers.0.experts.3.up"], ["layers.0.experts.7.gate"], ["layers.1.experts.3.up"],
    ]  # fmt: skip


def test_which_mask_counts():
    encoder, decoder = torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0]])
    both = {"attention_mask": encoder, "decoder_attention_mask": decoder, "decoder_input_ids": decoder}
    assert torch.equal(token_mask(both, torch.ones(1, 3, 8)), encoder)
    assert torch.equal(token_mask(both, torch.ones(1, 2, 8), decoder=True), decoder)
    assert torch.equal(token_mask(both, torch.ones(1, 3, 8), decoder=True), encoder)  # keys of cross-attention
    assert token_mask(both, torch.ones(1, 4, 8)) is None
    assert torch.equal(token_mask(both, torch.ones(3, 8)), encoder[0])  # flattened
    # As many tokens on both sides, and only the encoder's are padded.
    same = {"attention_mask": encoder, "decoder_input_ids": torch.ones(1, 3)}
    assert token_mask(same, torch.ones(1, 3, 8), decoder=True) is None
    # "decoder" in the names of a model that has nothing else, such as OPT.
    assert torch.equal(token_mask({"attention_mask": encoder}, torch.ones(1, 3, 8), decoder=True), encoder)


@pytest.mark.parametrize("case", ["bert", "bert, masked", "albert", "t5"])
def test_padding_does_not_matter(case):
    model, batches = build(case)
    if case == "t5":  # the decoder is padded, too; as long as the encoder's, so that the masks can be mixed up
        targets = padded(seed=7)
        for batch, target in zip(batches, targets, strict=True):
            batch |= {f"decoder_{k}": v for k, v in target.items()}
    wider = []
    for batch in batches:
        rows = len(batch["input_ids"])
        wider.append({
            k: torch.cat([v, torch.full((rows, 11), 55 if k.endswith("ids") else 0)], 1) for k, v in batch.items()
        })  # fmt: skip
    other = copy.deepcopy(model)
    # Few ranks: past them, what is left of the spectrum is so small that rounding turns its directions.
    plan = make_plan(model, rank=4)
    narrow, wide = bare(batches, damping=0.1), bare(wider, damping=0.1)
    convert(model, plan, calibration=narrow)
    wide.importance[other] = narrow.importance[model]  # what is drawn for it depends on the shape
    convert(other, plan, calibration=wide)
    for name, layer in lowrank_layers(model):
        torch.testing.assert_close(product(layer), product(other.get_submodule(name)), atol=2e-4, rtol=1e-3, msg=name)


def test_the_error_of_a_decoder_block_counts_the_tokens_of_the_decoder():
    model, batches = build("t5")
    targets = padded(seed=7)
    for batch, target in zip(batches, targets, strict=True):  # as long as the encoder's, and padded in other rows
        batch |= {f"decoder_{k}": v.flip(0) for k, v in target.items()}
    dense, record = copy.deepcopy(model), ConversionRecord()
    convert(
        model,
        rank=4,
        target_modules=r"decoder\.block\.0\..*",
        method="anchored",
        calibration=bare(batches),
        record=record,
    )
    errors = []
    for batch in batches:
        left = []
        for m in (model, dense):
            handle = m.decoder.block[0].register_forward_hook(lambda _, a, out, left=left: left.append(out[0]))
            answer(m, batch)
            handle.remove()
        a, b = (x[batch["decoder_attention_mask"].bool()] for x in left)
        errors.append(((a - b).norm() / b.norm()).item())
    assert [b.name for b in record.blocks] == ["decoder.block.0"]
    assert record.blocks[0].error_before == pytest.approx(sum(errors) / 3, rel=1e-4)


# --- the methods


@pytest.mark.parametrize("method", ["activation", "anchored"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_method_is_its_naive_computation(make, method):
    """Group by group in float64: least squares onto what each linear really gets, with what is before it factored."""
    model, batches = make(), tokens()
    dense, naive, damping = make().double(), make().double(), 0.02
    calibration = bare(batches, damping=damping)
    plan = convert(model, rank=5, method=method, calibration=calibration)
    names = list(plan.ranks)
    importance = output_gradients(make(), names, batches, calibration.seed)
    stem = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
    stages = [(n.rpartition(".")[2] in stem and (n.split(".")[2], stem[n.rpartition(".")[2]])) or n for n in names]
    for stage in dict.fromkeys(stages):
        group = [n for n, s in zip(names, stages, strict=True) if s == stage]
        gathered = {n: ([], []) for n in group}
        for batch in batches:
            clean, noisy = inputs_of(dense, group, batch), inputs_of(naive, group, batch)
            for n in group:
                gathered[n][0].append(clean[n].flatten(0, -2).T)
                gathered[n][1].append((noisy if method == "anchored" else clean)[n].flatten(0, -2).T)
        for n in group:
            x, other = (torch.cat(parts, 1) for parts in gathered[n])
            extra = (damping * other.square().sum() / len(x)).sqrt() * torch.eye(len(x)).double()
            weight = dense_weight(dense.get_submodule(n))
            roots = (importance[n] / importance[n].mean()).sqrt().clamp_min(0.1)[:, None]
            wanted = naive_regression(roots * weight, 5, torch.cat([x, extra], 1), torch.cat([other, extra], 1)) / roots
            torch.testing.assert_close(product(model.get_submodule(n)), wanted, atol=1e-4, rtol=1e-3, msg=n)
            module = naive.get_submodule(n)
            # The reference goes on from what was found, so that rounding does not add up.
            found = product(model.get_submodule(n))
            module.weight.data.copy_(found.T if type(module).__name__ == "Conv1D" else found)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_without_data_it_is_the_truncated_svd(make):
    model, dense, record = make(), make(), ConversionRecord()
    plan = convert(model, rank=5, record=record)
    also = make()
    convert(also, rank=5, method="svd", calibration=bare(tokens()))
    for name in plan.ranks:
        u, s, v = torch.linalg.svd(dense_weight(dense.get_submodule(name)).double())
        wanted = (u[:, :5] * s[:5]) @ v[:5]
        torch.testing.assert_close(product(model.get_submodule(name)), wanted, atol=1e-6, rtol=1e-5)
        assert torch.equal(product(also.get_submodule(name)), product(model.get_submodule(name)))
        entry = record.linears[name]
        torch.testing.assert_close(torch.tensor(entry.spectrum).double(), s, rtol=1e-4, atol=1e-6)
        assert entry.weight_error == pytest.approx((s[5:].square().sum() / s.square().sum()).sqrt().item(), rel=1e-4)
        assert entry.output_error is None
    assert record.blocks == []


def test_refinement_lowers_the_error_of_each_block_and_moves_factors_only():
    model, batches = build("llama")
    record, rough = ConversionRecord(), ConversionRecord()
    other = copy.deepcopy(model)
    convert(other, rank=5, method="anchored", calibration=bare(batches), record=rough)
    tuned = settings(batches, refine_epochs=8, distill_epochs=0)
    convert(model, rank=5, method="anchored", calibration=tuned, record=record)
    assert [b.name for b in record.blocks] == ["model.layers.0", "model.layers.1"]
    assert record.blocks[0].error_before == pytest.approx(rough.blocks[0].error_before)
    for block, plain in zip(record.blocks, rough.blocks, strict=True):
        assert block.error_after < 0.97 * block.error_before
        assert block.error_after < 0.97 * plain.error_after
        assert plain.error_after == plain.error_before


@pytest.mark.parametrize("case", ["llama", "bert", "bert, one logit", "vit", "t5"])
def test_distillation_brings_the_outputs_together(case):
    model, batches = build(case)
    dense, other = copy.deepcopy(model), copy.deepcopy(model)
    rate = 1e-4 if case == "bert, one logit" else 1e-3  # there is little to gain
    tuned = settings(batches, refine_epochs=0, distill_epochs=8, distill_learning_rate=rate)
    convert(model, rank=5, calibration=tuned)
    convert(other, rank=5, calibration=bare(batches))
    with torch.no_grad():
        tuned, plain = (sum(difference(m(**b), dense(**b), b).item() for b in batches) for m in (model, other))
    assert tuned < 0.9 * plain


def test_distillation_counts_tokens_and_not_padding():
    model, batches = build("bert, masked")
    other, _ = build("bert, masked", seed=1)
    batch = batches[0]
    with torch.no_grad():
        found = difference(other(**batch), model(**batch), batch)
        rows = []
        for i in range(len(batch["input_ids"])):
            length = int(batch["attention_mask"][i].sum())
            row = batch["input_ids"][i : i + 1, :length]
            p, q = (m(input_ids=row).logits.double().log_softmax(-1) for m in (model, other))
            rows.append((p.exp() * (p - q)).sum(-1).flatten())
    assert found.item() == pytest.approx(torch.cat(rows).mean().item(), rel=1e-4)


def test_the_record_holds_what_the_naive_computation_gives():
    model, batches = build("llama")
    dense, record = copy.deepcopy(model).double(), ConversionRecord()
    plan = convert(model, rank=5, method="activation", calibration=bare(batches), record=record)
    converted = copy.deepcopy(model).double()
    for name in plan.ranks:
        weight = dense_weight(dense.get_submodule(name))
        lost = weight - product(model.get_submodule(name))
        # `activation` uses the inputs of the dense block behind the dense blocks before it.
        x = torch.cat([inputs_of(dense, [name], b)[name].flatten(0, -2) for b in batches])
        entry = record.linears[name]
        assert entry.weight_error == pytest.approx((lost.norm() / weight.norm()).item(), rel=1e-4)
        assert entry.output_error == pytest.approx(((x @ lost.T).norm() / (x @ weight.T).norm()).item(), rel=1e-3)
        assert entry.spectrum_index == tuple(range(1, min(weight.shape) + 1))
    assert record.blocks == []  # nothing has looked at the hidden states of the converted model
    model, record = copy.deepcopy(dense).float(), ConversionRecord()
    convert(model, plan, method="anchored", calibration=bare(batches), record=record)
    converted = copy.deepcopy(model).double()
    errors = []
    for batch in batches:
        with torch.no_grad():
            a, b = (m(**batch, output_hidden_states=True).hidden_states[1] for m in (converted, dense))
        errors.append(((a - b).norm() / b.norm()).item())
    assert record.blocks[0].error_before == pytest.approx(sum(errors) / 3, rel=1e-3)
    calibration = bare(batches, source="some text")
    data = record.to_dict(
        plan, command="c", base_model="m", method="anchored", allocation=None, calibration=calibration, seconds=1.23
    )
    assert data["method"] == "anchored"
    assert data["calibration"] == {"source": "some text", "tokens": 3 * 4 * 24}
    assert (data["refine_epochs"], data["distill_epochs"], data["seconds"]) == (0, 0, 1.2)
    again = ConversionRecord.from_dict(json.loads(json.dumps(data)))
    assert (again.linears, again.blocks, again.plan) == (record.linears, record.blocks, plan)
    assert (again.command, again.base_model, again.calibration) == ("c", "m", data["calibration"])
    assert again.facts["method"] == "anchored"


@pytest.mark.parametrize("guide", GUIDES)
def test_guides_hold_what_calibrated_factors_left_out(guide, ids):
    model, batches = build("llama")
    reference, other = model(ids).logits, copy.deepcopy(model)
    plan = convert(model, param_ratio=0.5, guide=guide, calibration=settings(batches), allocation="energy")
    torch.testing.assert_close(model(ids).logits, reference, atol=2e-5, rtol=1e-4)
    convert(other, plan, calibration=settings(batches, train_vectors=False))
    end_guidance(model)
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_bfloat16():
    model, batches = build("llama")
    model, dense = model.to(torch.bfloat16), copy.deepcopy(model)
    record = ConversionRecord()
    convert(model, param_ratio=0.5, calibration=settings(batches), allocation="loss", record=record)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(b.error_after <= b.error_before for b in record.blocks)
    plain = copy.deepcopy(dense)
    convert(plain, param_ratio=0.5)
    with torch.no_grad():
        found, rough = (
            sum(difference(m(**b), dense(**b), b).item() for b in batches) for m in (model, plain.to(torch.bfloat16))
        )
    assert found < rough


def test_it_is_the_same_each_time():
    first, second = build("llama")[0], build("llama")[0]
    for model in (first, second):
        torch.manual_seed(torch.seed())
        convert(model, param_ratio=0.5, calibration=settings(tokens()), allocation="loss")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_dropout_plays_no_part():
    """Neither in the ranks nor in the factors, whatever mode the model is in."""
    config = tf.BertConfig(**SMALL, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    torch.manual_seed(0)
    first = tf.BertModel(config).eval()
    second = copy.deepcopy(first).train()
    plans = [convert(m, param_ratio=0.5, calibration=settings(padded()), allocation="loss") for m in (first, second)]
    assert plans[0] == plans[1]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_evaluation_mode_ends_also_after_an_error():
    model = tiny_llama().train()
    model.model.layers[1].eval()
    modes = {n: m.training for n, m in model.named_modules()}

    def fail():
        with evaluating(model):
            assert not any(m.training for m in model.modules())
            model.model.layers[0].mlp.up_proj = LowRankLinear(32, 48, 4).eval()
            raise DataError("x")

    with pytest.raises(DataError):
        fail()
    assert {n: m.training for n, m in model.named_modules() if n in modes} == modes
    assert model.model.layers[0].mlp.up_proj.U.training


def test_a_linear_before_the_blocks_does_not_change_what_the_blocks_are_held_to():
    """The chain is fitted to the dense model, not to one whose first linear is factored already."""

    class Model(ExpertModel):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(32, 32)
            self.layers = nn.ModuleList(Residual() for _ in range(2))

        def forward(self, input_ids):
            x = self.first(self.embed(input_ids))
            for layer in self.layers:
                x = layer(x)
            return tf.modeling_outputs.CausalLMOutput(logits=self.head(self.norm(x)))

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(32, 32)

        def forward(self, x):
            return x + self.up(x).tanh()

    torch.manual_seed(0)
    model, batches, record = Model().eval(), tokens(), ConversionRecord()
    dense = copy.deepcopy(model)
    calibration = bare(batches)
    convert(model, rank=8, target_modules=["first", "up"], method="anchored", calibration=calibration, record=record)
    errors = []
    for batch in batches:
        with torch.no_grad():
            x, y = (m.layers[0](m.first(m.embed(batch["input_ids"]))) for m in (model, dense))
        errors.append(((x - y).norm() / y.norm()).item())
    assert record.blocks[0].error_after == pytest.approx(sum(errors) / 3, rel=1e-3)


# --- mixtures of experts


@pytest.mark.parametrize("calls_empty", [False, True])
def test_an_expert_that_no_token_reached_is_factorized_by_its_weight(calls_empty):
    torch.manual_seed(0)
    model = ExpertModel(calls_empty=calls_empty).eval()
    dense, record = copy.deepcopy(model), ConversionRecord()
    with pytest.warns(UserWarning, match=r"no calibration token reached layers\.0\.experts\.3\.up and 2 more"):
        plan = convert(model, rank=5, calibration=settings(tokens()), record=record)
    assert len(plan.ranks) == 2 * 4 * 3
    for leaf in ("up", "gate", "down"):
        name = f"layers.0.experts.3.{leaf}"
        u, s, v = torch.linalg.svd(dense.get_submodule(name).weight.double())
        torch.testing.assert_close(product(model.get_submodule(name)), (u[:, :5] * s[:5]) @ v[:5], atol=1e-6, rtol=1e-5)
        assert record.linears[name].output_error is None
    assert record.linears["layers.0.experts.0.up"].output_error is not None


def test_an_expert_that_only_a_later_batch_reaches_is_calibrated():
    torch.manual_seed(0)
    model = ExpertModel().eval()
    model.layers = model.layers[:1]
    router, embed = model.layers[0].router, model.embed
    with torch.no_grad():
        chosen = router(F.layer_norm(embed.weight, (32,)))[:, :3].argmax(-1)
    ids = [torch.arange(97)[chosen == i].repeat(4)[:24][None] for i in (0, 1, 2)]
    record = ConversionRecord()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert(
            model, rank=5, exclude_modules=[f"experts.3.{n}" for n in ("up", "gate", "down")],
            calibration=bare([{"input_ids": i} for i in ids]), record=record,
        )  # fmt: skip
    assert not [w for w in caught if "calibration token" in str(w.message)]
    assert len(record.linears) == 9
    assert all(e.output_error is not None for e in record.linears.values())


def test_tokens_that_a_router_chose_are_not_crossed_with_others():
    """Both models send as many tokens to an expert, but not the same ones in the same order."""
    model, batches = build("experts")
    entering = capture(model, ["layers.0"], batches, Activations())
    turned = ChainInputs(Activations(h.flip(1) for h in entering.hidden), entering.calls)
    calibration = bare(batches)
    name, router = "layers.0.experts.0.up", "layers.0.router"
    block = _Block(model, "layers.0", {name: 4, router: 2}, "anchored", calibration, {})
    dense, converted = Stream(entering, calibration), Stream(turned, calibration)
    groups, _ = block._look(dense)
    of = {n: group for group in groups for n in group.names}
    moments = block._moments(of[name], converted)
    assert 0 < moments.tokens < 3 * 4 * 24
    assert torch.equal(moments.cross, moments.inputs)
    everyone = block._moments(of[router], converted)  # all tokens, flattened: those are crossed
    assert everyone.tokens == 3 * 4 * 24
    assert not torch.allclose(everyone.cross, everyone.inputs)


@pytest.mark.parametrize("allocation", ["energy", "loss"])
def test_experts_that_no_token_reached_keep_the_rank_of_their_shape(allocation):
    model, batches = build("experts")
    plan = make_plan(model, param_ratio=0.6)
    assert not [n for n in squared_spectra(model, list(plan.ranks), settings(batches), allocation) if "experts.3" in n]
    with pytest.warns(UserWarning, match=r"do not reach \d+ of \d+ linears \(the first is layers.\d.experts.3.up\)"):
        allocated = allocate(model, plan, allocation, settings(batches))
    unreached = [n for n in plan.ranks if "experts.3" in n]
    assert unreached
    assert all(allocated.ranks[n] == plan.ranks[n] for n in unreached)
    assert allocated.factored_parameters <= plan.factored_parameters


# --- sensitivities


def naive_gradients(model, names, batch, drawn):
    """Per token and linear, by autograd on the outputs themselves: sum of squares."""
    outputs = {}
    handles = [
        model.get_submodule(n).register_forward_hook(lambda _, a, out, n=n: outputs.__setitem__(n, out)) for n in names
    ]
    logits = model(**batch).logits
    for handle in handles:
        handle.remove()
    loss = F.cross_entropy(logits.flatten(0, -2), drawn.flatten(), reduction="sum", ignore_index=-100)
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    return {n: sum(row.square() for row in g.flatten(0, -2)) for n, g in zip(outputs, gradients, strict=True)}


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert, masked", "t5"])
def test_output_gradients_are_those_of_autograd(case, monkeypatch):
    model, batches = build(case)
    names = list(make_plan(model, rank=4).ranks)
    for parameter in model.parameters():
        parameter.requires_grad_("norm" not in case)
    flags = [p.requires_grad for p in model.parameters()]
    drawn = []
    stock = F.cross_entropy

    def spy(logits, labels, **kwargs):
        drawn.append(labels)
        return stock(logits, labels, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", spy)
    found = output_gradients(model, names, batches, seed=3)
    monkeypatch.undo()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert len(drawn) == 3
    exact = copy.deepcopy(model).double()
    total, counted = dict.fromkeys(names, 0), 0
    for batch, labels in zip(batches, drawn, strict=True):
        if "attention_mask" in batch and case != "t5":
            assert torch.equal(labels == -100, batch["attention_mask"].flatten() == 0)
        else:
            assert (labels >= 0).all()
        counted += int((labels != -100).sum())
        total = {n: total[n] + g for n, g in naive_gradients(exact, names, batch, labels).items()}
    assert set(found) == set(names)
    for name in names:
        torch.testing.assert_close(found[name], total[name] / counted, rtol=1e-3, atol=1e-12, msg=name)
    # Labels are the model's own draws, by the seed.
    assert all(
        torch.equal(a, b)
        for a, b in zip(found.values(), output_gradients(model, names, batches, 3).values(), strict=True)
    )
    assert not torch.equal(found[names[0]], output_gradients(model, names, batches, 4)[names[0]])


@pytest.mark.parametrize("case", ["llama", "bert, masked", "t5"])
def test_gradients_are_taken_of_a_few_rows_at_a_time(case, monkeypatch):
    from lowrank_ft.conversion import sensitivity

    model, batches = build(case)
    names = list(make_plan(model, rank=4).ranks)
    rows, found = [], []
    model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    for most in (512, 1):
        monkeypatch.setattr(sensitivity, "_POSITIONS_AT_ONCE", most)
        rows.clear()
        found.append(output_importance(model, names, settings(batches, seed=3)))
    assert set(rows) == {1}
    for name in names:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-12, msg=name)


def test_labels_are_drawn_from_the_models_distribution(monkeypatch):
    from lowrank_ft.conversion.sensitivity import own_loss

    logits = torch.tensor([2.0, 0.0, -1.0, 1.0]).expand(1, 20_000, 4).clone().requires_grad_()
    seen = []
    stock = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda a, b, **k: seen.append(b) or stock(a, b, **k))
    _, counted = own_loss(tf.modeling_outputs.CausalLMOutput(logits=logits), {}, torch.Generator().manual_seed(0))
    assert counted == 20_000
    shares = torch.bincount(seen[0], minlength=4) / 20_000
    torch.testing.assert_close(shares, logits[0, 0].softmax(-1), atol=0.012, rtol=0)


@pytest.mark.parametrize("allocation", ["energy", "loss"])
def test_spectra_are_those_of_the_weighted_matrix(allocation):
    model, batches = build("llama")
    names = list(make_plan(model, rank=4).ranks)
    spectra = squared_spectra(model, names, settings(batches, seed=5), allocation)
    gradients = output_gradients(model, names, batches, 5)
    for name in names:
        x = torch.cat([inputs_of(model, [name], b)[name].flatten(0, -2).double() for b in batches])
        outputs = dense_weight(model.get_submodule(name)).double() @ x.T / len(x) ** 0.5
        if allocation == "loss":
            outputs = gradients[name].double().sqrt()[:, None] * outputs
        wanted = torch.linalg.svdvals(outputs).square()[: len(spectra[name])]
        wanted = wanted if allocation == "loss" else wanted / wanted.sum()
        torch.testing.assert_close(spectra[name], wanted, rtol=1e-3, atol=1e-5 * wanted[0].item())


def test_a_model_that_works_in_place_on_what_a_linear_gives():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

        def forward(self, x):
            return x + self.down(self.up(x).relu_())

    model, batches = build("experts")
    model.layers = nn.ModuleList(Block() for _ in range(2))
    plan = convert(model, param_ratio=0.6, calibration=settings(batches), allocation="loss")
    assert len(plan.linears) == 4


def test_loss_gives_ranks_where_they_matter():
    """Behind a gate that is shut, a linear is worth nothing."""
    model, batches = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-4)
    plan = allocate(model, make_plan(model, param_ratio=0.5), "loss", settings(batches))
    ranks = {p.name: p.rank or min(p.shape) for p in plan.linears}
    for leaf in ("up_proj", "gate_proj"):
        assert ranks[f"model.layers.1.mlp.{leaf}"] < ranks[f"model.layers.0.mlp.{leaf}"]


# --- text of the model's own


def test_self_written_text():
    model = tiny_llama()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_new_tokens = 3
    model.generation_config.eos_token_id = 2
    model.train()
    stock = model.generation_config
    state = torch.get_rng_state()
    first = sample_blocks(model, 5, 16, batch_size=2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.generation_config is stock
    assert first.shape == (5, 16)
    assert first.dtype == torch.long
    assert (first[:, 0] == 1).all()
    torch.manual_seed(99)
    assert torch.equal(sample_blocks(model, 5, 16, batch_size=2, seed=1), first)
    assert not torch.equal(sample_blocks(model, 5, 16, batch_size=2, seed=2), first)
    assert len(first.unique(dim=0)) == 5


@pytest.mark.parametrize("penalty", [1.0, 5.0])
def test_self_written_text_follows_the_models_distribution_past_the_end_of_text(penalty):
    model = tiny_llama()
    with torch.no_grad():  # every position: half end of text, half token 7
        model.lm_head.weight.zero_()
        model.lm_head = nn.Linear(32, 97)
        model.lm_head.weight.zero_()
        model.lm_head.bias.fill_(-1e9)
        model.lm_head.bias[[2, 7]] = 0.0
    model.generation_config.repetition_penalty = penalty
    model.generation_config.bad_words_ids = [[7]]
    written = sample_blocks(model, 40, 33)[:, 1:]
    assert set(written.unique().tolist()) == {2, 7}
    assert (written == 2).double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_self_written_text_begins_somewhere_without_a_first_token():
    for settings_, wanted in (({"bos_token_id": None}, {2}), ({"bos_token_id": None, "eos_token_id": [5, 2]}, {5})):
        assert set(sample_blocks(tiny_llama(**settings_), 8, 4)[:, 0].tolist()) == wanted
    model = tiny_llama(bos_token_id=None, eos_token_id=None)
    state = torch.get_rng_state()
    written = sample_blocks(model, 32, 4)
    assert len(written[:, 0].unique()) > 10
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("case", ["bert", "bert, masked", "t5", "vit", "whisper"])
def test_who_cannot_write_text_says_so(case):
    model, _ = build(case)
    with pytest.raises(DataError, match="cannot write its own calibration text; give --calibration-data FILE"):
        sample_blocks(model, 2, 8)


# --- storage and settings


def test_activations_on_disk_are_those_in_memory(tmp_path):
    tensors = [torch.randn(2, 3), torch.randn(3, 2).T, torch.randn(4).to(torch.bfloat16)]
    stored, kept = Activations(tensors, tmp_path), Activations(tensors)
    assert len(stored) == len(kept) == 3
    assert len(list(tmp_path.glob("activations-*/*.safetensors"))) == 3
    for a, b in zip(stored, kept, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    del stored, a, b
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["llama", "t5"])
def test_a_conversion_on_disk_is_that_in_memory_and_leaves_nothing(case, tmp_path):
    (model, batches), (other, _) = build(case), build(case)
    most = []

    class Watched(Calibration):
        def store(self):
            most.append(len(list(tmp_path.iterdir())))
            return super().store()

    convert(model, rank=4, calibration=Watched(batches, refine_epochs=1, activations_dir=tmp_path))
    convert(other, rank=4, calibration=settings(batches))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert list(tmp_path.iterdir()) == []
    # Two streams, what they move to, what refinement may give, what the linears of one block receive, and the inputs of
    # a chain that has not begun.
    assert 0 < max(most) <= 10


def test_a_conversion_that_fails_leaves_no_activations(tmp_path):
    model, batches = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(LowRankError):
        convert(model, rank=4, calibration=bare(batches, activations_dir=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_sizes():
    assert settings(tokens()).tokens == 3 * 4 * 24
    assert settings(padded()).tokens == sum(int(b["attention_mask"].sum()) for b in padded())
    # 32 x 32 pixels are four patches of 16 x 16, whatever patches the model has
    assert settings(images()).tokens == 3 * 4 * 4
    assert settings(sounds()).tokens == 3 * 4 * 32
    batches = tokens(count=70, rows=32, length=64)
    assert len(first_batches(batches, 65_536)) == 32
    assert len(first_batches(batches, 65_535)) == 31
    assert len(first_batches(batches, 1)) == 1
    assert len(first_batches(batches, 10**9)) == 70
    assert len(first_batches([{"pixel_values": torch.zeros(1, 3, 224, 224)}] * 100, 1000)) == 5


def test_bad_input():
    with pytest.raises(DataError, match="the calibration data hold no batch"):
        Calibration([])
    for name in ("damping", "refine_epochs", "distill_epochs", "refine_learning_rate"):
        with pytest.raises(ConfigError, match=rf"{name} is -1; it must be 0 or more"):
            Calibration(tokens(), **{name: -1})
    with pytest.raises(ConfigError, match="distill_epochs is nan; it must be 0 or more"):
        Calibration(tokens(), distill_epochs=float("nan"))
    model, batches = build("llama")
    with pytest.raises(ConfigError, match="method anchored needs calibration data"):
        convert(model, rank=4, method="anchored")
    with pytest.raises(ConfigError, match="allocation loss needs calibration data"):
        convert(model, rank=4, allocation="loss")
    with pytest.raises(ConfigError, match="allocation 'magic' is unknown; choose one of uniform, energy, loss"):
        convert(model, rank=4, allocation="magic", calibration=settings(batches))
    with pytest.raises(ConfigError, match="allocation 'uniform' is unknown; choose one of energy, loss"):
        squared_spectra(model, [], settings(batches), "uniform")
    assert not list(lowrank_layers(model))


@pytest.mark.parametrize("allocation", ["uniform", "loss"])
def test_not_a_number_is_named(allocation):
    model, batches = build("llama")
    model.model.layers[1].input_layernorm.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the inputs of model\.layers\.1\.self_attn\.q_proj hold NaN"):
        convert(model, rank=4, calibration=bare(batches), allocation=allocation)


def test_a_training_that_diverges_is_named():
    model, batches = build("llama")
    with pytest.raises(DivergedError, match=r"the loss of the factors is (nan|inf) after \d+ of \d+ steps"):
        convert(model, rank=4, calibration=settings(batches, refine_learning_rate=1e30, refine_epochs=4))
