"""A promise about what is lost: found by prediction, proved on held-out text, refused where no size keeps it."""

import math
from types import SimpleNamespace

import pytest
import torch
from lowrank_ft_cli.options import promise_of
from torch.nn import functional as F

from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.promise import Promise, convert_within, mean_loss, plan_at, smallest_ratio
from lowrank_ft.conversion.sensitivity import squared_spectra
from lowrank_ft.errors import ConfigError, DataError, PlanError
from lowrank_ft.factorization.plan import make_plan
from tests.conftest import tiny_llama


def data(seed=0, count=6):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 97, (4, 24), generator=generator)} for _ in range(count)]


def calibration(**settings):
    return Calibration(data(), held_out=data(seed=7, count=2), refine_epochs=0, distill_epochs=0, **settings)


def sharp_llama():
    """Weights large enough that what is lost can be measured."""
    model = tiny_llama()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(6)
    return model


def test_mean_loss_is_the_naive_one():
    model = tiny_llama()
    batch = data()[0]
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 15:] = 0
    found = mean_loss(model, [{**batch, "attention_mask": mask}])
    losses = []
    for row, length in zip(batch["input_ids"], mask.sum(1).tolist(), strict=True):
        with torch.no_grad():
            logits = model(input_ids=row[None, :length]).logits[0].double()
        losses += F.cross_entropy(logits[:-1], row[1:length], reduction="none").tolist()
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize(("measure", "most"), [("kl", 0.02), ("loss", 0.02)])
def test_the_promise_is_kept_on_the_held_out_text(measure, most):
    model, settings, said = sharp_llama(), calibration(), []
    before = [p.detach().clone() for p in model.parameters()]
    base = mean_loss(model, settings.held_out)
    kept = convert_within(model, Promise(measure, most, "--max 0.02"), settings, "activation", {}, say=said.append)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    if measure == "loss":
        found = mean_loss(kept.model, settings.held_out) - base
    else:
        found = 0.0
        for batch in settings.held_out:
            with torch.no_grad():
                p, q = (m(**batch).logits.double().log_softmax(-1) for m in (model, kept.model))
            found += (p.exp() * (p - q)).sum(-1).mean().item() / len(settings.held_out)
    assert kept.found == pytest.approx(found, rel=1e-3, abs=1e-6)
    assert found <= most
    assert len(kept.plan.ranks) > 0
    assert kept.plan.param_ratio < 1
    assert "should lose" in said[0]
    assert "kept" in said[-1] or any("kept" in line for line in said)


def test_a_tighter_promise_needs_a_larger_model():
    model, settings = sharp_llama(), calibration()
    sizes = [
        convert_within(model, Promise("kl", most, "--max-kl"), settings, "activation", {}).plan.param_ratio
        for most in (0.3, 0.01)
    ]
    assert sizes[0] < sizes[1]


def test_a_promise_that_no_size_keeps():
    with pytest.raises(PlanError, match=r"no size keeps --max-kl 1e-12 \(0\.0000 nats per token\)"):
        convert_within(sharp_llama(), Promise("kl", 1e-12, "--max-kl 1e-12"), calibration(), "activation", {})


def test_without_held_out_text_there_is_no_proof():
    with pytest.raises(DataError, match="--max-loss 5% is judged by held-out text"):
        convert_within(tiny_llama(), Promise("loss", 0.05, "--max-loss 5%"), Calibration(data()), "activation", {})


def test_the_smallest_ratio_is_where_the_prediction_crosses():
    model = sharp_llama()
    names = list(make_plan(model, param_ratio=0.5).ranks)
    spectra = squared_spectra(model, names, calibration(), "loss")
    most = plan_at(model, spectra, 0.5, {})[1]
    ratio = smallest_ratio(model, spectra, most, {}, 0.02)
    assert plan_at(model, spectra, ratio, {})[1] <= most
    assert plan_at(model, spectra, ratio - 0.02, {})[1] > most
    assert smallest_ratio(model, spectra, -1.0, {}, 0.02) is None


def flags(**given):
    names = ("max_loss", "max_kl", "rank", "param_ratio", "energy", "plan", "rank_pattern", "method", "allocation")
    return SimpleNamespace(**{**dict.fromkeys(names), **given})


@pytest.mark.parametrize(("typed", "most"), [("5%", math.log(1.05)), ("0.05", math.log(1.05)), ("100%", math.log(2))])
def test_the_loss_is_read_as_a_rise_of_perplexity(typed, most):
    assert promise_of(flags(max_loss=typed)) == Promise("loss", pytest.approx(most), f"--max-loss {typed}")
    assert promise_of(flags()) is None
    assert promise_of(flags(max_kl=0.1)) == Promise("kl", 0.1, "--max-kl 0.1")


@pytest.mark.parametrize(("given", "message"), [
    ({"max_loss": "much"}, "--max-loss is much; it must be a number above 0, such as 5%"),
    ({"max_loss": "-5%"}, "--max-loss is -5%; it must be a number above 0, such as 5%"),
    ({"max_loss": "5"}, "--max-loss is 5, which lets perplexity rise by 500%; for 5 % write 5%"),
    ({"max_kl": 0.0}, "--max-kl is 0.0; it must be a number above 0, such as 0.1"),
    ({"max_kl": math.nan}, "--max-kl is nan"),
    ({"max_loss": "5%", "rank": 8}, "--max-loss finds the size; leave --rank out"),
    ({"max_kl": 0.1, "plan": "p.json"}, "--max-kl finds the size; leave --plan out"),
    ({"max_loss": "5%", "method": "svd"}, "--max-loss needs calibration and allocation by loss"),
])  # fmt: skip
def test_bad_promises(given, message):
    with pytest.raises(ConfigError) as error:
        promise_of(flags(**given))
    assert message in str(error.value)
