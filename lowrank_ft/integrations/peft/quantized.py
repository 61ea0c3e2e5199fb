"""Quantized base layers: linears of bitsandbytes, in 8 or 4 bits, beside which adapters train as in QLoRA.

Factors start from the SVD of what such a layer computes with, its weight dequantized. The layer itself stays as it is:
merging puts another quantized layer in its place, so that unmerging has the first one, bit for bit, to put back.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.nn.replace import dense_weight as plain_dense_weight


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a linear of bitsandbytes; without importing that library, for then nothing is."""
    bnb = _bitsandbytes()
    return bnb is not None and isinstance(module, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit)


def dense_weight(module: Any) -> Tensor:
    """``W (out, in)`` of any base layer; of a quantized one in the dtype that it dequantizes to."""
    if not is_quantized(module):
        return plain_dense_weight(module)
    bnb = _bitsandbytes()
    if isinstance(module, bnb.nn.Linear8bitLt):
        # The layer's first forward pass moves the scales from the parameter to its state.
        scales = module.state.SCB if module.state.SCB is not None else module.weight.SCB
        return bnb.functional.int8_vectorwise_dequant(module.weight.data, scales)
    keep_unpacked(module)
    return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


def keep_unpacked(module: Any) -> None:
    """Keep bitsandbytes from repacking a 4-bit weight at its next inference pass on a CPU; undo it where it did.

    Repacking rounds the scales to bfloat16, so a weight that was read before would not be the one that computes. The
    library unpacks when it saves, but leaves scales that are not quantized themselves transposed (0.50.2).
    """
    if not getattr(module, "support_avx512bf16_for_cpu", False):
        return
    module.support_avx512bf16_for_cpu = False
    state = module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        scales = state.absmax
        module.state_dict()
        if not state.nested:
            state.absmax = scales.T.reshape(-1).float()


def requantized(module: Any, weight: Tensor) -> nn.Module:
    """A layer like ``module``, with its bias and settings, that holds ``weight (out, in)``, rounded to its bits."""
    bnb = _bitsandbytes()
    sizes = {"input_features": module.in_features, "output_features": module.out_features, "device": "meta"}
    device, weight = module.weight.device, weight.to("cpu")  # both classes quantize on the way from the CPU
    layer: Any
    if isinstance(module, bnb.nn.Linear8bitLt):
        layer = bnb.nn.Linear8bitLt(**sizes, bias=False, has_fp16_weights=False, threshold=module.state.threshold)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        old = module.weight
        settings = {"compress_statistics": old.compress_statistics, "quant_type": old.quant_type}
        layer = bnb.nn.Linear4bit(**sizes, **settings, bias=False, compute_dtype=module.compute_dtype)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, blocksize=old.blocksize, **settings).to(device)
    layer.bias = module.bias
    return layer.train(module.training)


def dequantized(module: Any, dtype: torch.dtype) -> nn.Linear:
    """A plain linear that computes what ``module`` does, up to the rounding of its inputs."""
    layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    layer.weight = nn.Parameter(dense_weight(module).to(dtype), module.weight.requires_grad)
    if module.bias is not None:
        layer.bias = nn.Parameter(module.bias.detach().to(dtype), module.bias.requires_grad)
    return layer.train(module.training)


def _bitsandbytes() -> Any:
    """The library, where something has imported it; a model cannot hold its layers otherwise."""
    return sys.modules.get("bitsandbytes")
