"""``GuidanceCallback`` in ``transformers.Trainer`` and TRL on one process: phases, resuming, saving, refusals."""

import importlib.util
import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

import lowrank_ft
from lowrank_ft import GuidanceCallback, LowRankConfig
from lowrank_ft.data.examples import pack
from lowrank_ft.errors import ConfigError, TrainingStateError
from lowrank_ft.nn import compact_view, end_guidance, guided_layers, lowrank_layers
from lowrank_ft.schedule import alpha_at
from lowrank_ft.training import TrainArguments
from lowrank_ft.training import Trainer as OwnTrainer
from lowrank_ft.training.metrics import read_metrics
from tests.callback_driver import GUIDED, STEPS, Watch, make_data, make_model, make_trainer, series
from tests.conftest import DEMO_MODEL, ROOT, tiny_llama

KINDS = ["dense", "residual", "peft-residual"]
ALPHAS = [alpha_at(step, GUIDED) for step in range(STEPS)]


def run(kind: str, output: Path, resume: str | None = None, **options):
    model = make_model(kind)
    watch = Watch(model)
    trainer = make_trainer(model, output, GuidanceCallback(guided_ratio=GUIDED / STEPS), watch, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Runs that nobody interrupted, by kind: the trainer, what was watched, the folder."""
    done = {}

    def get(kind: str):
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            done[kind] = (*run(kind, folder), folder)
        return done[kind]

    return get


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_falls_by_the_step_and_the_guide_is_let_go(straight, kind):
    trainer, watch, _ = straight(kind)
    assert series(trainer, "alpha") == ALPHAS  # two micro-batches a step do not count twice
    tensors = 28 if kind == "peft-residual" else 14
    assert [watch.alive[step] for step in (1, 3, 4, 8)] == [tensors, tensors, 0, 0]
    assert not any(guided_layers(trainer.model))
    names = {id(p) for p in trainer.model.parameters()}
    in_groups = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in in_groups} <= names
    assert len(trainer.optimizer.state) == len(in_groups)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in trainer.model.modules())  # nothing is left behind
    assert not trainer.model._load_state_dict_pre_hooks


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("dense", GUIDED - 2),  # the moments of W come back, too
        ("dense", GUIDED),  # the optimizer has lost them; its groups must have the same sizes
        ("dense", GUIDED + 2),
        ("residual", GUIDED - 2),
        ("residual", GUIDED + 2),
        ("peft-residual", GUIDED - 2),
        ("peft-residual", GUIDED + 2),
    ],
)
def test_resumed_is_the_same_run_bit_for_bit(straight, tmp_path, kind, step):
    expected, _, folder = straight(kind)
    phase = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    recorded = phase["stateful_callbacks"]["GuidanceCallback"]["attributes"]["recorded"]
    assert recorded == {
        "phase": "guided" if step < GUIDED else "compact", "guided_steps": GUIDED, "alpha_schedule": "cosine"
    }  # fmt: skip
    again, watch = run(kind, tmp_path, str(folder / f"checkpoint-{step}"))
    assert series(again, "loss") == series(expected, "loss")
    assert len(series(again, "loss")) == STEPS
    assert set(watch.alive) == set(range(step + 1, STEPS + 1))  # it did not start from the beginning
    assert watch.alive[STEPS] == 0
    assert_same_weights(again.model.state_dict(), expected.model.state_dict())
    state, wanted = again.optimizer.state_dict(), expected.optimizer.state_dict()
    assert [g["params"] for g in state["param_groups"]] == [g["params"] for g in wanted["param_groups"]]
    for index, moments in wanted["state"].items():
        assert_same_weights(state["state"][index], moments)


def test_killed_and_resumed_in_a_fresh_process(straight, python, tmp_path):
    expected, _, _ = straight("dense")
    driver = ("-m", "tests.callback_driver", str(tmp_path), "dense")
    done = python(*driver, "--kill-at", str(GUIDED + 2), check=False, PYTHONPATH=str(ROOT))
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "dense" / "straight-0.json").exists()
    python(*driver, "--resume", str(GUIDED - 2), str(GUIDED + 2), PYTHONPATH=str(ROOT))
    for step in (GUIDED - 2, GUIDED + 2):
        entry = json.loads((tmp_path / "dense" / f"from-{step}-0.json").read_text())
        assert entry["losses"] == series(expected, "loss")
        found = load_file(tmp_path / "dense" / f"from-{step}" / "final" / "model.safetensors")
        assert_same_weights(found, dict(expected.model.state_dict()))


def test_what_is_saved_loads_with_automodel_in_a_fresh_process(straight, python, tmp_path, ids):
    trainer, _, folder = straight("dense")
    trainer.save_model(str(tmp_path / "final"))
    torch.save(ids, tmp_path / "ids.pt")
    code = """
import sys, torch, lowrank_ft
assert "lowrank_ft.training" not in sys.modules and "transformers.trainer" not in sys.modules  # both cost seconds
from transformers import AutoModelForCausalLM
ids = torch.load("ids.pt")
for name, folder in (("final", "final"), ("guided", sys.argv[1])):
    torch.save(AutoModelForCausalLM.from_pretrained(folder)(ids).logits.detach(), name + ".pt")
"""
    python("-c", code, str(folder / f"checkpoint-{GUIDED - 2}"))
    expected = trainer.model.eval()(ids).logits
    assert torch.equal(torch.load(tmp_path / "final.pt"), expected)
    held = load_file(folder / f"checkpoint-{GUIDED - 2}" / "model.safetensors")
    assert sum(k.endswith(".guide.weight") for k in held) == 14
    assert not any("guide" in k for k in load_file(tmp_path / "final" / "model.safetensors"))
    # Of a guided checkpoint AutoModel takes the factors.
    model = tiny_llama()
    lowrank_ft.convert(model, rank=8)
    model.load_state_dict({k: v for k, v in held.items() if "guide" not in k})
    torch.testing.assert_close(torch.load(tmp_path / "guided.pt"), model(ids).logits)


def test_a_peft_checkpoint_after_the_drop_has_no_guide(straight, ids):
    trainer, _, folder = straight("peft-residual")
    loaded = PeftModel.from_pretrained(tiny_llama(), str(folder / f"checkpoint-{STEPS}")).eval()
    assert (loaded.peft_config["default"].guide, loaded.peft_config["default"].alpha) == ("none", 0.0)
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize("kind", ["dense", "peft-residual"])
def test_evaluation_sees_the_compact_model_and_training_the_guide(tmp_path, kind):
    model, held_out, found = make_model(kind, dropout=0.0), make_data(4, seed=1), []
    batch = {k: torch.stack([e[k] for e in held_out]) for k in ("input_ids", "labels")}

    class Check(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            with torch.no_grad(), compact_view(model):
                compact = model(**batch)
            assert metrics["eval_loss"] == pytest.approx(compact.loss.item(), abs=1e-6)
            with torch.no_grad():
                assert torch.equal(model(**batch).logits, compact.logits)  # Trainer left it in evaluation mode
                guide = model.train()(**batch).logits - compact.logits
            found.append(guide.abs().max().item())

    callback = GuidanceCallback(guided_steps=GUIDED)
    trainer = make_trainer(
        model, tmp_path, callback, Check(), eval_data=held_out, eval_strategy="steps", eval_steps=1, eval_on_start=True,
        save_strategy="no", per_device_eval_batch_size=4,
    )  # fmt: skip
    trainer.train()
    steps_with_guide = [step for step, difference in enumerate(found) if difference > 1e-3]
    assert (
        steps_with_guide == list(range(GUIDED)) if kind == "dense" else list(range(1, GUIDED))
    )  # alpha is 0 in PEFT's config
    assert found[GUIDED:] == [0.0] * (STEPS - GUIDED + 1)


def test_losses_are_those_of_our_own_trainer(tmp_path):
    """Every example is the same, so the order of the data cannot matter."""
    row = np.random.default_rng(0).integers(3, 97, 16).astype(np.int32)
    data = [{"input_ids": torch.tensor(row).long(), "labels": torch.tensor(row).long()}] * 40
    shared = dict(max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3)
    mine, theirs = make_model("dense", 0.0), make_model("dense", 0.0)
    args = TrainArguments(
        output_dir=str(tmp_path / "own"), guided_ratio=0.5, alpha_schedule="linear", logging_steps=1, warmup_ratio=0.0,
        lr_scheduler_type="constant", weight_decay=0.0, **shared,
    )  # fmt: skip
    OwnTrainer(mine, args, pack(np.tile(row, 40), 16)).train()
    own = [e for e in read_metrics(tmp_path / "own" / "metrics.jsonl") if "loss" in e]
    trainer = make_trainer(
        theirs,
        tmp_path / "theirs",
        GuidanceCallback(0.5, "linear"),
        lr_scheduler_type="constant",
        save_strategy="no",
        **shared,
    )
    trainer.train_dataset = data
    trainer.train()
    assert series(trainer, "alpha") == [e["alpha"] for e in own] == [alpha_at(s, 4, "linear") for s in range(STEPS)]
    assert series(trainer, "loss") == pytest.approx([e["loss"] for e in own], rel=1e-4)


def test_the_best_model_may_be_of_the_guided_phase(tmp_path, caplog):
    """Its checkpoint holds guides, the model at the end does not."""
    model, held_out = make_model("dense", 0.0), make_data(4, seed=1)
    trainer = make_trainer(
        model, tmp_path, GuidanceCallback(guided_steps=GUIDED), eval_data=held_out, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_step", greater_is_better=False,
    )  # fmt: skip
    trainer.compute_metrics = lambda _: {"step": trainer.state.global_step}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert "unexpected keys" not in caplog.text
    held = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert any("guide" in k for k in held)
    assert not any(guided_layers(model))
    assert_same_weights(
        {k: v for k, v in model.state_dict().items() if k in held}, {k: v for k, v in held.items() if "guide" not in k}
    )


def test_stopped_early_the_model_is_compact_and_says_so(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    model = make_model("dense")
    trainer = make_trainer(model, tmp_path, GuidanceCallback(guided_steps=GUIDED), Stop(), save_strategy="no")
    with pytest.warns(UserWarning, match="stopped at step 2, before the guided phase ended at step 4"):
        trainer.train()
    assert not any(guided_layers(model))


def test_callbacks_that_trainer_makes_anew_go_on(straight, tmp_path):
    expected, _, folder = straight("dense")
    for step in (GUIDED - 2, GUIDED + 2):
        again, _ = run(
            "dense", tmp_path, str(folder / f"checkpoint-{step}"), restore_callback_states_from_checkpoint=True
        )
        assert_same_weights(again.model.state_dict(), expected.model.state_dict())


@pytest.mark.parametrize("step", [GUIDED - 2, GUIDED + 2])
def test_phase_out_is_the_callback_given_the_trainer(straight, tmp_path, step):
    expected, _, folder = straight("residual")
    model = make_model("residual")
    trainer = make_trainer(model, tmp_path)
    lowrank_ft.phase_out(trainer, guided_ratio=GUIDED / STEPS)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert series(trainer, "loss") == series(expected, "loss")
    assert_same_weights(trainer.model.state_dict(), expected.model.state_dict())
    with pytest.raises(ConfigError, match="already"):
        lowrank_ft.phase_out(trainer)


def test_added_later_it_wants_prepare_for_resume(straight, tmp_path):
    expected, _, folder = straight("dense")
    model = make_model("dense")
    checkpoint = folder / f"checkpoint-{GUIDED}"
    callback = GuidanceCallback(guided_steps=GUIDED)
    callback.prepare_for_resume(model, checkpoint)
    trainer = make_trainer(model, tmp_path)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(trainer.model.state_dict(), expected.model.state_dict())


def test_with_model_init_the_model_of_the_run_is_prepared(tmp_path):
    """Trainer makes one when it is made, throws it away, and makes another when it trains."""
    runs = {}
    for step in (None, GUIDED - 2, GUIDED + 2):
        trainer = make_trainer(
            None, tmp_path / str(step), GuidanceCallback(guided_steps=GUIDED), model_init=lambda: make_model("dense")
        )
        checkpoint = None if step is None else str(tmp_path / "None" / f"checkpoint-{step}")
        trainer.train(resume_from_checkpoint=checkpoint)
        runs[step] = trainer.model.state_dict()
        assert not any(guided_layers(trainer.model))
    assert_same_weights(runs[GUIDED - 2], runs[None])
    assert_same_weights(runs[GUIDED + 2], runs[None])


def test_a_trainer_that_failed_to_be_made_disturbs_no_other(tmp_path):
    """The one that runs a callback is looked for among all that are alive."""
    half_made = Trainer.__new__(Trainer)
    trainer = make_trainer(make_model("residual"), tmp_path, GuidanceCallback(guided_steps=1), max_steps=2)
    trainer.train()
    assert not any(guided_layers(trainer.model))
    assert vars(half_made) == {}


# What is refused, always before the first step


def refused(error, match, model, tmp_path, callback, resume=None, **options):
    trainer = make_trainer(model, tmp_path, callback, **options)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=match):
        trainer.train(resume_from_checkpoint=resume)
    if resume is None:
        assert_same_weights(model.state_dict(), before)


def test_a_model_without_a_guide(tmp_path):
    compact = tiny_llama()
    lowrank_ft.convert(compact, rank=8)
    refused(ConfigError, "attach_guides", compact, tmp_path, GuidanceCallback())
    refused(ConfigError, "convert it first", tiny_llama(), tmp_path, GuidanceCallback())
    refused(ConfigError, "guide='residual'", make_model("peft-none"), tmp_path, GuidanceCallback())


def test_a_guided_phase_longer_than_the_training(tmp_path):
    refused(
        ConfigError, "guided_steps is 9.*8 steps", make_model("residual"), tmp_path, GuidanceCallback(guided_steps=9)
    )


def test_a_guided_phase_that_rounds_to_nothing_is_told(tmp_path):
    model = make_model("dense")
    with pytest.warns(UserWarning, match="rounds to no guided step"):
        make_trainer(model, tmp_path, GuidanceCallback(0.01), max_steps=2, save_strategy="no").train()
    assert not any(guided_layers(model))


def test_a_checkpoint_of_the_other_phase(straight, tmp_path):
    for kind in ("dense", "residual", "peft-residual"):
        checkpoint = str(straight(kind)[2] / f"checkpoint-{GUIDED - 2}")
        model = make_model(kind)
        end_guidance(model)
        refused(TrainingStateError, "guided phase.*no guide", model, tmp_path, GuidanceCallback(0.5), checkpoint)
        with pytest.raises(TrainingStateError, match="guided phase.*no guide"):
            GuidanceCallback.prepare_for_resume(model, checkpoint)


def test_a_checkpoint_of_another_guided_phase(straight, tmp_path):
    checkpoint = str(straight("dense")[2] / f"checkpoint-{GUIDED - 2}")
    model = make_model("dense")
    refused(TrainingStateError, "guided_steps 4 -> 6", model, tmp_path, GuidanceCallback(guided_steps=6), checkpoint)
    model = make_model("dense")
    callback = GuidanceCallback(0.5, "linear")
    refused(TrainingStateError, "alpha_schedule 'cosine' -> 'linear'", model, tmp_path, callback, checkpoint)


def test_a_checkpoint_written_without_the_callback(tmp_path):
    trainer = make_trainer(make_model("dense"), tmp_path, max_steps=2)
    trainer.train()
    checkpoint = str(tmp_path / "checkpoint-2")
    refused(
        TrainingStateError,
        "without a GuidanceCallback",
        make_model("dense"),
        tmp_path,
        GuidanceCallback(0.5),
        checkpoint,
    )
    with pytest.raises(TrainingStateError, match="without a GuidanceCallback"):
        GuidanceCallback.prepare_for_resume(trainer.model, checkpoint)
    with pytest.raises(TrainingStateError, match="cannot be read"):
        GuidanceCallback.prepare_for_resume(trainer.model, tmp_path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("deepspeed", "under DEEPSPEED.*start a new run under DeepSpeed"),
        ("torch_compile", "torch_compile on several processes.*torch_compile=False"),
    ],
)
def test_setups_in_which_it_cannot_work(option, message):
    """Trainer itself takes deepspeed in distributed training only. FSDP: tests/distributed/test_callback_fsdp2.py."""
    args = SimpleNamespace(**{"deepspeed": None, "torch_compile": False, "world_size": 2, option: True})
    with pytest.raises(ConfigError, match=message):
        GuidanceCallback().on_init_end(args, None, None, model=make_model("dense"))


def test_compiled_the_model_changes_once_at_the_drop(tmp_path):
    """One graph while alpha moves and evaluations come and go, and one without the guide."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    graphs = {}

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            graphs[state.global_step] = counters["stats"]["unique_graphs"]

    model = make_model("dense", 0.0)
    watch = Watch(model)
    trainer = make_trainer(
        model, tmp_path, GuidanceCallback(0.5), Count(), watch, torch_compile=True, torch_compile_backend="eager",
        save_strategy="no", eval_data=make_data(4), eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    assert graphs == {step: 1 if step <= GUIDED else 2 for step in range(1, STEPS + 1)}
    assert watch.alive[STEPS] == 0


@pytest.mark.parametrize("peft", [False, True])
def test_sft_trainer(tmp_path, peft):
    trl = pytest.importorskip("trl", reason="TRL is not installed; pip install 'lowrank-ft[trl]'")
    from datasets import Dataset

    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    if not peft:
        lowrank_ft.convert(model, param_ratio=0.6, guide="residual")
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, max_length=32, logging_steps=1, use_cpu=True,
        bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, args, train_dataset=Dataset.from_dict({"text": ["To be, or not to be, that is the question.\n" * 3] * 8}),
        processing_class=AutoTokenizer.from_pretrained(DEMO_MODEL), callbacks=[GuidanceCallback(0.5)],
        peft_config=LowRankConfig(r=16, guide="residual") if peft else None,
    )  # fmt: skip
    assert any(guided_layers(trainer.model))
    trainer.train()
    assert series(trainer, "alpha") == [1.0, 0.5, 0.0, 0.0]
    assert not any(guided_layers(trainer.model))
    compact = trainer.model.base_model.compact_and_unload() if peft else trainer.model
    assert any(lowrank_layers(compact))
    dense = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    assert compact.num_parameters() < dense.num_parameters()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(guided_ratio=1.5), "guided_ratio is 1.5"),
        (dict(guided_ratio=float("nan")), "guided_ratio is nan"),
        (dict(guided_steps=-1), "guided_steps is -1"),
        (dict(guided_steps=2.5), "guided_steps is 2.5"),
        (dict(guided_steps=2, guided_ratio=0.5), "not both"),
        (dict(alpha_schedule="step"), "'step' is unknown; choose one of cosine, linear"),
    ],
)
def test_arguments_out_of_range(arguments, match):
    with pytest.raises(ConfigError, match=match):
        GuidanceCallback(**arguments)


def test_the_code_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.txt").write_text("Enter HAMLET. To be, or not to be, that is the question.\n" * 40)
    page = (ROOT / "docs" / "how-to" / "trainer-and-trl.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    compact = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    lowrank_ft.convert(compact, param_ratio=0.8)
    lowrank_ft.save_compact(compact, "compact", companions_from=str(DEMO_MODEL))
    small = {
        "path/to/tiny-llama": str(DEMO_MODEL),
        "path/to/model": str(DEMO_MODEL),
        "max_steps=1000": "max_steps=8",
        "save_steps=100": "save_steps=4",
    }
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        if "from trl" in block and not importlib.util.find_spec("trl"):
            continue  # the page says that it has to be installed
        for shown, tiny in small.items():
            block = block.replace(shown, tiny)
        if "resume_from_checkpoint" in block:
            shutil.rmtree(tmp_path / "run" / "checkpoint-8")  # as if the run had been killed before
        exec(compile(block, "trainer-and-trl.md", "exec"), names)
    assert names["trainer"].state.global_step == 8
    assert (tmp_path / "compact-from-peft" / "model.safetensors").is_file()
