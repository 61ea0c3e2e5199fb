"""``lowrank-ft demo``, cut short: every part of it runs, and the table holds what the long one does."""

import json

import torch
from torch import nn

from lowrank_ft.demo import demo
from lowrank_ft.evaluation.perplexity import Evaluation
from tests.conftest import ROOT


def test_the_demo(cli, tmp_path):
    done = cli("demo", "--output-dir", tmp_path / "demo", "--max-steps", "24")
    for word in ("dense, as it comes", "converted", "fine-tuned low-rank", "LoRA r=16, merged", "tokens/s"):
        assert word in done.stdout
    rows = {r["name"]: r for r in json.loads((tmp_path / "demo" / "demo.json").read_text())["rows"]}
    dense, converted, tuned, lora = rows.values()
    assert tuned["parameters"] == converted["parameters"] < 0.7 * dense["parameters"]
    assert lora["parameters"] == dense["parameters"]
    assert tuned["bytes"] < 0.7 * dense["bytes"]
    assert tuned["perplexity"] < dense["perplexity"] < converted["perplexity"]
    assert (tmp_path / "demo" / "training.png").stat().st_size > 10_000
    assert "finetuned" in {p.name for p in (tmp_path / "demo").iterdir()}


def test_speeds_are_compared_on_one_device(monkeypatch):
    """A model that was trained on a GPU is still there, and those that were loaded are on the CPU."""

    class Trained(nn.Module):
        place = "cuda"

        def to(self, device):
            self.place = device
            return self

    model = Trained()
    measured = []

    def evaluate(model, blocks):
        measured.append(model.place)
        return Evaluation(1.0, 1, 1.0)

    monkeypatch.setattr(demo, "evaluate_blocks", evaluate)
    demo._measure_speed([demo.Row("LoRA", 1, 1, 1.0, model)], torch.zeros(1, 1), rounds=2)
    assert measured == ["cpu", "cpu"]


def test_the_model_was_trained_by_the_script_beside_its_log():
    log = [json.loads(line) for line in (ROOT / "recipes/demo_model/training_log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == log[0]["arguments"]["steps"]
    assert log[-1]["held_out_loss"] < log[1]["loss"] / 2
    assert (ROOT / "recipes/demo_model/train.py").is_file()
