"""A linear with factors beside it.

With ``V (r, in)``, ``U (out, r)``, their initial values ``V0``, ``U0``, and the share ``alpha`` of the guide::

    residual   y = U (V x) + alpha * (W x - U0 (V0 x)) + bias
    none       y = U (V x) + bias

An adapter *replaces* ``W``. Several active adapters add up their changes to it, ``y = W x + sum_i (y_i - W x) + bias``,
as in other PEFT methods. At alpha 0 a single adapter never touches ``W``.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ft.errors import NonFiniteError
from lowrank_ft.factorization.ranks import resolve_rank
from lowrank_ft.factorization.solvers import Factors, truncated_svd
from lowrank_ft.factorization.targets import linear_spec, refuse_offloaded
from lowrank_ft.integrations.peft.config import LowRankConfig
from lowrank_ft.integrations.peft.quantized import dense_weight, is_quantized, keep_unpacked, requantized


class LowRankLayer(BaseTunerLayer):
    """Adapter state of one linear, one entry per adapter, and the protocol of :mod:`lowrank_ft.nn.guided`.

    Attributes:
        lowrank_U, lowrank_V: the factors, ``(out, r)`` and ``(r, in)``.
        lowrank_U0, lowrank_V0: their initial values, for the residual guide only. Saved buffers: nothing trains them.
        lowrank_alpha: share of the guide, float32 scalars, not saved (the config carries it).
        lowrank_guide: ``residual``, or ``none`` from when it is dropped.
        lowrank_share: ``alpha`` as a number, for saving.
        lowrank_guided: the adapters whose alpha is not 0. Forward decides by this set, so a compiled graph changes
            once, when guidance ends, and not with every value of alpha.
        lowrank_fixed: adapters whose guide is never skipped, such as the reference of a preference trainer.
        guide_enabled: False skips the guides without forgetting alpha (:func:`lowrank_ft.nn.compact_view`).
        guide_gate: False where stochastic guidance leaves the guides out of this step (:func:`lowrank_ft.nn.set_gates`).
    """

    guide_state = ("lowrank_U0", "lowrank_V0")

    adapter_layer_names: tuple[str, ...] = ("lowrank_U", "lowrank_V")
    other_param_names: tuple[str, ...] = ("lowrank_U0", "lowrank_V0", "lowrank_guide", "lowrank_share")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        self.base_layer = base_layer
        keep_unpacked(base_layer)
        self.name = name
        self.transposed = linear_spec(name, self.get_base_layer()).transposed
        self.out_features, self.in_features = linear_spec(name, self.get_base_layer()).shape
        self.lowrank_U, self.lowrank_V = nn.ParameterDict({}), nn.ParameterDict({})
        self.lowrank_U0, self.lowrank_V0 = BufferDict({}, persistent=True), BufferDict({}, persistent=True)
        self.lowrank_alpha = BufferDict({}, persistent=False)
        self.lowrank_guide: dict[str, str] = {}
        self.lowrank_share: dict[str, float] = {}
        self.lowrank_guided: set[str] = set()
        self.lowrank_fixed: set[str] = set()
        self.guide_enabled = True
        self.guide_gate = True
        self.cast_input_dtype_enabled = True
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._unfilled: set[str] = set()
        self._unmerged_weight: Tensor | None = None
        self._unmerged_layer: list[nn.Module] = []  # a quantized base layer while another is in its place

    # Adapters come and go

    def update_layer(self, adapter_name: str, r: int | float, config: LowRankConfig) -> None:
        """Add an adapter of rank ``r`` (or fraction of full rank).

        Raises:
            RankError: ``r`` is out of range for this linear.
            NonFiniteError: ``W`` holds NaN or infinity.
        """
        rank = resolve_rank(r, (self.out_features, self.in_features), self.name)
        self.lowrank_U[adapter_name] = nn.Parameter(torch.zeros(self.out_features, rank))
        self.lowrank_V[adapter_name] = nn.Parameter(torch.zeros(rank, self.in_features))
        if config.guide == "residual":
            self.lowrank_U0[adapter_name] = torch.zeros(self.out_features, rank)
            self.lowrank_V0[adapter_name] = torch.zeros(rank, self.in_features)
        self.lowrank_alpha[adapter_name] = torch.zeros((), device=self.weight.device)
        self.lowrank_guide[adapter_name] = config.guide
        self._set_share(adapter_name, config.alpha)
        # On the meta device (low_cpu_mem_usage) the values are loaded afterwards.
        if not (self.lowrank_U[adapter_name].is_meta or self.weight.is_meta):
            if not config.init_weights:
                self._fill(adapter_name, _random_factors(self.out_features, rank, self.in_features))
            elif config.weights_may_follow:
                self._unfilled.add(adapter_name)
            else:
                self._fill(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._unfilled.discard(adapter_name)
        self.lowrank_guided.discard(adapter_name)
        self.lowrank_fixed.discard(adapter_name)
        # Not among other_param_names, because PEFT would cast it to the dtype of the base layer.
        if adapter_name in self.lowrank_alpha:
            del self.lowrank_alpha[adapter_name]

    @torch.no_grad()
    def _fill(self, adapter_name: str, factors: Factors | None = None) -> None:
        """Write the initial values in place, into the factors and into the copies that the residual guide keeps."""
        u, v = self.lowrank_U[adapter_name], self.lowrank_V[adapter_name]
        if factors is None:
            factors = truncated_svd(self._dense_weight(), v.shape[0], f"{self.name}.weight")
        u.copy_(factors.U)
        v.copy_(factors.V)
        if adapter_name in self.lowrank_U0:
            self.lowrank_U0[adapter_name].copy_(factors.U)
            self.lowrank_V0[adapter_name].copy_(factors.V)

    def fill_pending(self) -> None:
        """Do the SVDs that were put off for weights that then never came (a loaded config used for a new adapter).

        Such factors are still all zero, which loaded or trained ones never are.
        """
        for adapter_name in list(self._unfilled):
            if not (self.lowrank_U[adapter_name].any() or self.lowrank_V[adapter_name].any()):
                self._fill(adapter_name)
            self._unfilled.discard(adapter_name)

    def _present(self, adapter_names: Sequence[str]) -> list[str]:
        return [name for name in adapter_names if name in self.lowrank_U]

    # The guide

    @property
    def guide(self) -> nn.Module | None:
        """None when no active adapter has a guide; otherwise a module that has no parameters.

        It stands for the guide where :mod:`lowrank_ft.nn.guided` asks for one: ``W`` is PEFT's, and never trained.
        """
        kinds = {self.lowrank_guide[name] for name in self._present(self.active_adapters)}
        return self.lowrank_U0 if kinds - {"none"} else None

    def set_alpha(self, alpha: float) -> None:
        """Set the share of the guide, 0 to 1, of the active adapters that have one."""
        for name in self._present(self.active_adapters):
            if self.lowrank_guide[name] != "none":
                self._set_share(name, alpha)

    def drop_guide(self) -> list[Tensor]:
        """Let the guides of the active adapters go: from now on they compute ``U (V x) + bias``.

        Returns:
            What was let go, the initial factors of residual guides. PEFT keeps ``W`` itself.
        """
        dropped = []
        self.guide_gate = True
        for name in self._present(self.active_adapters):
            self._set_share(name, 0.0)
            self.lowrank_guide[name] = "none"
            if name in self.lowrank_U0:
                dropped += [self.lowrank_U0.pop(name), self.lowrank_V0.pop(name)]
        return dropped

    def _set_share(self, adapter_name: str, alpha: float) -> None:
        self.lowrank_alpha[adapter_name].fill_(alpha)
        self.lowrank_share[adapter_name] = float(alpha)
        (self.lowrank_guided.add if alpha else self.lowrank_guided.discard)(adapter_name)

    def fix_guide(self, adapter_name: str) -> None:
        """Make of an adapter, if it is there and guided, what the active one is at alpha = 1, for good."""
        if self.lowrank_guide.get(adapter_name, "none") == "none" or adapter_name in self.active_adapters:
            return
        for name in self._present(self.active_adapters):
            if name in self.lowrank_U0 and self.lowrank_U0[name].shape == self.lowrank_U0[adapter_name].shape:
                self.lowrank_U0[adapter_name].copy_(self.lowrank_U0[name])
                self.lowrank_V0[adapter_name].copy_(self.lowrank_V0[name])
        self._set_share(adapter_name, 1.0)
        self.lowrank_fixed.add(adapter_name)

    def _is_guided(self, adapter_name: str) -> bool:
        return adapter_name in self.lowrank_guided and (self.guide_enabled or adapter_name in self.lowrank_fixed)

    # Weights

    def _dense_weight(self) -> Tensor:
        """``W (out, in)``, also while something is merged into the base layer."""
        return dense_weight(self.get_base_layer()) if self._unmerged_weight is None else self._unmerged_weight

    def effective_weight(self, adapter_names: Sequence[str]) -> Tensor:
        """The matrix ``(out, in)`` that these adapters compute together, in at least float32.

        That is ``U @ V`` for a single adapter at alpha 0.
        """
        self.fill_pending()
        dense = self._dense_weight()
        dtype = torch.promote_types(dense.dtype, torch.float32)
        names = self._present(adapter_names)
        result, dense_share = torch.zeros_like(dense, dtype=dtype), 1.0 - len(names)
        for name in names:
            product = self.lowrank_U[name].detach().to(dtype) @ self.lowrank_V[name].detach().to(dtype)
            if self._is_guided(name):
                share = self.lowrank_share[name]
                product -= share * (self.lowrank_U0[name].to(dtype) @ self.lowrank_V0[name].to(dtype))
                dense_share += share
            result += product
        return result if dense_share == 0 else result + dense_share * dense.to(dtype)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter adds to the base layer's weight, in that weight's layout and dtype."""
        dense = self._dense_weight()
        delta = (self.effective_weight([adapter_name]) - dense).to(dense.dtype)
        return delta.T if self.transposed else delta

    def _store(self, weight: Tensor) -> None:
        base: Any = self.get_base_layer()
        if is_quantized(base):
            self._unmerged_layer = self._unmerged_layer or [base]
            self.base_layer = requantized(base, weight.to(self._dense_weight().dtype))
            return
        base.weight.data = (weight.T if self.transposed else weight).to(base.weight.dtype).contiguous()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put what the adapters compute now into the base layer's weight: ``U @ V`` at alpha 0.

        The dense weight is kept until :meth:`unmerge` puts it back bit for bit, so memory holds it twice meanwhile.

        Raises:
            NonFiniteError: ``safe_merge`` and the result holds NaN or infinity; the base layer is left alone.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        weight = self.effective_weight([*self.merged_adapters, *names])
        if safe_merge and not torch.isfinite(weight).all():
            raise NonFiniteError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        self._unmerged_weight = self._dense_weight()
        self._store(weight)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the dense weight back."""
        if self._unmerged_weight is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._unmerged_layer:
            self.base_layer = self._unmerged_layer.pop().to(self.weight.device)
        else:
            self._store(self._unmerged_weight.to(self.weight.device))
        self._unmerged_weight = None
        self.merged_adapters.clear()


class LowRankAdapterLinear(nn.Module, LowRankLayer):
    """``nn.Linear`` or ``Conv1D`` with low-rank adapters."""

    def __init__(
        self, base_layer: nn.Module, name: str, adapter_name: str, r: int | float, config: LowRankConfig
    ) -> None:
        super().__init__()
        LowRankLayer.__init__(self, base_layer, name)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self._present(self.active_adapters)
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if self._unfilled:
            self.fill_pending()
        return self._adapted(x, names)

    def _adapted(self, x: Tensor, names: list[str]) -> Tensor:
        base: Any = self.get_base_layer()
        if hasattr(base, "_hf_hook"):  # of accelerate, whose offloading fills only the weights of what is called
            refuse_offloaded(base, self.name)
        dense_share: float | Tensor = 1 - len(names)
        terms = []
        for name in names:
            u, v = self.lowrank_U[name], self.lowrank_V[name]
            inputs = self._cast_input_dtype(x, v.dtype)
            y = F.linear(F.linear(inputs, v), u)
            if self.guide_gate and self._is_guided(name):
                alpha = self.lowrank_alpha[name]
                y = y - alpha * F.linear(F.linear(inputs, self.lowrank_V0[name]), self.lowrank_U0[name])
                dense_share = dense_share + alpha
            terms.append(y)
        result = sum(terms[1:], start=terms[0])
        if isinstance(dense_share, Tensor) or dense_share != 0:
            result = result + dense_share * self._dense_output(x)
        if base.bias is not None:
            result = result + base.bias.to(result.dtype)
        # Adapters stay in float32 beside a half-precision base; autocast picks the dtype of the output itself.
        return result if _autocasts(x.device.type) else result.to(x.dtype)

    def _dense_output(self, x: Tensor) -> Tensor:
        """``W x``, without the bias."""
        base: Any = self.get_base_layer()
        if is_quantized(base):
            # Its own kernels, which keep no dequantized copy of W for the backward pass.
            y = base(x)
            return y if base.bias is None else y - base.bias
        weight = base.weight.T if self.transposed else base.weight
        return F.linear(self._cast_input_dtype(x, weight.dtype), weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LowRankAdapterLinear":
        super()._apply(fn, recurse)
        for name, alpha in self.lowrank_alpha.items():
            if alpha.dtype != torch.float32:  # .to(bfloat16) would round the schedule
                self.lowrank_alpha[name] = alpha.float().fill_(self.lowrank_share[name])
        if self._unmerged_weight is not None:
            self._unmerged_weight = fn(self._unmerged_weight)
        return self

    def __repr__(self) -> str:
        return "lowrank." + super().__repr__()


def _autocasts(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _random_factors(out_features: int, rank: int, in_features: int) -> Factors:
    """Gaussian factors of equal scale, whose product has entries of variance ``1 / in``."""
    std = (rank * in_features) ** -0.25
    return Factors(torch.randn(out_features, rank) * std, torch.randn(rank, in_features) * std)
