"""The main job on a real, pretrained, small Llama: convert, fine-tune on plays, export, generate in a fresh process."""

import json
import math

from lowrank_ft.training.metrics import read_metrics
from tests.conftest import ROOT

GENERATE = """
import json, lowrank_ft
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder = {folder!r}
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
text = generate("KING:", max_new_tokens=24, do_sample=False, return_full_text=True)[0]["generated_text"]
print(json.dumps({{"text": text, "parameters": model.num_parameters()}}))
"""


def test_the_main_job(shared, cli, python, tmp_path):
    model, plays = shared / "models" / "tiny-llama", shared / "data" / "shakespeare.txt"
    calibration = ["--calibration-data", shared / "data" / "calibration.txt", "--calibration-tokens", "8192"]
    cli("convert", model, "--param-ratio", "0.6", *calibration, "--output-dir", tmp_path / "compact")
    cli(
        "finetune", "--config", ROOT / "recipes/configs/tiny-llama-shakespeare.yaml", "--model", tmp_path / "compact",
        "--dataset", plays, "--output-dir", tmp_path / "tuned", "--max-steps", "40", "--eval-steps", "20", "--eval-ratio", "0.03",
        "--", "--cpu",
    )  # fmt: skip
    evals = [e["eval_loss"] for e in read_metrics(tmp_path / "tuned" / "metrics.jsonl") if "eval_loss" in e]
    assert evals == sorted(evals, reverse=True)
    # Zero-shot, the dense model has perplexity 82 on these plays; 40 steps bring the smaller one far below that.
    assert math.exp(evals[-1]) < 60

    done = python("-c", GENERATE.format(folder=str(tmp_path / "tuned")))
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["text"].startswith("KING:")
    assert len(answer["text"]) > 20
    assert answer["parameters"] < 0.66 * 2_828_736
    # The run held the last 3 % out, by tokens; the last fortieth of the characters lies within it.
    text = plays.read_text(encoding="utf-8")
    (tmp_path / "end.txt").write_text(text[-len(text) // 40 :], encoding="utf-8")
    flags = ["--data", tmp_path / "end.txt", "--block-size", "256", "--baseline", model, "--json"]
    results = json.loads(cli("eval", tmp_path / "tuned", *flags).stdout)
    assert results["model"]["perplexity"] < results["baseline"]["perplexity"]
    assert results["agreement"]["tokens"] == results["model"]["tokens"]
    assert results["model"]["bytes"] < 0.7 * results["baseline"]["bytes"]
