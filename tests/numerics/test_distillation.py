"""The distillation loss against its formula in float64, term by term: values and gradients."""

import pytest
import torch

from lowrank_ft.data.examples import IGNORED
from lowrank_ft.errors import ConfigError
from lowrank_ft.evaluation import divergence
from lowrank_ft.training.distillation import summed_kl


def inputs(dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (scale * torch.randn(3, 7, 11, dtype=torch.float64, generator=generator) for _ in range(2))
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[0, 4:] = IGNORED
    labels[2] = IGNORED
    return logits.to(dtype).requires_grad_(), teacher.to(dtype), labels


def reference(logits, teacher, labels, temperature):
    """One position, one token of the vocabulary at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(logits.shape[0]):
        for position in range(logits.shape[1] - 1):
            if labels[row, position + 1] == IGNORED:
                continue
            student = (logits[row, position] / temperature).exp()
            wanted = (teacher[row, position] / temperature).exp()
            for token in range(logits.shape[2]):
                p, q = wanted[token] / wanted.sum(), student[token] / student.sum()
                total = total + p * (p.log() - q.log())
    return total


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("at_once", [4, 512])
def test_values_and_gradients(temperature, at_once, monkeypatch):
    monkeypatch.setattr(divergence, "_POSITIONS_AT_ONCE", at_once)
    logits, teacher, labels = inputs()
    expected = reference(logits, teacher, labels, temperature)
    (wanted,) = torch.autograd.grad(0.7 * expected, logits)
    found = summed_kl(logits, teacher, labels, temperature)
    (gradient,) = torch.autograd.grad(0.7 * found, logits)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)
    assert gradient[0, 3:].abs().max() == 0  # position 3 predicts the first token that does not count
    assert torch.autograd.gradcheck(lambda x: summed_kl(x, teacher, labels, temperature), logits)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_low_precision_is_computed_in_float32(dtype, tolerance):
    """Against float64 on the same rounded logits: what is left is float32, and the rounding of the gradient."""
    logits, teacher, labels = inputs(dtype)
    exact = logits.detach().double().requires_grad_()
    expected = reference(exact, teacher.double(), labels, 2.0)
    expected.backward()
    found = summed_kl(logits, teacher, labels, 2.0)
    found.backward()
    assert found.dtype == torch.float32
    assert logits.grad.dtype == dtype
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=1e-7)


def test_a_small_divergence_keeps_its_digits():
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(2, 60, 5000, generator=generator)
    logits = teacher + 2e-3 * torch.randn(2, 60, 5000, generator=generator)
    labels = torch.zeros(2, 60, dtype=torch.long)
    expected = summed_kl(logits.double(), teacher.double(), labels).item()
    assert expected / 118 < 3e-6
    assert summed_kl(logits, teacher, labels).item() == pytest.approx(expected, rel=1e-3)


def test_extreme_logits_stay_finite():
    logits, teacher, labels = inputs(torch.float32, scale=300.0)
    found = summed_kl(logits, teacher, labels)
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(logits.grad).all()
    assert summed_kl(teacher, teacher, labels).item() == pytest.approx(0, abs=1e-5)


def test_a_masked_entry_of_the_vocabulary_counts_nothing():
    logits, teacher, labels = inputs()
    expected = reference(logits[..., :9], teacher[..., :9], labels, 1.0)
    masked, wanted = logits.detach().clone(), teacher.clone()
    masked[..., 9:] = wanted[..., 9:] = -torch.inf
    masked.requires_grad_()
    found = summed_kl(masked, wanted, labels)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert masked.grad[..., 9:].abs().max() == 0


def test_nothing_counted_and_other_vocabularies():
    logits, teacher, labels = inputs()
    found = summed_kl(logits, teacher, torch.full_like(labels, IGNORED))
    found.backward()
    assert (found.item(), logits.grad.abs().max().item()) == (0, 0)
    with pytest.raises(ConfigError, match="predicts 11 different tokens and the teacher 10; distillation needs"):
        summed_kl(logits, teacher[..., :10], labels)
