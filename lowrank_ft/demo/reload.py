"""What a user of an exported checkpoint does, in a process of its own: load it with AutoModel, and use it.

    python -m lowrank_ft.demo.reload FOLDER IDS.pt

prints the loss on the blocks in ``IDS.pt`` and a continuation, as JSON.
"""

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft  # noqa: F401 (registers the loader)
from lowrank_ft.evaluation.perplexity import evaluate_blocks

PROMPT = "The for statement is used to"


def main(folder: str, ids_file: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result = evaluate_blocks(model, torch.load(ids_file, weights_only=True))
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**prompt, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    print(json.dumps({"loss": result.loss, "tokens_per_second": result.tokens_per_second, "text": text}))


if __name__ == "__main__":
    main(*sys.argv[1:])
