"""A residual guide in four bits: stored packed as NF4, unpacked for each product, and never kept unpacked.

NF4 has one scale for 64 numbers (Dettmers et al. 2023, arXiv 2305.14314), their largest magnitude, so the error is a
share of the matrix that is stored. That is ``R = W - U0 V0``, and the factors hold the rest exactly: the error scales
with ``|R|``, not with ``|W|``. A dense guide is trained and cannot be packed.

Everything is stored as bytes (uint8 parameters without gradient). A cast of the model, mixed precision and FSDP's
parameter dtype convert floating-point tensors only, so none of them can round a packed number or a scale.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ft.errors import ConfigError, MissingPackageError

GUIDE_BITS = 4
_BLOCK = 64  # numbers that share a float32 scale

Shape = tuple[int, int]


def check_guide_bits(guide: str | None, bits: int | None, device: torch.device | str | None = None) -> None:
    """Raise unless a guide of this kind can be stored in ``bits``, and, with ``device``, be used there.

    Args:
        guide: one of ``GUIDES``, or None (or ``none``) for no guide.
        bits: ``GUIDE_BITS``, or None for the dtype of the factors, which every guide can have.
        device: where the model is going to be trained. A small matrix is packed and unpacked on it.

    Raises:
        ConfigError: bits out of range, no guide, a guide that is trained, or a device that cannot pack.
        MissingPackageError: bitsandbytes is not installed.
    """
    if bits is None:
        return
    if bits != GUIDE_BITS:
        raise ConfigError(f"guide_bits is {bits}; it must be {GUIDE_BITS}, or left out")
    if guide in (None, "none"):
        raise ConfigError(f"guide_bits is {bits}, and there is no guide to store; leave it out, or name a guide")
    if guide == "dense":
        raise ConfigError(
            f"guide_bits is {bits}, and a dense guide is trained, which takes its full precision; "
            "choose the guide residual, or leave guide_bits out"
        )
    if device is None:
        return
    functional = _bitsandbytes()
    try:
        packed, scales = _quantize(functional, torch.ones(2, 64, device=device))
        _dequantize(functional, packed, scales, (2, 64), torch.float32)
    except (RuntimeError, ValueError, NotImplementedError, AttributeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise ConfigError(
            f"guide_bits is {bits}, and bitsandbytes cannot do that on the device {device} ({reason}); "
            "leave it out, or use another device"
        ) from error


class QuantizedGuideLinear(nn.Module):
    """``y = x W^T`` for a fixed ``W (out, in)`` that is stored in four bits a number.

    The sibling of :class:`lowrank_ft.nn.GuideLinear`. ``W`` is unpacked in forward, and once more in backward, where
    only the gradient to ``x`` needs it; in between there are the packed bytes alone. It is unpacked to the dtype of
    ``x``, or to that of autocast.

    Attributes:
        weight: the packed numbers, uint8 ``(out in / 2,)``.
        absmax: the bytes of the float32 scales.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.bits = GUIDE_BITS
        self.out_features, self.in_features = weight.shape
        packed, scales = pack(weight.detach())
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.absmax = nn.Parameter(scales, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        result: Tensor = _Product.apply(x.to(dtype), *self._stored())
        return result

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``W`` as it is used, ``(out, in)``."""
        return unpack(*self._stored(), dtype)

    def _stored(self) -> tuple[Tensor, Tensor, Shape]:
        return self.weight, self.absmax, (self.out_features, self.in_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class _Product(torch.autograd.Function):
    """``x W^T`` whose graph holds the packed ``W``; ``F.linear`` would keep the unpacked one until backward."""

    @staticmethod
    def forward(x: Tensor, packed: Tensor, scales: Tensor, shape: Shape) -> Tensor:
        return F.linear(x, unpack(packed, scales, shape, x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *stored, ctx.shape = inputs[1:]
        ctx.save_for_backward(*stored)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, scales = ctx.saved_tensors
        return grad @ unpack(packed, scales, ctx.shape, grad.dtype), None, None, None


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``W (out, in)`` as bytes, and the bytes of its scales, both on its device."""
    packed, scales = _quantize(_bitsandbytes(), weight.float().contiguous())
    return packed, scales.view(torch.uint8)


def unpack(packed: Tensor, scales: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`pack`, up to rounding, ``(out, in)``."""
    return _dequantize(_bitsandbytes(), packed, scales.view(torch.float32), shape, dtype)


def guide_label(layer: Any) -> str:
    """What a checkpoint records of a layer's guide: its kind, and its bits where it is packed."""
    bits = getattr(layer.guide, "bits", None)
    kind = str(getattr(layer, "kind", "peft"))
    return kind if bits is None else f"{kind} in {bits} bits"


def guide_bytes(shape: Shape) -> int:
    """Bytes that :func:`pack` makes of a matrix of this shape."""
    count = shape[0] * shape[1]
    return -(-count // 2) + 4 * -(-count // _BLOCK)


def _quantize(functional: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    packed, state = functional.quantize_4bit(weight, blocksize=_BLOCK, quant_type="nf4")
    return packed.flatten(), state.absmax


def _dequantize(functional: Any, packed: Tensor, scales: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    known = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
    state = functional.QuantState(scales, torch.Size(shape), blocksize=_BLOCK, quant_type="nf4", dtype=known)
    return functional.dequantize_4bit(packed.view(-1, 1), state).to(dtype)


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise MissingPackageError("guides in 4 bits need bitsandbytes: pip install lowrank-ft[quantized]") from error
    return functional
