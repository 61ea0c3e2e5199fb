"""Tokens per second in vLLM of compact, merged and dense, in one run: ``python -m tests.vllm.measure NAME=FOLDER ...``

The engine runs in this process, on one thread, in float32. Each number is the best of two rounds. Seconds are those of
the process (CPU time), so that what else the machine does counts little. Written into results.json, whose table
docs/make_reference.py makes.
"""

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import tests.vllm.driver  # noqa: F401  # sets vLLM's environment variables

RESULTS = Path(__file__).parent / "results.json"
TASKS = {"prompt": (1, 192, 1), "decode, 1 sequence": (1, 16, 16), "decode, 8 sequences": (8, 16, 16)}
"""Name to sequences, tokens of each prompt, tokens of each answer."""
ROUNDS = 2


def seconds(llm: Any, sequences: int, prompt: int, new_tokens: int, seed: int) -> float:
    import numpy as np
    from vllm import SamplingParams

    # Other prompts every time: vLLM would remember those that it has seen.
    ids = np.random.default_rng(seed).integers(100, 40000, (sequences, prompt)).tolist()
    settings = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    began = time.process_time()
    llm.generate([{"prompt_token_ids": p} for p in ids], settings, use_tqdm=False)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    folders = dict(model.split("=", 1) for model in options.models)
    best: dict[str, dict[str, float]] = {name: {} for name in folders}
    for name, folder in folders.items():
        llm = LLM(
            folder, dtype="float32", max_model_len=256, enforce_eager=True, max_num_seqs=8, skip_tokenizer_init=True
        )
        for turn in range(ROUNDS + 1):
            for task, (sequences, prompt, new_tokens) in TASKS.items():
                spent = seconds(llm, sequences, prompt, new_tokens, turn)
                tokens = sequences * (prompt if task == "prompt" else new_tokens)
                if turn:  # the first round warms up
                    best[name][task] = round(max(best[name].get(task, 0.0), tokens / spent), 1)
        print(name, json.dumps(best[name]), flush=True)
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    weights = {name: sum(f.stat().st_size for f in Path(path).glob("*.safetensors")) for name, path in folders.items()}
    old = json.loads(options.output.read_text()) if options.output.exists() else {}
    rows = {name: {"megabytes": round(weights[name] / 1e6, 1), **best[name]} for name in folders}
    options.output.write_text(json.dumps({**old, "throughput": rows}, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
