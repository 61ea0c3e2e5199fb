"""Calibration text that a causal language model writes itself, so that nothing has to be downloaded.

Tokens are drawn from the model's own distribution, unchanged (temperature 1), from its begin-of-text token on: what a
model says is what it was trained on, near enough to fit its factors to it (Liu et al. 2023, arXiv 2305.17888, use such
text to train quantized models).
"""

from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lowrank_ft.errors import DataError
from lowrank_ft.nn.modes import evaluating


@torch.no_grad()
def sample_blocks(
    model: Any, blocks: int, length: int, batch_size: int = 32, seed: int = 0, progress: bool = False
) -> Tensor:
    """Let ``model`` write ``blocks`` texts of ``length`` tokens; int64 ``(blocks, length)`` on the CPU.

    A text goes on past an end-of-text token, as packed training data do.

    Raises:
        DataError: the model cannot generate.
    """
    if not getattr(model, "can_generate", lambda: False)() or getattr(model.config, "is_encoder_decoder", False):
        raise DataError(
            f"a {type(model).__name__} cannot write its own calibration text; give --calibration-data FILE, "
            "or --method svd, which needs none"
        )
    first = _first_token(model)
    settings = model.generation_config
    written = []
    bar = tqdm(total=blocks * length, desc="write calibration text", unit="token", disable=None if progress else True)
    try:
        # The checkpoint's own settings may punish repetition or ban tokens.
        model.generation_config = type(settings)()
        with evaluating(model), torch.random.fork_rng(devices=_cuda_devices(model)):
            torch.manual_seed(seed)
            for start in range(0, blocks, batch_size):
                count = min(batch_size, blocks - start)
                if first is None:
                    prompt = torch.randint(model.config.get_text_config().vocab_size, (count, 1))
                else:
                    prompt = torch.full((count, 1), first)
                ids = model.generate(
                    prompt.to(model.device), attention_mask=torch.ones_like(prompt).to(model.device), do_sample=True,
                    temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=length - 1, max_new_tokens=length - 1,
                    eos_token_id=None, pad_token_id=0, use_cache=True,
                )  # fmt: skip
                written.append(ids.cpu())
                bar.update(ids.numel())
    finally:
        bar.close()
        model.generation_config = settings
    return torch.cat(written)


def _first_token(model: Any) -> int | None:
    config = model.config.get_text_config()
    for token in (config.bos_token_id, config.eos_token_id):
        token = token[0] if isinstance(token, list) else token
        if token is not None:
            return int(token)
    return None


def _cuda_devices(model: Any) -> list[int]:
    return [model.device.index or 0] if model.device.type == "cuda" else []
