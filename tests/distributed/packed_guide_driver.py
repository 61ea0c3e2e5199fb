"""Two processes share packed guides, sharded by FSDP2 and copied by DDP; each writes what it saw.

torchrun --standalone --nproc_per_node 2 -m tests.distributed.packed_guide_driver OUTPUT
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lowrank_ft.nn import end_guidance
from tests.numerics.test_quantized_guides import guided


def run(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient to the input."""
    x = torch.randn(4, 72, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def compare(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> float:
    return max((a - b).abs().max().item() / b.abs().max().item() for a, b in zip(found, expected, strict=True))


def main(output: Path) -> None:
    dist.init_process_group("gloo")
    whole, sharded, copied = (guided()[1] for _ in range(3))
    expected = run(whole)
    # Rounds every float parameter to bfloat16; the packed bytes and their scales are none.
    fully_shard(sharded.guide, mp_policy=MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=False))
    fully_shard(sharded)
    local = [p.to_local() for p in sharded.guide.parameters() if isinstance(p, DTensor)]
    report = {
        "world": dist.get_world_size(),
        "fsdp": compare(run(sharded), expected),
        "ddp": compare(run(DistributedDataParallel(copied)), expected),
        "share": sum(t.nbytes for t in local) / sum(p.nbytes for p in whole.guide.parameters()),
        "dropped": end_guidance(sharded) == end_guidance(whole),
        "left": len([n for n, _ in sharded.named_parameters() if "guide" in n]),
    }
    (output / f"rank-{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
