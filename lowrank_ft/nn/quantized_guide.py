"""A fixed guide in fewer bits: stored packed, unpacked for each product, and never kept unpacked.

    16   bfloat16
    8    dynamic 8-bit floats, one scale for 256 of them (Dettmers et al. 2022, arXiv 2110.02861)
    4    NF4, one scale for 64 numbers (Dettmers et al. 2023, arXiv 2305.14314)

The scale of a block is its largest magnitude, so the error is a share of the matrix that is stored. For a residual
guide that matrix is ``R = W - U0 V0``, and the factors hold the rest exactly: the error scales with ``|R|``, not with
``|W|``. Only a guide that is not trained can be packed.

Everything is stored as bytes (uint8 parameters without gradient). A cast of the model, mixed precision and FSDP's
parameter dtype convert floating-point tensors only, so none of them can round a packed number or a scale.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ft.errors import ConfigError, MissingPackageError

GUIDE_BITS = (16, 8, 4)
_BLOCK = {8: 256, 4: 64}  # numbers that share a float32 scale

Shape = tuple[int, int]


def check_guide_bits(guide: str | None, bits: int | None, device: torch.device | str | None = None) -> None:
    """Raise unless a guide of this kind can be stored in ``bits``, and, with ``device``, be used there.

    Args:
        guide: one of ``GUIDES``, or None (or ``none``) for no guide.
        bits: one of ``GUIDE_BITS``, or None for the dtype of the factors, which every guide can have.
        device: where the model is going to be trained. A small matrix is packed and unpacked on it.

    Raises:
        ConfigError: bits out of range, no guide, a guide that is trained, or a device that lacks the mode.
        MissingPackageError: 8 and 4 bits need bitsandbytes.
    """
    if bits is None:
        return
    if bits not in GUIDE_BITS:
        raise ConfigError(f"guide_bits is {bits}; it must be one of {', '.join(map(str, GUIDE_BITS))}, or left out")
    if guide in (None, "none"):
        raise ConfigError(f"guide_bits is {bits}, and there is no guide to store; leave it out, or name a guide")
    if guide == "dense":
        raise ConfigError(
            f"guide_bits is {bits}, and a dense guide is trained, which takes its full precision; "
            "choose the guide residual or frozen, or leave guide_bits out"
        )
    if bits == 16 or device is None:
        return
    functional = _bitsandbytes()
    try:
        packed, scales = _quantize(functional, torch.ones(2, 64, device=device), bits)
        code = _dynamic_code(bits)
        _dequantize(functional, packed, scales, None if code is None else code.to(device), (2, 64), torch.float32)
    except (RuntimeError, ValueError, NotImplementedError, AttributeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise ConfigError(
            f"guide_bits is {bits}, and bitsandbytes cannot do that on the device {device} ({reason}); "
            "use guide_bits 16, or another device"
        ) from error


class QuantizedGuideLinear(nn.Module):
    """``y = x W^T`` for a fixed ``W (out, in)`` that is stored in 16, 8 or 4 bits a number.

    The sibling of :class:`lowrank_ft.nn.GuideLinear`. ``W`` is unpacked in forward, and once more in backward, where
    only the gradient to ``x`` needs it; in between there are the packed bytes alone. It is unpacked to the dtype of
    ``x``, or to that of autocast.

    Attributes:
        weight: the packed numbers, uint8; for 16 bits ``(out, 2 in)``, for 8 ``(out, in)``, for 4 ``(out in / 2,)``.
        absmax: the bytes of the float32 scales; None for 16 bits.
    """

    absmax: nn.Parameter | None

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.out_features, self.in_features = weight.shape
        packed, scales = pack(weight.detach(), bits)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.absmax = None if scales is None else nn.Parameter(scales, requires_grad=False)
        self._code = _dynamic_code(bits)  # a constant: not a buffer, which DDP would send around and casts would round

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        result: Tensor = _Product.apply(x.to(dtype), *self._stored())
        return result

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``W`` as it is used, ``(out, in)``."""
        packed, scales, code, shape = self._stored()
        return unpack(packed, scales, code, shape, dtype)

    def _stored(self) -> tuple[Tensor, Tensor | None, Tensor | None, Shape]:
        if self._code is not None and self._code.device != self.weight.device:
            self._code = self._code.to(self.weight.device)
        return self.weight, self.absmax, self._code, (self.out_features, self.in_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class _Product(torch.autograd.Function):
    """``x W^T`` whose graph holds the packed ``W``; ``F.linear`` would keep the unpacked one until backward."""

    @staticmethod
    def forward(x: Tensor, packed: Tensor, scales: Tensor | None, code: Tensor | None, shape: Shape) -> Tensor:
        return F.linear(x, unpack(packed, scales, code, shape, x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *stored, ctx.shape = inputs[1:]
        ctx.save_for_backward(*stored)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, scales, code = ctx.saved_tensors
        return grad @ unpack(packed, scales, code, ctx.shape, grad.dtype), None, None, None, None


def pack(weight: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """``W (out, in)`` as bytes, and the bytes of its scales, both on its device."""
    if bits == 16:
        return weight.to(torch.bfloat16).contiguous().view(torch.uint8).clone(), None
    packed, scales = _quantize(_bitsandbytes(), weight.float().contiguous(), bits)
    return packed, scales.view(torch.uint8)


def unpack(packed: Tensor, scales: Tensor | None, code: Tensor | None, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`pack`, up to rounding, ``(out, in)``. ``code (256,)`` is there for 8 bits alone."""
    if scales is None:
        return packed.view(torch.bfloat16).to(dtype)
    return _dequantize(_bitsandbytes(), packed, scales.view(torch.float32), code, shape, dtype)


def guide_label(layer: Any) -> str:
    """What a checkpoint records of a layer's guide: its kind, and its bits where it is packed."""
    bits = getattr(layer.guide, "bits", None)
    kind = str(getattr(layer, "kind", "peft"))
    return kind if bits is None else f"{kind} in {bits} bits"


def guide_bytes(shape: Shape, bits: int) -> int:
    """Bytes that :func:`pack` makes of a matrix of this shape."""
    count = shape[0] * shape[1]
    if bits == 16:
        return 2 * count
    return -(-count * bits // 8) + 4 * -(-count // _BLOCK[bits])


def _quantize(functional: Any, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    if bits == 4:
        packed, state = functional.quantize_4bit(weight, blocksize=_BLOCK[4], quant_type="nf4")
        return packed.flatten(), state.absmax
    packed, state = functional.quantize_blockwise(weight, blocksize=_BLOCK[8])
    return packed, state.absmax


def _dequantize(
    functional: Any, packed: Tensor, scales: Tensor, code: Tensor | None, shape: Shape, dtype: torch.dtype
) -> Tensor:
    known = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
    if code is None:
        state = functional.QuantState(scales, torch.Size(shape), blocksize=_BLOCK[4], quant_type="nf4", dtype=known)
        return functional.dequantize_4bit(packed.view(-1, 1), state).to(dtype)
    state = functional.QuantState(scales, code=code, blocksize=_BLOCK[8], dtype=known)
    return functional.dequantize_blockwise(packed, state).to(dtype)


def _dynamic_code(bits: int) -> Tensor | None:
    """The 256 values of the 8-bit float, to which bitsandbytes quantizes by default; None for other bits."""
    return _bitsandbytes().create_dynamic_map() if bits == 8 else None


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise MissingPackageError(
            "guides in 8 and 4 bits need bitsandbytes: pip install lowrank-ft[quantized]; guide_bits 16 needs nothing"
        ) from error
    return functional
