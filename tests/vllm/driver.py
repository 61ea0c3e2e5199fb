"""Serve checkpoints one after the other in this process and write down what came out of each.

python -m tests.vllm.driver JOBS OUTPUT

``JOBS`` is a JSON list of objects: ``name``, ``folder``, ``prompts`` (lists of token ids), ``new_tokens``, and ``engine``,
further arguments of ``vllm.LLM``. ``OUTPUT`` gets, by name, ``tokens`` and ``logprobs`` of each prompt, or ``error``.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # errors arrive here and not in another process
os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "fork")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def serve(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    engine = {
        "dtype": "float32",
        "max_model_len": 256,
        "enforce_eager": True,
        "max_num_seqs": 4,
        **job.get("engine", {}),
    }
    llm = LLM(job["folder"], skip_tokenizer_init=True, **engine)
    settings = SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, prompt_logprobs=0, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in job["prompts"]], settings, use_tqdm=False)
    scores = [[next(iter(known.values())).logprob for known in o.prompt_logprobs[1:]] for o in outputs]
    return {"tokens": [list(o.outputs[0].token_ids) for o in outputs], "logprobs": scores}


def said(error: BaseException) -> str:
    """The messages of an error and of those that led to it."""
    messages, cause = [], error
    while cause is not None:
        messages.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__
    return "\n".join(messages)


def main(jobs: Path, output: Path) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    results: dict[str, Any] = {}
    for job in json.loads(jobs.read_text()):
        try:
            results[job["name"]] = serve(job)
        except Exception as error:
            results[job["name"]] = {"error": said(error)}
        gc.collect()
        cleanup_dist_env_and_memory()
        output.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
