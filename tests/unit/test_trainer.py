"""The loop in one process: schedules, accumulation, the drop, evaluation, best weights, refusals."""

import copy
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import get_peft_model
from torch.nn import functional as F

from lowrank_ft.conversion.convert import convert
from lowrank_ft.costs.flops import step_cost
from lowrank_ft.data.examples import StepBatches, pack
from lowrank_ft.errors import ConfigError, DivergedError, OutputError, TrainingStateError
from lowrank_ft.evaluation.perplexity import Evaluation, summed_loss
from lowrank_ft.integrations.peft import LowRankConfig
from lowrank_ft.nn import compact_state_dict, guided_layers, set_alpha
from lowrank_ft.pretraining.options import PretrainArguments
from lowrank_ft.schedule import alpha_at, keeps_guide, lr_factor_at
from lowrank_ft.training import TrainArguments, Trainer, resume
from lowrank_ft.training.arguments import parse_args
from lowrank_ft.training.metrics import read_metrics
from lowrank_ft.training.resume import find_checkpoints, load_optimizer_tensors, optimizer_tensors
from lowrank_ft.training.step import OptimizerStep
from tests.conftest import tiny_llama

BLOCK = 16


pytestmark = pytest.mark.usefixtures("fresh_accelerate", "no_picture")


@pytest.fixture
def data():
    # A pattern that can be learned: each token is followed by its successor.
    return pack((np.arange(40 * BLOCK) % 90 + 3).astype(np.int32), BLOCK)


def guided(guide="residual", rank=8):
    model = tiny_llama()
    convert(model, rank=rank, guide=guide)
    return model


def arguments(tmp_path, **overrides):
    options = dict(
        output_dir=str(tmp_path / "run"), max_steps=8, guided_ratio=0.5, per_device_train_batch_size=4,
        learning_rate=3e-3, logging_steps=1, weight_decay=0.0, seed=0,
    )  # fmt: skip
    kind = PretrainArguments if {"guide_mode", "fixed_flops"} & overrides.keys() else TrainArguments
    return kind(**{**options, **overrides})


def records(tmp_path):
    return [e for e in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in e]


def distilled(on_other_text):
    """What a trainer with ``distill_weight`` takes beside the rest: the dense model, and perhaps other text."""
    other = pack(np.random.default_rng(0).integers(3, 97, 13 * 12).astype(np.int32), 12) if on_other_text else None
    return {"teacher": tiny_llama(), "distill_data": other}


@pytest.mark.parametrize("guide", ["residual", "dense"])
def test_it_learns_follows_the_schedule_and_drops_the_guide(tmp_path, data, guide):
    model = guided(guide)
    Trainer(model, arguments(tmp_path, max_steps=40), data).train()
    entries = records(tmp_path)
    assert entries[-1]["loss"] < 0.8 * entries[0]["loss"]
    alphas = [(1 + math.cos(math.pi * k / 20)) / 2 if k < 20 else 0.0 for k in range(40)]
    assert [e["alpha"] for e in entries] == pytest.approx(alphas)
    assert not any(guided_layers(model))
    events = [e for e in read_metrics(tmp_path / "run" / "metrics.jsonl") if e.get("event") == "end_guidance"]
    assert [(e["step"], e["freed_bytes"] > 0) for e in events] == [(20, True)]


def test_accumulation_and_batch_size_give_the_same_losses(tmp_path, data):
    losses = []
    for i, (batch, accumulation) in enumerate([(8, 1), (4, 2), (2, 4)]):
        args = arguments(tmp_path / str(i), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
        Trainer(guided("dense"), args, data).train()
        losses.append([e["loss"] for e in records(tmp_path / str(i))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)


@pytest.mark.parametrize("on_other_text", [False, True])
def test_accumulation_and_batch_size_give_the_same_distillation(tmp_path, data, on_other_text):
    found = []
    for i, (batch, accumulation) in enumerate([(8, 1), (4, 2), (2, 4)]):
        args = arguments(
            tmp_path / str(i), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            distill_weight=0.6, distill_temperature=2.0,
        )  # fmt: skip
        Trainer(guided(), args, data, **distilled(on_other_text)).train()
        found.append([e[k] for e in records(tmp_path / str(i)) for k in ("loss", "distill_loss")])
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)
    assert found[0] == pytest.approx(found[2], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("on_other_text", [False, True])
def test_the_first_step_of_distillation_is_the_formula(tmp_path, data, on_other_text):
    """Losses and the norm of the gradient, from plain torch in float64 on the same examples."""
    weight, temperature, batch = 0.3, 3.0, 4
    model, parts = guided(), distilled(on_other_text)

    def first_batch(source):
        indices = next(iter(StepBatches(len(source), batch, 1, seed=0, rank=0, world_size=1, first_step=0)))
        return torch.stack([source[i]["input_ids"] for i in indices])

    train = first_batch(data)
    other = first_batch(parts["distill_data"]) if on_other_text else train
    exact, teacher = copy.deepcopy(model).double(), tiny_llama().double()
    set_alpha(exact, 0.0)
    loss = F.cross_entropy(exact(train).logits[:, :-1].flatten(0, 1), train[:, 1:].flatten())
    p = (teacher(other).logits[:, :-1] / temperature).softmax(-1)
    q = (exact(other).logits[:, :-1] / temperature).softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1).mean()
    ((1 - weight) * loss + weight * temperature**2 * kl).backward()
    norm = sum(w.grad.square().sum() for w in exact.parameters() if w.grad is not None).sqrt()

    options = dict(max_steps=1, guided_ratio=0.0, distill_weight=weight, distill_temperature=temperature)
    Trainer(model, arguments(tmp_path, **options), data, **parts).train()
    entry = records(tmp_path)[0]
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert entry["distill_loss"] == pytest.approx(kl.item(), rel=1e-4)
    assert entry["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_distillation_brings_the_model_nearer_to_the_teacher_and_leaves_that_as_it_is(tmp_path, data):
    parts = distilled(True)
    before = {k: v.clone() for k, v in parts["teacher"].state_dict().items()}
    Trainer(guided(), arguments(tmp_path, max_steps=40, distill_weight=1.0), data, **parts).train()
    unguided = [e["distill_loss"] for e in records(tmp_path) if e["alpha"] == 0]
    assert unguided[-1] < 0.8 * unguided[0]
    assert all(torch.equal(before[k], v) for k, v in parts["teacher"].state_dict().items())
    assert not parts["teacher"].training
    assert all(p.grad is None for p in parts["teacher"].parameters())


def test_distillation_in_mixed_precision(tmp_path, data):
    args = arguments(tmp_path, mixed_precision="bf16", gradient_checkpointing=True, distill_weight=0.5)
    Trainer(guided(), args, data, **distilled(False)).train()
    exact = arguments(tmp_path / "exact", distill_weight=0.5)
    AcceleratorState._reset_state(reset_partial_state=True)
    Trainer(guided(), exact, data, **distilled(False)).train()
    found, expected = ([e["distill_loss"] for e in records(p)] for p in (tmp_path, tmp_path / "exact"))
    assert found == pytest.approx(expected, rel=0.1, abs=1e-3)


def test_bad_distillation(tmp_path, data):
    on = arguments(tmp_path, distill_weight=0.5)
    teacher = tiny_llama()
    cases = [
        (on, {}, "distill_weight is 0.5 and there is no teacher"),
        (on, {"distill_data": data}, "there is no teacher"),
        (on, {"teacher": tiny_llama(vocab_size=98)}, "predicts 97 different tokens and the teacher 98"),
        (arguments(tmp_path), {"teacher": teacher}, "a teacher is given, and distill_weight 0 would not use it"),
        (arguments(tmp_path), {"distill_data": data}, "distill_data is given, and distill_weight 0 would not"),
    ]
    for args, options, message in cases:
        with pytest.raises(ConfigError, match=message):
            Trainer(guided(), args, data, **options)
    with pytest.raises(ConfigError, match="shares parameters"):
        Trainer(teacher, on, data, teacher=teacher)
    for bad in ({"distill_weight": 1.1}, {"distill_weight": -0.1}, {"distill_weight": math.nan}):
        with pytest.raises(ConfigError, match=r"distill_weight is .*; it must be 0 to 1"):
            arguments(tmp_path, **bad)
    for temperature in (0, -1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="distill_temperature is .* above 0"):
            arguments(tmp_path, distill_temperature=temperature)


def test_other_distillation_is_not_resumed(tmp_path, data):
    options = dict(distill_weight=0.5, save_steps=2)
    Trainer(guided(), arguments(tmp_path, **options), data, **distilled(True)).train()
    again = {**options, "resume_from_checkpoint": "auto"}
    cases = [
        ({**again, "distill_weight": 0.4}, distilled(True), r"distill_weight 0\.5 -> 0\.4"),
        ({**again, "distill_temperature": 2.0}, distilled(True), r"distill_temperature 1\.0 -> 2\.0"),
        (again, distilled(False), "distill_data .* -> None"),
        (again, {**distilled(True), "teacher": tiny_llama(seed=1)}, "teacher 'crc32 .* -> 'crc32"),
    ]
    for changed, parts, message in cases:
        with pytest.raises(TrainingStateError, match=message):
            Trainer(guided(), arguments(tmp_path, **changed), data, **parts).train()


def test_stochastic_guidance_sets_the_gates_of_every_step_and_learns(tmp_path, data):
    model = guided("dense")
    layers = [layer for _, layer in guided_layers(model)]
    calls = [0] * len(layers)
    for i, layer in enumerate(layers):
        layer.guide.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    args = arguments(tmp_path, max_steps=40, guide_mode="stochastic", gradient_accumulation_steps=2, seed=9)
    Trainer(model, args, data).train()
    # Twice a step, for the gate is that of the step and not of the forward pass.
    kept = [sum(keeps_guide(9, k, i, alpha_at(k, 20)) for k in range(20)) for i in range(len(layers))]
    assert calls == [2 * n for n in kept]
    losses = [e["loss"] for e in records(tmp_path)]
    assert losses[-1] < 0.8 * losses[0]
    assert not any(guided_layers(model))


def test_fixed_flops_chooses_a_guided_phase_that_is_repeated_once(tmp_path, data):
    for guide_mode in ("full", "stochastic"):
        args = PretrainArguments(output_dir=str(tmp_path), fixed_flops=True, max_steps=400, guide_mode=guide_mode)
        trainer = Trainer(guided("dense", rank=6), args, data)
        assert trainer.guided_steps > 20
        assert trainer.max_steps - 400 == pytest.approx(trainer.guided_steps, abs=1)
    scratch = PretrainArguments(output_dir=str(tmp_path), max_steps=8)
    assert Trainer(guided(), scratch, data).guided_steps == 4


def test_fixed_flops_adds_steps_that_repeat_the_guided_data(tmp_path, data):
    """By the FLOPs of the paper's rule, scores of attention included; the learning rate's schedule spans all steps."""
    seen = []
    model = guided(rank=5)
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True)
    cost = step_cost(model)
    scores = 3 * 2 * BLOCK * 2 * model.config.hidden_size  # two layers, queries and values as wide as the model
    Trainer(model, arguments(tmp_path, fixed_flops=True), data).train()
    spare = 8 * cost.dense - 8 * cost.factored - 4 * cost.guide
    added = math.floor(spare / (cost.factored + scores))
    assert added > 1
    start = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert (start["guided_steps"], start["repeated_steps"], start["max_steps"]) == (4, added, 8 + added)
    assert len(seen) == 8 + added
    for i in range(added):
        assert torch.equal(seen[8 + i], seen[i % 4])
    assert not torch.equal(seen[4], seen[0])
    entries = records(tmp_path)
    assert [e["alpha"] > 0 for e in entries] == [True] * 4 + [False] * (4 + added)
    rates = [e["learning_rate"] for e in entries]
    assert rates == pytest.approx([3e-3 * lr_factor_at(k, 8 + added) for k in range(8 + added)])


def test_bad_guide_options(tmp_path, data):
    plain = tiny_llama()
    convert(plain, rank=8)
    for options, message in (
        ({"guide_mode": "stochastic"}, "guide_mode stochastic needs a guided phase, and this"),
        ({"fixed_flops": True}, "fixed_flops needs a guided phase, and this"),
    ):
        with pytest.raises(ConfigError, match=f"{message} model has no guide"):
            Trainer(plain, arguments(tmp_path, **options), data)
        with pytest.raises(ConfigError, match=f"{message} run has no guided step"):
            Trainer(guided(), arguments(tmp_path, guided_ratio=0.0, **options), data)
    with pytest.warns(UserWarning, match="guided_ratio 0.1 of 2 steps rounds to no guided step"):
        Trainer(guided(), arguments(tmp_path, guided_ratio=0.1, max_steps=2), data)
    with pytest.raises(ConfigError, match="guide_mode 'some' is unknown; choose one of full, stochastic"):
        arguments(tmp_path, guide_mode="some")
    with pytest.raises(ConfigError, match="the dense run has no teacher"):
        arguments(tmp_path, fixed_flops=True, distill_weight=0.5)
    with pytest.raises(ConfigError, match="fixed_flops: the guided run costs"):
        Trainer(guided("dense"), arguments(tmp_path, guided_ratio=1.0, fixed_flops=True), data)
    adapter = get_peft_model(tiny_llama(), LowRankConfig(r=4, guide="residual"))
    with pytest.raises(ConfigError, match="this model has those of a PEFT adapter"):
        Trainer(adapter, arguments(tmp_path, fixed_flops=True), data)
    for flags in (["--guide-mode", "stochastic"], ["--fixed-flops"]):  # of training from scratch alone
        with pytest.raises(ConfigError, match=f"there is no option {flags[0]}"):
            parse_args(["--model", "m", *flags])


def test_another_guide_mode_is_not_resumed(tmp_path, data):
    Trainer(guided(), arguments(tmp_path, save_steps=2), data).train()
    again = dict(resume_from_checkpoint="auto", guide_mode="stochastic")
    with pytest.raises(TrainingStateError, match="guide_mode 'full' -> 'stochastic'"):
        Trainer(guided(), arguments(tmp_path, **again), data).train()


def test_uneven_replies_count_by_token_not_by_batch(tmp_path):
    """Two micro-batches with 1 and 15 counted tokens: the loss is the mean over 16 tokens."""
    counted = np.zeros(4 * BLOCK, dtype=bool)
    counted[1] = True
    counted[BLOCK + 1 : 2 * BLOCK] = True
    base = pack((np.arange(4 * BLOCK) % 90 + 3).astype(np.int32), BLOCK)
    data = type(base)(base.ids, base.starts[:3], counted)
    model = guided()
    expected = 0.0
    with torch.no_grad():
        for i in range(2):
            example = data[i]
            logits = model(input_ids=example["input_ids"][None]).logits
            expected += summed_loss(logits, example["labels"][None]).item()
    args = arguments(
        tmp_path, max_steps=1, guided_ratio=1.0, per_device_train_batch_size=1, gradient_accumulation_steps=2
    )
    Trainer(model, args, data).train()
    assert records(tmp_path)[0]["loss"] == pytest.approx(expected / 16, rel=1e-4)


def test_gradient_checkpointing_and_mixed_precision_run_alike(tmp_path, data):
    losses = {}
    for name, options in {
        "plain": {}, "checkpointing": {"gradient_checkpointing": True}, "bf16": {"mixed_precision": "bf16"},
    }.items():  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)
        Trainer(guided(), arguments(tmp_path / name, **options), data).train()
        losses[name] = [e["loss"] for e in records(tmp_path / name)]
    assert losses["plain"] == pytest.approx(losses["checkpointing"], rel=1e-5)
    assert losses["plain"] == pytest.approx(losses["bf16"], rel=0.05)
    assert losses["plain"] != losses["bf16"]


def test_evaluation_is_of_the_compact_model_even_while_guided(tmp_path, data):
    train, held_out = data.split(6)
    seen = {}

    def look(step, trainer):
        if step == 2:
            fresh = tiny_llama()
            convert(fresh, rank=8)
            fresh.load_state_dict(compact_state_dict(trainer._bare))
            blocks = torch.stack([held_out[i]["input_ids"] for i in range(len(held_out))])
            with torch.no_grad():
                seen["loss"] = summed_loss(fresh(blocks).logits, blocks).item() / (6 * (BLOCK - 1))
            seen["guided"] = any(guided_layers(trainer._bare))

    Trainer(guided(), arguments(tmp_path, eval_steps=2), train, held_out, on_step_end=look).train()
    entries = [e for e in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in e]
    assert [e["step"] for e in entries] == [0, 2, 4, 6, 8]
    assert seen["guided"]
    assert entries[1]["eval_loss"] == pytest.approx(seen["loss"], rel=1e-5)


def test_the_best_weights_are_kept(tmp_path, data):
    train, held_out = data.split(6)
    states = {}

    def remember(step, trainer):
        states[step] = {k: v.clone() for k, v in compact_state_dict(trainer._bare).items()}

    # A learning rate that wrecks the model after the warm-up: the best evaluation is an early one.
    args = arguments(tmp_path, eval_steps=1, learning_rate=0.5, warmup_ratio=1.0, max_steps=6)
    trainer = Trainer(guided(), args, train, held_out, on_step_end=remember)
    model = trainer.train()
    assert trainer.best_step is not None
    assert trainer.best_step < 6
    losses = {e["step"]: e["eval_loss"] for e in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in e}
    assert min(losses, key=losses.get) == trainer.best_step
    if trainer.best_step:
        for name, value in model.state_dict().items():
            assert torch.equal(value, states[trainer.best_step][name]), name


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path, data, monkeypatch):
    """Neither the first one nor that of a checkpoint: every later number is better."""
    losses = iter([math.nan, 3.0, math.nan, 2.0, 4.0, math.nan])
    monkeypatch.setattr(Trainer, "evaluate", lambda self: Evaluation(next(losses), 1, 1.0))
    options = dict(eval_steps=1, save_steps=4, load_best_model_at_end=True, max_steps=4)
    trainer = Trainer(guided(), arguments(tmp_path, **options), *data.split(4))
    trainer.train()
    assert (trainer.best_loss, trainer.best_step) == (2.0, 3)

    path = tmp_path / "run" / "checkpoints" / "step-00000004" / "trainer_state.json"
    path.write_text(path.read_text().replace('"best_loss": 2.0', '"best_loss": NaN'))
    again = Trainer(guided(), arguments(tmp_path, **options, resume_from_checkpoint="auto"), *data.split(4))
    again.train()
    assert (again.best_loss, again.best_step) == (None, None)


def test_only_the_newest_checkpoints_stay(tmp_path, data):
    Trainer(guided(), arguments(tmp_path, save_steps=2, save_total_limit=2), data).train()
    assert [p.name for p in find_checkpoints(tmp_path / "run")] == ["step-00000006", "step-00000008"]
    files = {p.name for p in find_checkpoints(tmp_path / "run")[0].iterdir()}
    assert files == {
        "model.safetensors",
        "optimizer.safetensors",
        "rng-0.safetensors",
        "config.json",
        "trainer_state.json",
    }


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds the names of open files in /proc")
def test_a_checkpoint_is_on_the_disk_before_the_older_one_goes(tmp_path, data, monkeypatch):
    """Names relative to the run's folder, in the order in which they are synced, renamed and removed."""
    events, home = [], tmp_path.resolve()
    stock = {name: getattr(module, name) for module, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree"))}

    def named(path):
        found = Path(path).resolve()
        return found.relative_to(home).as_posix() if found.is_relative_to(home) else ""

    def watch(module, event, place=named):
        def watched(*given, **options):
            events.append((event, place(given[0])))
            return stock[event](*given, **options)

        monkeypatch.setattr(module, event, watched)

    Trainer(guided(), arguments(tmp_path, save_steps=4, max_steps=4), data).train()
    watch(os, "fsync", lambda handle: named(os.readlink(f"/proc/self/fd/{handle}")))
    watch(os, "replace")
    watch(shutil, "rmtree")
    monkeypatch.setattr("lowrank_ft.checkpoints.atomic._exchange", lambda *_: False)

    folder = tmp_path / "run" / "checkpoints"
    draft = folder / ".step-00000008.partial"
    shutil.copytree(folder / "step-00000004", draft)
    files = {f"run/checkpoints/{draft.name}/{p.name}" for p in draft.iterdir()}
    resume.commit(draft, folder / "step-00000008", keep=1)
    written, rest = events[: len(files)], [e for e in events[len(files) :] if e[1] != named(draft) or e[0] != "rmtree"]
    assert {path for _, path in written} == files
    assert rest == [
        ("fsync", named(draft)), ("replace", named(draft)), *(("fsync", p) for p in ("run/checkpoints", "run", ".")),
        ("rmtree", "run/checkpoints/step-00000004"),
    ]  # fmt: skip

    events.clear()
    resume.write_best(tmp_path / "run", tiny_llama(), Accelerator(), False, 7)
    best = "run/checkpoints/best"
    assert [e for e in events if e[0] != "rmtree"][-9:] == [
        ("fsync", f"{best}/.draft"), ("fsync", best), ("replace", f"{best}/.draft/model.safetensors"), ("fsync", best),
        ("replace", f"{best}/.draft/best.json"), *(("fsync", p) for p in (best, "run/checkpoints", "run", ".")),
    ]  # fmt: skip
    assert {path for event, path in events if event == "fsync"} >= {
        f"{best}/.draft/{name}" for name in ("model.safetensors", "best.json")
    }


def test_a_run_that_goes_on_from_an_earlier_checkpoint_forgets_the_later_ones(tmp_path, data, capsys):
    """Else `auto` would go on from those, after a kill, and the new ones would be counted as the oldest."""
    Trainer(guided(), arguments(tmp_path, save_steps=2, save_total_limit=9), data).train()
    seen = {}

    def look(step, trainer):
        seen[step] = [int(p.name[5:]) for p in find_checkpoints(tmp_path / "run")]

    early = str(tmp_path / "run" / "checkpoints" / "step-00000004")
    args = arguments(tmp_path, save_steps=2, save_total_limit=2, resume_from_checkpoint=early)
    Trainer(guided(), args, data, on_step_end=look).train()
    assert seen == {5: [2, 4], 6: [4, 6], 7: [4, 6], 8: [6, 8]}
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: removed")]
    assert told == ["note: removed step-00000006, step-00000008: the run goes on from step-00000004"]


def test_a_checkpoint_that_has_just_been_written_stays(tmp_path, data):
    """Others in the same folder may have higher numbers."""
    Trainer(guided(), arguments(tmp_path, save_steps=4), data).train()
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "step-00000004", folder / ".step-00000005.partial")
    resume.commit(folder / ".step-00000005.partial", folder / "step-00000005", keep=1)
    assert [p.name for p in find_checkpoints(tmp_path / "run")] == ["step-00000005"]


def test_the_checkpoint_of_another_run_does_not_run_over_this_one(tmp_path, data):
    options = dict(save_steps=2, save_total_limit=9)
    for name in ("one", "two"):
        Trainer(guided(), arguments(tmp_path / name, **options), data).train()
    two = tmp_path / "two" / "run"
    (two / "model.safetensors").write_text("weights")
    early = tmp_path / "one" / "run" / "checkpoints" / "step-00000004"
    options |= dict(resume_from_checkpoint=str(early))
    before = {p: p.read_bytes() for p in two.rglob("*") if p.is_file()}
    again = Trainer(guided(), arguments(tmp_path / "two", **options), data)
    with pytest.raises(
        OutputError, match="run holds an earlier run; add --resume-from-checkpoint auto to resume it, --over"
    ):
        again.train()
    assert {p: p.read_bytes() for p in two.rglob("*") if p.is_file()} == before

    again = Trainer(guided(), arguments(tmp_path / "two", **options, overwrite_output_dir=True), data)
    again.train()
    assert [p.name for p in find_checkpoints(two)] == ["step-00000006", "step-00000008"]
    assert [e["step"] for e in records(tmp_path / "two")] == [5, 6, 7, 8]
    assert not (two / "model.safetensors").exists()
    assert len(find_checkpoints(tmp_path / "one" / "run")) == 4
    Trainer(guided(), arguments(tmp_path / "new", **options), data).train()  # a folder of its own is fine

    into = arguments(tmp_path, **options, output_dir=str(early), overwrite_output_dir=True)
    with pytest.raises(OutputError, match="the run reads .*step-00000004, which is in --output-dir"):
        Trainer(guided(), into, data).train()
    assert (early / "model.safetensors").exists()


def test_optimizer_state_goes_by_name():
    model = guided("dense")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(3, 12)[None]).logits.sum().backward()
    optimizer.step()
    tensors = optimizer_tensors(model, optimizer)
    other = torch.optim.AdamW(list(model.parameters())[::-1])
    load_optimizer_tensors(model, other, tensors)
    for parameter, state in optimizer.state.items():
        assert all(torch.equal(other.state[parameter][k], v) for k, v in state.items())
    with pytest.raises(TrainingStateError, match="optimizer state for ghost"):
        load_optimizer_tensors(model, other, {**tensors, "exp_avg.ghost": torch.zeros(1)})


def test_a_run_of_other_settings_is_not_resumed(tmp_path, data):
    Trainer(guided(), arguments(tmp_path, save_steps=2), data).train()
    with pytest.raises(TrainingStateError, match=r"learning_rate 0\.003 -> 0\.1"):
        Trainer(guided(), arguments(tmp_path, learning_rate=0.1, resume_from_checkpoint="auto"), data).train()
    (tmp_path / "none" / "run").mkdir(parents=True)
    for name in ("metrics.jsonl", "config.json"):
        (tmp_path / "none" / "run" / name).write_text("{}\n")
    again = arguments(tmp_path / "none", resume_from_checkpoint="auto")
    with pytest.raises(TrainingStateError, match="no checkpoint to resume from; add --overwrite-output-dir to start"):
        Trainer(guided(), again, data).train()


@pytest.mark.parametrize("wanted", ["auto", "true", True])
def test_a_job_that_may_be_started_again_has_one_command_line(tmp_path, data, wanted):
    """The first time there is nothing to resume, the second time there is."""
    options = dict(save_steps=2, max_steps=4, resume_from_checkpoint=wanted)
    Trainer(guided(), arguments(tmp_path, **options), data).train()
    first = len(records(tmp_path))
    again = Trainer(guided(), arguments(tmp_path, **options), data)
    again.train()
    assert first > 0
    assert again.starting_point()[1].step == 4


@pytest.mark.parametrize(
    ("left", "overwrite", "begins"),
    [
        (["metrics.jsonl", "tokenizer.json", "run.json"], False, True),
        (["metrics.jsonl", "checkpoints/.step-00000002.partial/model.safetensors", "checkpoints/best/best.json"], False, True),
        (["metrics.jsonl", "config.json"], False, False),
        (["metrics.jsonl", "config.json"], True, True),
        (["metrics.jsonl", "checkpoints/step-00000002/model.safetensors"], False, False),
        (["model.safetensors"], False, False),
        (["checkpoints/mine.pt"], False, False),
    ],
)  # fmt: skip
def test_a_job_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path, data, left, overwrite, begins):
    for name in left:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("{}\n")
    args = arguments(tmp_path, max_steps=2, resume_from_checkpoint="auto", overwrite_output_dir=overwrite)
    trainer = Trainer(guided(), args, data)
    if not begins:
        with pytest.raises(TrainingStateError, match="no checkpoint to resume from"):
            trainer.starting_point()
        return
    trainer.train()
    assert len(records(tmp_path)) == 2
    assert not (tmp_path / "run" / "checkpoints" / ".step-00000002.partial").exists()


def test_the_best_weights_of_a_killed_run_are_not_taken_for_those_of_the_resumed_one(tmp_path, data):
    """It was killed after its last checkpoint, and after it had written the weights of a later evaluation."""
    options = dict(
        save_steps=2, eval_steps=1, max_steps=4, load_best_model_at_end=True, learning_rate=0.5, max_grad_norm=0.0
    )
    Trainer(guided(), arguments(tmp_path, **options), *data.split(4)).train()
    best = tmp_path / "run" / "checkpoints" / "best" / "best.json"
    best.write_text(best.read_text().replace('"step": 0', '"step": 3'))
    again = Trainer(guided(), arguments(tmp_path, **options, resume_from_checkpoint="auto"), *data.split(4))
    with pytest.warns(UserWarning, match="best does not hold the weights of step 0; those of the last step are kept"):
        again.train()
    assert again.best_step is None


def test_a_checkpoint_of_the_guided_phase_needs_a_guide(tmp_path, data):
    Trainer(guided(), arguments(tmp_path, save_steps=2, save_total_limit=9), data).train()
    model = tiny_llama()
    convert(model, rank=8)
    early = str(tmp_path / "run" / "checkpoints" / "step-00000002")
    trainer = Trainer(model, arguments(tmp_path, resume_from_checkpoint=early), data)
    with pytest.raises(TrainingStateError, match=r"guided_steps 4 -> 0"):
        trainer.train()


def test_other_ranks_are_not_resumed(tmp_path, data):
    Trainer(guided(), arguments(tmp_path, save_steps=8), data).train()
    model = tiny_llama()
    convert(model, rank=6, guide="residual")
    with pytest.raises(TrainingStateError, match="resume with the same shapes and ranks"):
        Trainer(model, arguments(tmp_path, save_steps=8, resume_from_checkpoint="auto"), data).train()


def test_an_earlier_run_is_not_run_over(tmp_path, data):
    Trainer(guided(), arguments(tmp_path), data).train()
    with pytest.raises(OutputError, match="holds an earlier run"):
        Trainer(guided(), arguments(tmp_path), data).train()
    Trainer(guided(), arguments(tmp_path, overwrite_output_dir=True), data).train()


@pytest.mark.parametrize("name", ["checkpoints/important.pt", "README.md", "model.safetensors", "index.json"])
def test_files_of_others_are_not_run_over(tmp_path, data, name):
    mine = tmp_path / "run" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("x")
    name = mine.relative_to(tmp_path / "run").parts[0]
    with pytest.raises(OutputError, match=f"holds {name}, and a run wants"):
        Trainer(guided(), arguments(tmp_path), data).train()
    for more in ({}, {"resume_from_checkpoint": "auto"}):
        again = arguments(tmp_path, overwrite_output_dir=True, **more)
        with pytest.raises(
            OutputError, match=f"holds {name}, and --overwrite-output-dir replaces nothing but runs and"
        ):
            Trainer(guided(), again, data).train()
    assert mine.read_text() == "x"


@pytest.mark.parametrize(
    ("config", "ours"),
    [
        ({"quantization_config": {"quant_method": "lowrank"}}, True),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, False),
        ({"model_type": "llama"}, False),
    ],
)
def test_overwriting_replaces_a_compact_checkpoint_and_no_other_model(tmp_path, data, config, ours):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config))
    (run / "model.safetensors").write_text("x")
    trainer = Trainer(guided(), arguments(tmp_path, overwrite_output_dir=True, max_steps=2), data)
    if ours:
        trainer.train()
    else:
        with pytest.raises(OutputError, match=r"holds config\.json, and --overwrite-output-dir replaces nothing but"):
            trainer.train()
    assert (run / "model.safetensors").exists() == (not ours)


@pytest.mark.parametrize("records_of_it", ["", '{"step": 1, "loss": 2.5}\n'])
def test_a_run_that_is_killed_while_it_removes_another_can_begin_anew(tmp_path, data, monkeypatch, records_of_it):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"quantization_config": {"quant_method": "lowrank"}}')
    (run / "model.safetensors").write_text("x")
    if records_of_it:
        (run / "metrics.jsonl").write_text(records_of_it)
    args = arguments(tmp_path, overwrite_output_dir=True, max_steps=2)
    unlink = Path.unlink

    def die(path, *given, **options):
        if path.name == "model.safetensors":
            raise KeyboardInterrupt
        unlink(path, *given, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", die)
        Trainer(guided(), args, data).train()
    assert not (run / "config.json").exists()
    assert (run / "metrics.jsonl").read_text() == records_of_it  # weights never lie beside the records of another run
    Trainer(guided(), args, data).train()
    assert not (run / "model.safetensors").exists()


def test_overwriting_removes_nothing_but_checkpoints_of_runs(tmp_path, data):
    for name in ("important.pt", "step-00000003/model.safetensors", ".step-00000004.partial/x", "best/x", "steps/x"):
        path = tmp_path / "run" / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    Trainer(guided(), arguments(tmp_path, overwrite_output_dir=True), data).train()
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["important.pt", "steps"]


def test_a_second_training_in_the_same_folder_is_refused(tmp_path, data):
    trainer = Trainer(guided(), arguments(tmp_path, save_steps=4), data)
    trainer.starting_point()
    trainer.train()
    with pytest.raises(OutputError, match="holds an earlier run"):
        trainer.train()
    assert find_checkpoints(tmp_path / "run")


def test_an_output_folder_that_cannot_be_made_is_refused_before_training(tmp_path, data):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputError, match=f"cannot be made: {tmp_path / 'file'} is no folder"):
            Trainer(guided(), arguments(tmp_path, output_dir=str(folder)), data).train()


def test_a_mount_point_is_refused_before_training(tmp_path, data, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: str(path) == str(tmp_path / "run"))
    with pytest.raises(OutputError, match="run is a mount point, .*; name a folder inside it"):
        Trainer(guided(), arguments(tmp_path), data).train()


def test_overwriting_forgets_the_earlier_runs_checkpoints(tmp_path, data):
    Trainer(guided(), arguments(tmp_path, save_steps=4), data).train()
    seen = {}

    def look(step, trainer):
        seen[step] = [p.name for p in find_checkpoints(tmp_path / "run")]

    args = arguments(tmp_path, save_steps=2, overwrite_output_dir=True)
    Trainer(guided(), args, data, on_step_end=look).train()
    assert seen[1] == []
    assert seen[2] == ["step-00000002"]


def test_another_guide_or_other_data_is_not_resumed(tmp_path, data):
    Trainer(guided(), arguments(tmp_path, save_steps=2, save_total_limit=9), data).train()
    early = str(tmp_path / "run" / "checkpoints" / "step-00000002")
    with pytest.raises(TrainingStateError, match=r"guides \['residual'\] -> \['dense'\]"):
        Trainer(guided("dense"), arguments(tmp_path, resume_from_checkpoint=early), data).train()
    other = pack(data.ids[::-1].copy(), BLOCK)
    with pytest.raises(TrainingStateError, match="train_data .* crc32"):
        Trainer(guided(), arguments(tmp_path, resume_from_checkpoint=early), other).train()


def test_the_launchers_accumulation_does_not_divide_again(tmp_path, data, monkeypatch):
    norms = []
    for i, steps in enumerate(("1", "4")):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        AcceleratorState._reset_state(reset_partial_state=True)
        Trainer(guided(), arguments(tmp_path / str(i), max_steps=2), data).train()
        norms.append([e["grad_norm"] for e in records(tmp_path / str(i))])
    assert norms[0] == norms[1]


def test_nor_does_that_of_an_accelerator_of_ones_own(tmp_path, data):
    norms = []
    for steps in (1, 4):
        AcceleratorState._reset_state(reset_partial_state=True)
        own = Accelerator(gradient_accumulation_steps=steps)
        Trainer(guided(), arguments(tmp_path / str(steps), max_steps=2), data, accelerator=own).train()
        norms.append([e["grad_norm"] for e in records(tmp_path / str(steps))])
    assert norms[0] == norms[1]


def test_a_missing_best_file_is_a_warning_and_not_the_end(tmp_path, data):
    train, held_out = data.split(6)
    args = arguments(tmp_path, eval_steps=1, learning_rate=0.5, warmup_ratio=1.0, max_steps=6)

    def lose(step, trainer):
        (tmp_path / "run" / "checkpoints" / "best" / "model.safetensors").unlink(missing_ok=True)

    with pytest.warns(UserWarning, match="best does not hold the weights of step .; those of the last step are kept"):
        Trainer(guided(), args, train, held_out, on_step_end=lose).train()


def test_what_comes_back_is_ready_to_use(tmp_path, data):
    model = Trainer(guided(), arguments(tmp_path, gradient_checkpointing=True), data).train()
    assert not model.training
    assert not model.is_gradient_checkpointing
    assert model.config.use_cache


def test_nothing_to_train_and_bad_options(tmp_path, data):
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        Trainer(model, arguments(tmp_path), data).train()
    for bad in (
        {"guided_ratio": 1.5}, {"learning_rate": -1}, {"max_steps": 0}, {"max_steps": -5}, {"adam_beta1": -0.5},
        {"adam_beta2": 1.5}, {"seed": 2**32}, {"num_train_epochs": math.inf}, {"weight_decay": math.inf},
        {"learning_rate": math.nan},
    ):  # fmt: skip
        (name,) = bad
        with pytest.raises(ConfigError, match=f"^{name} is .*; it must be"):
            arguments(tmp_path, **bad)
    with pytest.raises(ConfigError, match="lr_scheduler_type 'x' is unknown"):
        arguments(tmp_path, lr_scheduler_type="x")


def test_a_diverged_run_stops_and_says_so(tmp_path, data):
    with pytest.raises(DivergedError, match="the loss is nan at step"):
        Trainer(guided(), arguments(tmp_path, learning_rate=1e30, max_grad_norm=0), data).train()


def test_the_speed_of_training_leaves_evaluations_out(data, tmp_path, monkeypatch):
    trainer = Trainer(guided(), arguments(tmp_path, eval_steps=1), *data.split(4))
    clock = [1.0]
    step, evaluate = OptimizerStep.take, Trainer.evaluate

    def timed(seconds, call):
        def run(*arguments):
            clock[0] += seconds
            return call(*arguments)

        return run

    monkeypatch.setattr("time.perf_counter", lambda: clock.__setitem__(0, clock[0] + 1e-9) or clock[0])
    monkeypatch.setattr(OptimizerStep, "take", timed(1.0, step))
    monkeypatch.setattr(Trainer, "evaluate", timed(100.0, evaluate))
    trainer.train()
    assert {e["tokens_per_second"] for e in records(tmp_path)} == {4.0 * (BLOCK - 1)}


def test_a_training_that_was_in_vain_is_said_loudly(data, tmp_path):
    options = arguments(tmp_path, learning_rate=0.5, eval_steps=4, load_best_model_at_end=True, max_grad_norm=0.0)
    trainer = Trainer(guided(), options, *data.split(4))
    with pytest.warns(UserWarning, match="the result is the model AS IT WAS BEFORE TRAINING"):
        trainer.train()
    assert trainer.best_step == 0
