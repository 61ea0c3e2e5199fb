"""What a conversion is fitted to and judged by, how its learning rate is found, and what it says beforehand."""

import copy
import dataclasses
import importlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel

from lowrank_ft.checkpoints.source import Source
from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.convert import convert
from lowrank_ft.conversion.distill import difference, distill, mean_difference
from lowrank_ft.conversion.effort import EFFORTS
from lowrank_ft.conversion.estimate import Work, measure, peak_bytes, planned_bytes, stages
from lowrank_ft.conversion.factor_trainer import Best, FactorTrainer
from lowrank_ft.conversion.options import CalibrationOptions
from lowrank_ft.conversion.prepare import _hold_out, prepare
from lowrank_ft.conversion.record import ConversionRecord
from lowrank_ft.conversion.refine import refine_block
from lowrank_ft.errors import ConfigError, DivergedError
from lowrank_ft.factorization.plan import make_plan
from lowrank_ft.nn import lowrank_layers
from tests.chats import VOCABULARY, chat_tokenizer
from tests.conftest import tiny_llama


def batches(count=4, rows=2, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 97, (rows, length), generator=generator)} for _ in range(count)]


def converted(rank=5):
    dense = tiny_llama()
    model = copy.deepcopy(dense)
    convert(model, rank=rank, calibration=Calibration(batches(), refine_epochs=0, distill_epochs=0))
    return model, dense


# --- what is held out


def test_held_out_rows_are_not_fitted_to():
    packed = batches(count=9)
    fitted, held = _hold_out(packed)
    rows = [r for b in packed for r in b["input_ids"]]
    assert torch.equal(torch.cat([b["input_ids"] for b in [*fitted, *held]]), torch.stack(rows))
    assert sum(len(b["input_ids"]) for b in held) == 2
    few = batches(count=7)  # 14 rows: none is spared
    assert _hold_out(few) == (few, [])


def test_padded_batches_are_held_out_whole():
    padded = [{**b, "attention_mask": torch.ones_like(b["input_ids"])} for b in batches(count=8)]
    fitted, held = _hold_out(padded)
    assert (len(fitted), len(held)) == (7, 1)
    assert held[0] is padded[-1]
    assert _hold_out(padded[:7]) == (padded[:7], [])
    many = [padded[0]] * 100
    assert [len(part) for part in _hold_out(many)] == [96, 4]


def test_moments_and_refinement_see_the_fitted_batches_alone():
    data = batches(count=6)
    plain, other = tiny_llama(), tiny_llama()
    settings = {"refine_epochs": 1, "distill_epochs": 0, "fit_tokens": 4 * 48}
    convert(plain, rank=5, calibration=Calibration(data[:4], **settings))
    changed = [*data[:4], *batches(count=2, seed=9)]  # beyond fit_tokens
    convert(other, rank=5, calibration=Calibration(changed, **settings))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


def test_refinement_that_does_not_help_on_held_out_text_is_undone():
    """Trained on the first batches only, at a rate that ruins everything."""
    data = batches(count=6)
    record, rough = ConversionRecord(), ConversionRecord()
    model, plain = tiny_llama(), tiny_llama()
    wild = Calibration(data[:4], held_out=data[4:], refine_epochs=1, refine_learning_rate=3.0, distill_epochs=0)
    convert(model, rank=5, method="anchored", calibration=wild, record=record)
    convert(plain, rank=5, method="anchored", calibration=dataclasses.replace(wild, refine_epochs=0), record=rough)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert [b.error_after for b in record.blocks] == [b.error_before for b in rough.blocks]


# --- distillation


def test_distillation_keeps_the_state_that_is_best_on_held_out_text():
    model, dense = converted(rank=2)
    held = batches(count=2, seed=5)
    first = mean_difference(model, dense, held)
    before, after = distill(model, dense, batches(count=30), 4, 1e-3, held_out=held)
    assert before == pytest.approx(first)
    assert after < before
    assert mean_difference(model, dense, held) == pytest.approx(after, rel=1e-4)


def test_distillation_at_a_ruinous_rate_leaves_the_model_as_good_as_it_was():
    model, dense = converted()
    held = batches(count=2, seed=5)
    first = mean_difference(model, dense, held)
    before, after = distill(model, dense, batches(), 4, 10.0, held_out=held)
    assert after == before == pytest.approx(first)
    assert mean_difference(model, dense, held) == pytest.approx(first, rel=1e-3)  # balanced again, the same products


def test_the_best_state_of_16_bit_factors_is_kept():
    model, dense = converted()
    model.to(torch.bfloat16)
    held = batches(count=2, seed=5)
    before, after = distill(model, dense.to(torch.bfloat16), batches(), 4, 10.0, held_out=held)
    assert after == before
    assert mean_difference(model, dense, held) < 2 * before  # and not where the last step was


def test_gradients_of_parts_are_those_of_the_whole_batch(monkeypatch):
    import sys

    module = sys.modules["lowrank_ft.conversion.distill"]
    model, dense = converted()
    mask = torch.ones(4, 24, dtype=torch.long)
    mask[1, 10:] = 0
    batch = {"input_ids": torch.cat([b["input_ids"] for b in batches(count=2)]), "attention_mask": mask}
    gradients = []
    for most in (10_000, 24, 48):
        monkeypatch.setitem(module._POSITIONS_AT_ONCE, "cpu", most)
        trainer = FactorTrainer(model, 1, 1e-3)
        module._add_gradient(trainer, model, dense, batch)
        gradients.append([m.grad.clone() for m in trainer.masters])
    for parts in gradients[1:]:
        for a, b in zip(gradients[0], parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    loss = difference(model(**batch), dense(**batch), batch)
    wanted = torch.autograd.grad(loss, FactorTrainer(model, 1, 1e-3).parameters)
    for a, b in zip(gradients[0], wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_rate_is_the_one_whose_step_helps_most():
    from lowrank_ft.conversion.distill import _RATES, search_rate

    model, _ = converted()
    trainer = FactorTrainer(model, 1, 0.0)
    for master in trainer.masters:
        master.grad = torch.ones_like(master)
    best = Best(trainer.masters, 1.0)
    start = [m.clone() for m in trainer.masters]
    gone = []

    def loss():
        """Lowest near a step of 1e-4, by what the parameters are."""
        step = (start[0] - trainer.masters[0]).mean().item()
        gone.append(step)
        return abs(math.log(step / 1e-4))

    rate = search_rate(trainer, best, loss)
    assert rate == min(_RATES, key=lambda r: abs(math.log(r / 1e-4)))
    assert gone == pytest.approx(_RATES[: len(gone)], rel=1e-2)
    assert len(gone) == _RATES.index(rate) + 2  # one further, which was worse
    assert all(torch.equal(m, s) for m, s in zip(trainer.masters, start, strict=True))
    assert all(m.grad is None for m in trainer.masters)


def test_after_the_search_16_bit_parameters_are_what_they_were():
    from lowrank_ft.conversion.distill import search_rate

    model, _ = converted()
    trainer = FactorTrainer(model.bfloat16(), 1, 0.0)
    start = [p.detach().clone() for p in trainer.parameters]
    for master in trainer.masters:
        master.grad = torch.ones_like(master)
    losses = iter([3.0, 2.0, 1.0, 4.0])
    search_rate(trainer, Best(trainer.masters, 1.0), lambda: next(losses))
    assert all(torch.equal(p, s) for p, s in zip(trainer.parameters, start, strict=True))


@pytest.mark.parametrize(("length", "gathered"), [(2048, 1), (480, 5), (24, 8)])
def test_the_rate_is_found_by_many_tokens(length, gathered, monkeypatch):
    """Small batches are gathered to 4,000 tokens; where all are fewer, all count."""
    module = importlib.import_module("lowrank_ft.conversion.distill")
    model, dense = converted()
    seen, add = [], module._add_gradient
    monkeypatch.setattr(module, "_add_gradient", lambda *args: seen.append(args[-1]) or add(*args))
    monkeypatch.setattr(module, "search_rate", lambda trainer, *_: seen.append("search") or 1e-4)
    distill(model, dense, batches(count=8, length=length), 1)
    assert seen.index("search") == gathered
    assert len({id(batch) for batch in seen[:gathered]}) == gathered


@pytest.mark.parametrize(("epochs", "rate"), [(75, 3e-4), (74, 1e-4)])
def test_a_long_run_bears_the_next_rate(epochs, rate, monkeypatch):
    module = importlib.import_module("lowrank_ft.conversion.distill")
    model, dense = converted()
    monkeypatch.setattr(module, "search_rate", lambda *_: 1e-4)
    seen = []
    monkeypatch.setattr(FactorTrainer, "step", lambda trainer: seen.append(trainer.learning_rate))
    distill(model, dense, batches(count=4, length=8), epochs)
    assert seen[0] == pytest.approx(rate)


def test_a_loss_that_is_no_number_ends_distillation():
    model, dense = converted()
    next(p for n, p in dense.named_parameters() if "lm_head" in n or "embed" in n).data.fill_(float("nan"))
    with pytest.raises(DivergedError, match="the loss of the factors is nan after 0 of"):
        distill(model, dense, batches(), 1, 1e-3)


# --- norms and biases


def test_norms_are_trained_beside_factors_unless_a_guide_needs_them():
    data = batches()
    norm = "model.layers.0.input_layernorm.weight"
    for extra, moved in (({}, True), ({"train_vectors": False}, False)):
        model = tiny_llama()
        before = model.get_parameter(norm).detach().clone()
        settings = Calibration(data, distill_epochs=2, distill_learning_rate=1e-3, **extra)
        convert(model, rank=5, calibration=settings)
        assert torch.equal(model.get_parameter(norm), before) != moved
    model = tiny_llama()
    convert(model, rank=5, guide="residual", calibration=Calibration(data, distill_epochs=2))
    assert torch.equal(model.get_parameter(norm), before)


def test_frozen_norms_stay():
    model = tiny_llama()
    norm = model.get_parameter("model.layers.0.input_layernorm.weight").requires_grad_(False)
    before = norm.detach().clone()
    convert(model, rank=5, calibration=Calibration(batches(), refine_epochs=1, distill_epochs=2))
    assert torch.equal(norm, before)


def test_refinement_trains_on_the_batches_that_it_is_given():
    """A batch that is held out may hold anything."""
    model, _ = converted()
    block = model.model.layers[0]
    hidden = [torch.randn(2, 8, 32) for _ in range(3)]
    wanted = [*hidden[:2], torch.full((2, 8, 32), float("nan"))]

    def call(block, x):
        place = torch.arange(x.shape[1])[None]
        return block(x, position_embeddings=model.model.rotary_emb(x, place))

    refine_block(block, hidden, [call] * 3, wanted, [None] * 3, 1, 1e-3, batches=2)
    assert all(torch.isfinite(layer.U.weight).all() for _, layer in lowrank_layers(block))


# --- the options


def test_the_model_writes_its_share(tmp_path):
    model = tiny_llama(vocab_size=VOCABULARY, max_position_embeddings=128)
    model.save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i} of a text that is long enough for all of this" for i in range(3000)))
    source = Source(str(tmp_path))
    options = CalibrationOptions(calibration_data=str(text), calibration_tokens=8192, own_share=0.25)
    prepared = prepare(options, source, model)
    assert prepared.own_tokens == 2048
    assert sum(b["input_ids"].numel() for part in prepared.given for b in part) == 6144
    calibration = prepared.calibration(model)
    assert calibration.tokens + sum(b["input_ids"].numel() for b in calibration.held_out) == 8192
    assert sum(len(b["input_ids"]) for b in calibration.held_out) == 2 + 2  # of the text, and of the model's own
    assert prepare(dataclasses.replace(options, own_share=0.0), source, model).own_tokens == 0
    fast = prepare(dataclasses.replace(options, own_share=None, effort="fast"), source, model)
    assert (fast.own_tokens, fast.settings["distill_epochs"]) == (0, 0)


def test_several_data_share_the_tokens(tmp_path):
    """Equal shares, of each a part held out; the model's own text stands beside them."""
    model = tiny_llama(vocab_size=VOCABULARY, max_position_embeddings=128)
    model.save_pretrained(tmp_path)
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "a.txt").write_text("aaa " * 9000)
    (tmp_path / "z.jsonl").write_text("\n".join([json.dumps({"text": "zzz " * 200})] * 60))
    names = [str(tmp_path / name) for name in ("a.txt", "z.jsonl")]
    options = CalibrationOptions(calibration_data=names, calibration_tokens=12_288, own_share=0.25)
    prepared = prepare(options, Source(str(tmp_path)), model)
    assert [sum(b["input_ids"].numel() for b in part) for part in prepared.given] == [4608, 4608]
    assert (prepared.own_tokens, prepared.settings["source"]) == (3072, "a.txt, z.jsonl")
    letters = [set(tokenizer.decode(torch.cat([b["input_ids"].flatten() for b in part]))) for part in prepared.given]
    assert "a" in letters[0] - letters[1]
    assert "z" in letters[1] - letters[0]
    held_out = [row for b in prepared.calibration(model).held_out for row in b["input_ids"]]
    shown = [tokenizer.decode(row) for row in held_out]
    assert [sum(mark in text for text in shown) for mark in ("aaa aaa", "zzz zzz")] == [2, 2]
    assert len(shown) == 6


def test_encoders_of_text_are_distilled_on_more(tmp_path, monkeypatch):
    module, asked = importlib.import_module("lowrank_ft.conversion.prepare"), []
    monkeypatch.setattr(module, "read_batches", lambda *args: asked.append(args[4]) or batches())
    text = tmp_path / "text.txt"
    text.write_text("some text")
    encoder = BertModel(BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8))
    options = CalibrationOptions(calibration_data=str(text), own_share=0.0)
    source = SimpleNamespace(load_preprocessor=lambda model: None)
    for changed in ({}, {"effort": "fast"}, {"distill_epochs": 0.0}, {"calibration_tokens": 5000}):
        for model in (encoder, tiny_llama()):
            prepare(dataclasses.replace(options, **changed), source, model)
    assert asked == [262_144, 65_536, 16_384, 16_384, 65_536, 65_536, 5000, 5000]


@pytest.mark.parametrize(("options", "message"), [
    ({"effort": "quick"}, "--effort 'quick' is unknown; choose one of fast, default, best"),
    ({"own_share": 1.0}, "--own-share is 1.0; it must be at least 0 and below 1"),
    ({"own_share": -0.1}, "--own-share is -0.1"),
    ({"calibration_data": ["a.txt", "self"]}, "--calibration-data self stands beside a.txt; leave it out, and give the share"),
])  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ConfigError) as error:
        CalibrationOptions(**options)
    assert message in str(error.value)


# --- the estimate


def test_the_estimate_grows_with_the_work():
    model = tiny_llama()
    plan = make_plan(model, param_ratio=0.6)
    speed = measure(model, plan, batches()[0])
    assert speed.forward > 0
    assert speed.backward >= speed.forward
    assert speed.factorize > 0
    assert speed.activation_bytes > 0
    small = Work(written=0, fitted=10_000, refined=0, distilled=0, loss=False, anchored=False)
    names = [s.name for s in stages(speed, small)]
    assert names == ["weigh outputs", "factorize"]
    every = dataclasses.replace(small, written=1000, refined=10_000, distilled=10_000, loss=True, anchored=True)
    found = {s.name: s.seconds for s in stages(speed, every)}
    assert list(found) == ["write text", "weigh outputs", "allocate ranks", "factorize", "refine blocks", "distill"]
    assert all(seconds > 0 for seconds in found.values())
    twice = {s.name: s.seconds for s in stages(speed, dataclasses.replace(every, distilled=20_000))}
    assert twice["distill"] == pytest.approx(2 * found["distill"])
    assert peak_bytes(model, plan, speed, every) > peak_bytes(model, plan, speed, small)


def test_the_memory_planned_from_shapes_is_about_what_is_measured():
    model = tiny_llama()
    plan = make_plan(model, param_ratio=0.6)
    speed = measure(model, plan, {"input_ids": torch.arange(64).view(2, 32)})
    effort = EFFORTS["default"]
    work = Work(written=0, fitted=effort.fit_tokens, refined=0, distilled=effort.tokens, loss=True, anchored=False)
    planned = planned_bytes(model.to("meta"), plan, effort)
    assert planned["whole"] == pytest.approx(peak_bytes(model, plan, speed, work), rel=0.3)
    assert planned_bytes(model, plan, EFFORTS["fast"])["whole"] < planned["whole"]
    assert planned_bytes(model.bfloat16(), plan, effort)["whole"] < planned["whole"]


def test_efforts_are_in_order():
    fast, default, best = EFFORTS["fast"], EFFORTS["default"], EFFORTS["best"]
    assert fast.tokens < default.tokens < best.tokens
    assert fast.distill_epochs == 0
