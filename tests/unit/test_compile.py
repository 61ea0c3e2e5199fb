"""torch.compile: graphs are counted over the phases of training, for a whole model, and in the Trainer."""

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from lowrank_ft.conversion.convert import convert
from lowrank_ft.data.examples import pack
from lowrank_ft.errors import ConfigError
from lowrank_ft.integrations.peft import LowRankConfig
from lowrank_ft.nn import compact_view, end_guidance, set_alpha, set_gates
from lowrank_ft.pretraining.options import PretrainArguments
from lowrank_ft.training import TrainArguments, Trainer
from lowrank_ft.training.metrics import read_metrics
from tests.conftest import tiny_llama


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)


def in_place(guide):
    model = tiny_llama()
    convert(model, rank=8, guide=guide)
    return model


def adapter(guide):
    return get_peft_model(tiny_llama(), LowRankConfig(r=8, guide=guide, alpha=1.0))


def train_step(model, ids):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    model.zero_grad()
    return loss.item()


def evaluate(model, ids):
    model.eval()
    with torch.no_grad(), compact_view(model):
        logits = model(input_ids=ids, use_cache=False).logits
    model.train()
    return logits


@pytest.mark.parametrize(
    ("make", "guide", "after"),
    [(in_place, "residual", 0), (in_place, "dense", 0), (adapter, "residual", 1)],
)
def test_one_graph_while_alpha_moves_and_one_more_at_the_drop(make, guide, after, ids):
    """And one for all evaluations before the drop; an in-place model evaluates with it after the drop, too."""
    model = make(guide).train()
    backend = CompileCounterWithBackend("aot_eager")
    model.compile(backend=backend)
    losses = []
    for alpha in (1.0, 0.8, 0.3, 0.01):
        set_alpha(model, alpha)
        losses.append(train_step(model, ids))
        assert backend.frame_count == 1
    assert len(set(losses)) == 4  # alpha reached the graph
    for alpha in (0.5, 0.4):
        seen = evaluate(model, ids)
        set_alpha(model, alpha)
        train_step(model, ids)
        assert backend.frame_count == 2
    end_guidance(model)
    for _ in range(2):
        train_step(model, ids)
        assert backend.frame_count == 3
    for _ in range(2):
        torch.testing.assert_close(evaluate(model, ids), seen)
        assert backend.frame_count == 3 + after


def test_gates_would_compile_a_graph_for_every_pattern(ids):
    """Why stochastic guidance runs uncompiled."""
    model = in_place("residual").train()
    backend = CompileCounterWithBackend("eager")
    model.compile(backend=backend)
    for step in range(3):
        set_gates(model, step, 0.5, seed=0)
        train_step(model, ids)
    assert backend.frame_count == 3


def run(tmp_path, guide="residual", **options):
    data = pack((np.arange(40 * 16) % 90 + 3).astype(np.int32), 16)
    train, held_out = data.split(8)
    args = (PretrainArguments if "guide_mode" in options else TrainArguments)(
        output_dir=str(tmp_path), max_steps=6, guided_ratio=0.5, per_device_train_batch_size=4, logging_steps=1,
        learning_rate=3e-3, eval_steps=1, load_best_model_at_end=False, **options,
    )  # fmt: skip
    graphs = {}

    def count(step, _):
        graphs[step] = counters["stats"]["unique_graphs"]

    model = Trainer(in_place(guide), args, train, held_out, on_step_end=count).train()
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    return model, graphs, [e.get("loss", e.get("eval_loss")) for e in metrics if "event" not in e]


@pytest.mark.parametrize("mode", ["full", "stochastic"])
def test_the_trainer_compiles_once_for_each_phase(tmp_path, mode):
    _, none, expected = run(tmp_path / "plain", guide_mode=mode)
    assert set(none.values()) == {0}
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {"guide_mode": mode, "torch_compile": True, "torch_compile_backend": "eager"}
    model, graphs, losses = run(tmp_path / "compiled", **options)
    assert losses == pytest.approx(expected, rel=1e-5)
    # One is the trial before training. Evaluation comes before the first step and after every step, also after the
    # third, with which guidance ends.
    assert list(graphs.values()) == ([3, 3, 3, 4, 4, 4] if mode == "full" else [1, 1, 2, 3, 3, 3])
    assert model._compiled_call_impl is None  # what is handed back is not compiled


def test_compiled_mixed_precision_and_checkpointing(tmp_path):
    options = {"mixed_precision": "bf16", "gradient_checkpointing": True}
    _, _, expected = run(tmp_path / "plain", "dense", **options)
    AcceleratorState._reset_state(reset_partial_state=True)
    options |= {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    _, graphs, losses = run(tmp_path / "compiled", "dense", **options)
    assert graphs[6] == 4
    assert losses == pytest.approx(expected, rel=1e-2)


def test_a_backend_that_does_not_work_is_found_before_training(tmp_path):
    with pytest.raises(ConfigError, match="torch_compile_backend 'nonsense' does not work on cpu: .* choose one of"):
        run(tmp_path, torch_compile=True, torch_compile_backend="nonsense")
    assert not (tmp_path / "metrics.jsonl").exists()
