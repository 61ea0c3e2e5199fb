"""A factored Llama over two processes by :func:`tensor_parallel_plan`, against the same model whole, in each of them.

torchrun --standalone --nproc_per_node 2 -m tests.distributed.tensor_parallel_driver OUTPUT FORM
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from lowrank_ft.conversion.convert import convert
from lowrank_ft.integrations.tensor_parallel import tensor_parallel_plan
from lowrank_ft.nn import lowrank_layers
from lowrank_ft.nn.forms import pivoted
from tests.conftest import tiny_llama
from tests.distributed.watching import SentBytes


def main(output: Path, form: str) -> None:
    dist.init_process_group("gloo")
    whole = tiny_llama(attention_bias=True, mlp_bias=True).double()
    convert(whole, rank=8, exclude_modules=["layers.1.mlp.down_proj"])  # one linear stays dense
    for _, layer in lowrank_layers(whole):
        torch.nn.init.normal_(layer.bias)
    if form == "pivoted":
        for name, layer in list(lowrank_layers(whole)):
            whole.set_submodule(name, pivoted(layer))
    split = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(split, mesh, tensor_parallel_plan(split, mesh.size()))
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(0))

    expected = whole(input_ids=ids).logits
    expected.square().mean().backward()
    with SentBytes() as sent:
        logits = split(input_ids=ids).logits
        forward = dict(sent.bytes)
        sent.bytes.clear()
        logits.square().mean().backward()
        backward = dict(sent.bytes)

    worst, own = 0.0, dict(split.named_parameters())
    changed = [n for n, m in lowrank_layers(split) if m.pivot != whole.get_submodule(n).pivot]
    for name, parameter in whole.named_parameters():
        if name.endswith((".U.weight", ".V.weight")) and name[:-9] in changed:
            continue
        gradient = own[name].grad
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        worst = max(worst, (gradient - parameter.grad).abs().max().item() / parameter.grad.abs().max().item())
    facts = {
        "world": dist.get_world_size(),
        "unpivoted": changed,
        "split": sorted(name for name, p in own.items() if isinstance(p, DTensor)),
        "local": {n: list(p.to_local().shape) for n, p in own.items() if isinstance(p, DTensor)},
        "logits": (logits - expected).abs().max().item() / expected.abs().max().item(),
        "gradients": worst,
        "forward": forward,
        "backward": backward,
    }
    (output / f"rank-{dist.get_rank()}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
