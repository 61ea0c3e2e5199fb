"""Which learning rate is best for each method on the demo's model and text?

    python tests/benchmarks/demo_rates.py --output tests/benchmarks/results/demo_rates.json

Every method gets the same grid, steps and data. The demo's rates are the winners of this table.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_ft.console import print_table
from lowrank_ft.conversion.batches import training_calibration
from lowrank_ft.conversion.convert import convert
from lowrank_ft.data.encoding import token_ids
from lowrank_ft.data.examples import TokenizedData, pack
from lowrank_ft.demo.demo import BLOCK_SIZE, CALIBRATION_TOKENS, LORA_RANK, MODEL
from lowrank_ft.demo.text import prose
from lowrank_ft.evaluation.perplexity import evaluate_blocks, to_blocks
from lowrank_ft.training import TrainArguments, Trainer

RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]


def build(method: str, param_ratio: float, train: TokenizedData) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(str(MODEL), dtype=torch.float32)
    if method == "full":
        return model
    if method == "LoRA":
        return get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear"))
    calibration = training_calibration(train, CALIBRATION_TOKENS)
    convert(model, param_ratio=param_ratio, calibration=calibration, guide=None if method == "none" else method)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-steps", type=int, default=120)
    parser.add_argument("--param-ratio", type=float, default=0.6)
    parser.add_argument("--methods", nargs="+", default=["residual", "none", "LoRA"])
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))
    train_text, held_out_text = prose()
    train = pack(token_ids(train_text, tokenizer), BLOCK_SIZE)
    held_out = to_blocks(torch.from_numpy(token_ids(held_out_text, tokenizer)).long(), BLOCK_SIZE)
    results: dict[str, dict[str, float]] = {}
    for method in options.methods:
        results[method] = {}
        for rate in RATES:
            model = build(method, options.param_ratio, train)
            with tempfile.TemporaryDirectory() as folder:
                args = TrainArguments(
                    output_dir=folder, max_steps=options.max_steps, learning_rate=rate, weight_decay=0.0,
                    warmup_ratio=0.05, seed=0,
                )  # fmt: skip
                Trainer(model, args, train).train()
            results[method][str(rate)] = round(evaluate_blocks(model, held_out).perplexity, 3)
            report = {
                "machine": f"{platform.machine()}, {torch.get_num_threads()} CPU threads", "torch": torch.__version__,
                "max_steps": options.max_steps, "param_ratio": options.param_ratio, "lora_rank": LORA_RANK,
                "perplexity": results,
            }  # fmt: skip
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    rows = [(m, *(f"{p:.2f}" for p in by_rate.values())) for m, by_rate in results.items()]
    print_table(("method", *(f"{r:g}" for r in RATES)), rows, title="held-out perplexity by learning rate")


if __name__ == "__main__":
    main()
