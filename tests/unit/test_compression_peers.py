"""The other methods that benchmarks compare with do what their papers say."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_ft.factorization.plan import count_parameters
from lowrank_ft.factorization.targets import select_targets
from lowrank_ft.nn import lowrank_layers
from tests.benchmarks import common, peers


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(64, (2, 24), generator=generator)} for _ in range(8)]


def logits(model, batches):
    with torch.no_grad():
        return torch.cat([model(**b).logits for b in batches])


def problem():
    generator = torch.Generator().manual_seed(2)
    weight, x = (torch.randn(n, m, generator=generator).double() for n, m in ((12, 10), (10, 80)))
    ours = x + 0.5 * torch.randn(10, 80, generator=generator).double()
    return weight, x, ours


def test_anchored_is_the_least_error_of_its_rank():
    weight, x, ours = problem()
    factors = peers.anchored(weight, 4, ours @ ours.T, x @ ours.T)
    # All targets by least squares, and the best rank 4 of what they predict: reduced-rank regression.
    solution = torch.linalg.lstsq(ours.T, (weight @ x).T).solution.T
    left = torch.linalg.svd(solution @ ours).U[:, :4]
    best = left @ left.T @ solution
    torch.testing.assert_close(factors.U @ factors.V, best)


def test_mpifa_solves_for_mixed_targets(model, batches, monkeypatch):
    seen = []
    monkeypatch.setattr(peers, "_in_turn", lambda m, p, b, fit, refine: seen.append(fit))
    peers.mpifa(model, None, batches)
    weight, x, ours = problem()
    target = weight @ (0.25 * x + 0.75 * ours)
    moments = ours @ ours.T
    factors = seen[0](weight, 4, moments, x @ ours.T)
    error = torch.linalg.matrix_norm(target - factors.U @ factors.V @ ours)
    whitened = peers.anchored(weight, 4, moments, moments)
    assert error < torch.linalg.matrix_norm(target - whitened.U @ whitened.V @ ours)
    # Of this U no V is better.
    best = torch.linalg.lstsq(factors.U, target).solution @ torch.linalg.pinv(ours)
    torch.testing.assert_close(factors.V, best)


@pytest.mark.parametrize("method", [lambda *a: peers.aa_svd(*a, epochs=0), peers.mpifa], ids=["aa-svd", "mpifa"])
def test_full_ranks_change_nothing(model, batches, method):
    before = logits(model, batches)
    full = {s.name: min(s.shape) for s in select_targets(model)}
    method(model, SimpleNamespace(ranks=full), batches)
    assert any(lowrank_layers(model))
    torch.testing.assert_close(logits(model, batches), before, atol=1e-4, rtol=1e-4)


def test_refinement_brings_blocks_nearer_to_their_twins(model, batches):
    # With grouped queries this untrained model gives o_proj the same input twice, and no solution is small.
    model = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "num_key_value_heads": 4})).eval()
    plan, wanted = common.uniform_plan(model, 0.6), logits(model, batches)
    errors = []
    for epochs in (0, 25):
        found = copy.deepcopy(model)
        peers.aa_svd(found, plan, batches, epochs=epochs)
        errors.append((logits(found, batches) - wanted).square().mean().item())
    assert errors[1] < errors[0]


def test_modegpt_takes_nothing_at_ratio_1(model, batches):
    before = logits(model, batches)
    assert peers.modegpt(model, 1.0, batches) == count_parameters(model)
    torch.testing.assert_close(logits(model, batches), before, atol=1e-4, rtol=1e-4)


def test_modegpt_counts_what_it_takes(model, batches):
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    left = peers.modegpt(model, 0.7, batches)
    zeros = 0
    for block in model.model.layers:
        attention = block.self_attn
        for by_row in (attention.q_proj, attention.k_proj, attention.v_proj):
            zeros += int((by_row.weight == 0).all(1).sum()) * 32
        for by_column, matrices in ((attention.o_proj, 1), (block.mlp.down_proj, 3)):
            zeros += int((by_column.weight == 0).all(0).sum()) * 32 * matrices
    assert left == count_parameters(model) - zeros
    assert 0.6 < 1 - zeros / blocks < 0.8


def test_modegpt_keeps_a_rank_that_is_there(model, batches):
    """Values that use half of their dimensions need no more."""
    with torch.no_grad():
        for block in model.model.layers:
            value = block.self_attn.v_proj.weight.view(2, 8, 32)
            value[:, 4:] = value[:, :4].flip(1)
    before = logits(model, batches)
    seen = peers._moments_of_dense(model, batches)
    with torch.no_grad():
        for block, moments in zip(model.model.layers, seen, strict=True):
            c = moments["self_attn.v_proj"]
            peers._fewer_values(block.self_attn, c, 2, 4)
    torch.testing.assert_close(logits(model, batches), before, atol=1e-3, rtol=1e-3)


def test_shares_have_a_most():
    shares = peers._shared_out(1.6, torch.tensor([0.9, 0.08, 0.02]).double())
    assert shares[0] == 0.8
    torch.testing.assert_close(shares.sum(), torch.tensor(1.6).double())
    torch.testing.assert_close(shares[1] / shares[2], torch.tensor(4.0).double())
