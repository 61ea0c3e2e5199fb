"""Convert a tiny mixture of experts from Python, and save its logits.

torchrun --standalone --nproc_per_node 2 -m tests.distributed.convert_driver OUTPUT
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.convert import convert
from lowrank_ft.conversion.processes import ONE, Processes, joined

EXPERTS = 16


def converted(processes: Processes = ONE) -> torch.Tensor:
    """Logits after the conversion. Sixteen experts and batches of 24 tokens: some process sees no token of some expert."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=EXPERTS, num_experts_per_tok=1, max_position_embeddings=32,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    ids = torch.randint(64, (8, 12), generator=torch.Generator().manual_seed(1))
    # The second row of each batch says little, so that its process has tokens for few experts.
    batches = [{"input_ids": torch.stack([row, torch.full_like(row, row[0])])} for row in ids]
    calibration = Calibration(
        batches[:-1], held_out=batches[-1:], refine_epochs=1, distill_epochs=0.5, distill_learning_rate=1e-3,
        processes=processes,
    )  # fmt: skip
    convert(model, param_ratio=0.6, calibration=calibration)
    with torch.no_grad():
        return model(ids).logits


def main() -> None:
    with joined("cpu") as processes:
        logits = converted(processes)
        if processes.main:
            save_file({"logits": logits}, Path(sys.argv[1]), metadata={"processes": str(processes.count)})
        processes.wait()


if __name__ == "__main__":
    main()
