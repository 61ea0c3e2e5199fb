"""``lowrank-ft demo``, cut short: every part of it runs, and the table holds what the long one does."""

import json

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


def test_the_model_was_trained_by_the_script_beside_its_log():
    log = [json.loads(line) for line in (ROOT / "recipes/demo_model/training_log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == log[0]["arguments"]["steps"]
    assert log[-1]["held_out_loss"] < log[1]["loss"] / 2
    assert (ROOT / "recipes/demo_model/train.py").is_file()
