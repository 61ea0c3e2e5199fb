"""Windows, losses and agreement against loops that are slow and obvious."""

import math

import pytest
import torch

from lowrank_ft.data.examples import IGNORED
from lowrank_ft.errors import ConfigError, DataError
from lowrank_ft.evaluation.perplexity import agreement, evaluate_blocks, sequences, to_blocks, windows
from tests.conftest import tiny_gpt2, tiny_llama


def text(tokens: int) -> torch.Tensor:
    return torch.randint(3, 97, (tokens,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def naive_losses(model, ids: torch.Tensor, block_size: int, stride: int) -> list[float]:
    """One forward pass per token, in float64, on what the first window that reaches the token has before it."""
    losses = []
    for position in range(1, len(ids)):
        start = 0
        while start + block_size <= position:
            start += stride
        if start == position:  # the first token of a window that overlaps with none
            continue
        logits = model(input_ids=ids[None, start:position]).logits[0, -1].double()
        losses.append(-logits.log_softmax(-1)[ids[position]].item())
    return losses


@pytest.mark.parametrize("tokens", [2, 15, 16, 17, 50, 61])
@pytest.mark.parametrize("stride", [1, 5, 16])
def test_strided_loss_is_that_of_a_loop_over_tokens(tokens, stride):
    model, ids = tiny_llama().double(), text(tokens)
    blocks, labels = windows(ids, 16, stride)
    for batch_size in (1, 3):
        found = evaluate_blocks(model, blocks, batch_size, labels=labels)
        expected = naive_losses(model, ids, 16, stride)
        assert found.tokens == len(expected)
        assert found.loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)  # summed_loss is float32


def test_a_cpu_gets_few_tokens_at_once(monkeypatch):
    """Logits of 8 x 1,024 tokens of a large vocabulary take gigabytes."""
    model, blocks = tiny_llama(), to_blocks(text(70), 10)
    whole = evaluate_blocks(model, blocks, 4)
    sizes = []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    monkeypatch.setattr("lowrank_ft.evaluation.perplexity._CPU_TOKENS", 25)
    found = evaluate_blocks(model, blocks, 4)
    assert sizes == [2, 2, 2, 1]
    assert found.loss == pytest.approx(whole.loss, rel=1e-6)
    assert agreement(model, model, blocks, 4).top1 == 1
    monkeypatch.setattr("lowrank_ft.evaluation.perplexity._CPU_TOKENS", 5)
    evaluate_blocks(model, blocks, 4)
    assert sizes[-1] == 1


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_every_token_but_the_first_counts_once(stride):
    ids = torch.arange(100, 140)
    blocks, labels = windows(ids, 8, stride)
    counted = labels[:, 1:][labels[:, 1:] != IGNORED]
    assert sorted(counted.tolist()) == list(range(101, 140))
    assert (labels[1:, : 8 - stride] == IGNORED).all()
    assert all(row.tolist() == list(range(100 + i * stride, 108 + i * stride)) for i, row in enumerate(blocks[:-1]))


def test_windows_that_do_not_overlap_are_the_blocks():
    ids = text(48)
    model = tiny_llama()
    blocks, labels = windows(ids, 16, 16)
    assert torch.equal(blocks, to_blocks(ids, 16))
    assert evaluate_blocks(model, blocks, labels=labels).loss == evaluate_blocks(model, to_blocks(ids, 16)).loss


@pytest.mark.parametrize("stride", [0, -1, 17])
def test_a_stride_out_of_range(stride):
    with pytest.raises(ConfigError, match=f"stride {stride} is out of range; .* at most the block size 16"):
        windows(text(40), 16, stride)


@pytest.mark.parametrize("stride", [None, 5, 16])
def test_every_sequence_begins_as_the_tokenizer_begins_a_text(stride):
    """With the token in front, the same tokens count as without; it itself does not, wherever it stands."""
    ids = text(60)
    ids[33] = 1  # another document begins
    blocks, labels = sequences(torch.cat([torch.tensor([1]), ids]), 16, stride, [1])
    plain, counted = sequences(ids, 15, None if stride is None else min(stride, 15))
    assert blocks.shape[1] == 16
    assert (blocks[:, 0] == 1).all()
    assert torch.equal(blocks[:, 1:], plain)
    expected = (plain if counted is None else counted).clone()
    expected[:, 0] = expected[expected == 1] = IGNORED
    assert (labels[:, 0] == IGNORED).all()
    assert torch.equal(labels[:, 1:], expected)
    assert evaluate_blocks(tiny_llama(), blocks, labels=labels).tokens == (expected[:, 1:] != IGNORED).sum()


def test_a_block_too_small_for_what_begins_it():
    with pytest.raises(ConfigError, match="block size 2 is too small .* it must be at least 3"):
        sequences(text(40), 2, None, [1])


def test_one_token_is_too_short():
    with pytest.raises(DataError, match="the text has 1 tokens"):
        windows(text(1), 16, 4)


@pytest.mark.parametrize("stride", [None, 4])
def test_one_token_between_a_begin_and_the_same_end_is_too_short(stride):
    """Some tokenizers have one token for both; it counts nowhere."""
    with pytest.raises(DataError, match="the text has 2 tokens, and none of them can be predicted"):
        sequences(torch.tensor([1, 5, 1]), 16, stride, [1])


@torch.no_grad()
def naive_agreement(model, baseline, blocks: torch.Tensor, labels: torch.Tensor) -> tuple[float, float, int]:
    kl, same, tokens = 0.0, 0, 0
    for row, wanted in zip(blocks, labels, strict=True):
        q = model(input_ids=row[None]).logits[0].double().softmax(-1)
        p = baseline(input_ids=row[None]).logits[0].double().softmax(-1)
        for position in range(len(row) - 1):
            if wanted[position + 1] == IGNORED:
                continue
            kl += sum(
                a * (math.log(a) - math.log(b)) for a, b in zip(p[position].tolist(), q[position].tolist(), strict=True)
            )
            same += int(p[position].argmax() == q[position].argmax())
            tokens += 1
    return kl / tokens, same / tokens, tokens


def sharpened(model):
    """With distributions that are far from uniform, so that the direction of the divergence shows."""
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model


@pytest.mark.parametrize("strided", [False, True])
def test_agreement_is_that_of_a_loop_over_tokens(strided):
    baseline, model = sharpened(tiny_llama(0)), sharpened(tiny_llama(0))
    with torch.no_grad():
        noise = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(3))
        model.lm_head.weight.add_(0.3 * noise)
    ids = text(60)
    blocks, labels = windows(ids, 16, 6) if strided else (to_blocks(ids, 16), None)
    found = agreement(model, baseline, blocks, batch_size=2, labels=labels)
    kl, top1, tokens = naive_agreement(model, baseline, blocks, blocks if labels is None else labels)
    assert found.tokens == tokens == (59 if strided else 45)
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.top1 == pytest.approx(top1)
    assert 0 < top1 < 1
    backwards, _, _ = naive_agreement(baseline, model, blocks, blocks if labels is None else labels)
    assert abs(kl - backwards) > 0.01 * kl


def test_agreement_of_models_that_mask_tokens():
    """Some set the logits of tokens that they never write to minus infinity."""
    baseline, model = sharpened(tiny_llama(0)), sharpened(tiny_llama(0))
    plain = agreement(model, baseline, to_blocks(text(60), 16))
    for m in (baseline, model):
        m.lm_head.register_forward_hook(
            lambda module, args, out: torch.cat([out, torch.full_like(out[..., :3], -torch.inf)], -1)
        )
    found = agreement(model, baseline, to_blocks(text(60), 16))
    assert (found.kl, found.top1) == (pytest.approx(plain.kl, abs=1e-6), plain.top1)


def test_a_model_agrees_with_itself():
    model = tiny_llama()
    found = agreement(model, model, to_blocks(text(60), 16))
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.top1 == 1


def test_modes_are_put_back_and_dropout_is_off():
    model, baseline = tiny_gpt2().train(), tiny_gpt2()
    found = agreement(model, baseline, to_blocks(text(60), 16))
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert model.training
    assert not baseline.training


def test_other_vocabularies_are_refused():
    with pytest.raises(ConfigError, match="the model predicts 97 different tokens and the baseline 101"):
        agreement(tiny_llama(), tiny_llama(vocab_size=101), to_blocks(text(60), 16))
