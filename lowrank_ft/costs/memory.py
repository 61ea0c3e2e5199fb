"""Peak memory of a training step, from shapes alone.

    peak = weights + guide + optimizer state + max over the step of (activations + gradients + temporary tensors)

    at the loss          all activations, and 12 bytes for each logit
    early in backward    all activations, the head's gradient, and what one block's backward needs
    late in backward     one block's activations and all gradients
    optimizer step       all gradients, and copies that AdamW makes

Gradients come while activations go, so the peak is less than the sum of all parts. Activations are what autograd keeps
of a decoder-only transformer of transformers with ``sdpa`` attention, which holds no ``length x length`` matrix. The
estimate is of one process and of tensors: what a device's allocator and libraries take on top, commonly 0.5 to 1 GB on
a GPU, is not in it, nor are copies that DDP keeps of the gradients. ``tests/benchmarks/memory.py`` checks it.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from lowrank_ft.errors import ConfigError, require_choice
from lowrank_ft.factorization.plan import Plan
from lowrank_ft.factorization.targets import find_linears
from lowrank_ft.nn.quantized_guide import GUIDE_BITS, guide_bytes

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_LOGIT = 12  # at the peak three of: logits, their float32 copy, the log-probabilities, the gradients of both
_TORCH = ("adamw_torch", "adamw_torch_fused")  # moments in the dtype of the weights
_FLOAT32 = ("paged_adamw_32bit",)
_BLOCKWISE = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
OPTIMIZERS = (*_TORCH, *_BLOCKWISE, *_FLOAT32)


@dataclass(frozen=True)
class Architecture:
    """What the activations of a decoder depend on; lengths in numbers per token.

    Attributes:
        blocks: how many.
        hidden: width of the residual stream.
        ffn: inner width of the feed-forward part.
        queries, keys: width of all heads' queries, and of their keys (or values).
        heads: how many.
        vocabulary: logits per token.
        tied: whether head and embedding are one matrix.
        rms: RMSNorm, which keeps its normed input too, rather than LayerNorm.
        ffn_kept: tensors of width ``ffn`` that are kept: of ``down(silu(gate) * up)`` four, of ``down(gelu(up))`` two.
        attention_readers, ffn_readers: linears that read the norm's output; mixed precision keeps a copy for each.
        dropout, attention_dropout: whether there is any.
        largest: numbers in the largest parameter.
    """

    blocks: int
    hidden: int
    ffn: int
    queries: int
    keys: int
    heads: int
    vocabulary: int
    tied: bool
    rms: bool
    ffn_kept: int
    attention_readers: int
    ffn_readers: int
    dropout: bool
    attention_dropout: bool
    largest: int

    @classmethod
    def of(cls, model: nn.Module) -> "Architecture":
        """Read off a causal language model of transformers, which may be on the meta device.

        Raises:
            ConfigError: its config lacks the sizes of a decoder, or it is a mixture of experts.
        """
        config: Any = getattr(model, "config", None)
        sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
        missing = [name for name in sizes if not isinstance(getattr(config, name, None), int)]
        experts = [n for n in ("num_experts", "num_local_experts", "n_routed_experts") if getattr(config, n, None)]
        if missing or experts or getattr(config, "is_encoder_decoder", False):
            why = f"its config has no {missing[0]}" if missing else "it has experts or an encoder"
            raise ConfigError(
                f"the memory of {type(model).__name__} cannot be estimated: {why}; only dense decoders are supported"
            )
        linears = find_linears(model)
        leaves = {spec.name.rpartition(".")[2] for spec in linears}
        gated = bool(leaves & {"gate_proj", "gate_up_proj", "w1"})
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        activation = str(getattr(config, "hidden_act", None) or getattr(config, "activation_function", "silu"))
        plain = {"relu": 1, "gelu_new": 5}.get(activation, 2)  # gelu_new is written out in separate operations
        return cls(
            blocks=config.num_hidden_layers, hidden=config.hidden_size, ffn=inner, queries=heads * head,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * head, heads=heads, vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings), rms=hasattr(config, "rms_norm_eps"), ffn_kept=4 if gated else plain,
            attention_readers=3 if leaves & {"k_proj", "key", "k_lin"} else 1, ffn_readers=2 if gated else 1,
            dropout=any(getattr(config, n, 0) for n in ("resid_pdrop", "hidden_dropout", "hidden_dropout_prob")),
            attention_dropout=any(getattr(config, n, 0) for n in ("attn_pdrop", "attention_dropout")),
            largest=max(p.numel() for p in model.parameters()),
        )  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How it is trained; names and meanings of the options of a run.

    Raises:
        ConfigError: a value that such an option could not have.
    """

    batch_size: int = 8
    block_size: int = 1024
    dtype: str = "float32"
    mixed_precision: str = "no"
    optim: str = "adamw_torch"
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    lora_r: int = 16
    device: str = "cuda"

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, tuple(DTYPE_BYTES))
        require_choice("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        require_choice("optim", self.optim, OPTIMIZERS)
        for name in ("batch_size", "block_size", "gradient_accumulation_steps", "lora_r"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")

    @property
    def tokens(self) -> int:
        return self.batch_size * self.block_size


@dataclass(frozen=True)
class Mode:
    """A way to fine-tune.

    Attributes:
        name: as it is shown.
        method: ``full``, ``lora``, ``qlora`` or ``factors``, the one of this package.
        guide: for ``factors``: none, residual or dense.
        guide_bits: as the option of that name.
        trainable: for ``factors``, as the option of that name: all, factors, lora or leading.
    """

    name: str
    method: str
    guide: str = "none"
    guide_bits: int | None = None
    trainable: str = "all"

    @property
    def adapters(self) -> bool:
        return self.method in ("lora", "qlora") or self.trainable in ("lora", "leading")


MODES = (
    Mode("full fine-tuning", "full"),
    Mode("LoRA", "lora"),
    Mode("QLoRA", "qlora"),
    Mode("no guide", "factors"),
    Mode("guide residual", "factors", "residual"),
    Mode(f"guide residual, {GUIDE_BITS} bits", "factors", "residual", GUIDE_BITS),
    Mode("guide dense", "factors", "dense"),
)


@dataclass(frozen=True)
class Estimate:
    """Bytes.

    Attributes:
        weights: of the model, adapters included.
        guide: of the guide's matrices.
        optimizer: the moments.
        gradients: all, as they are when backward ends.
        activations: kept for backward, as they are when it begins; without the logits.
        peak: of the whole step.
    """

    weights: int
    guide: int
    optimizer: int
    gradients: int
    activations: int
    peak: int


def estimate(plan: Plan, architecture: Architecture, mode: Mode, settings: Settings) -> Estimate:
    """Peak memory of one step of training in ``mode``."""
    size = DTYPE_BYTES[settings.dtype]
    stored = _Stored.of(plan, mode, settings)
    gradients = size * stored.trained
    state = round(stored.trained * _state_bytes(settings))
    casts = 2 * stored.cast if settings.mixed_precision != "no" and size == 4 else 0
    one, every, ends = _activations(plan, architecture, mode, settings)
    kept = ends + casts + every
    head = architecture.vocabulary * architecture.hidden * size * (stored.trained_rest > 0)
    in_backward = 3 * architecture.ffn * _width(settings) * settings.tokens + stored.unpacked
    logit = settings.tokens * architecture.vocabulary
    copies = _copies_of_the_step(architecture, stored, settings)
    checkpointed = one if settings.gradient_checkpointing else 0
    moments = {
        "loss": kept + _LOGIT * logit,
        "head": kept + head + 2 * size * logit,
        "early": kept + head + checkpointed + in_backward,
        "late": gradients + casts + one + max(in_backward, head if architecture.tied else 0),
        "step": gradients + copies,
    }
    if settings.gradient_accumulation_steps > 1:  # the gradients of the batches before are there all the time
        moments = {k: v + gradients * (k in ("loss", "head", "early")) for k, v in moments.items()}
    fixed = stored.weights + stored.guide + state
    return Estimate(stored.weights, stored.guide, state, gradients, kept, fixed + max(moments.values()))


@dataclass(frozen=True)
class _Stored:
    """Bytes of weights and guide; numbers that are trained, of these outside of the plan, and that autocast copies.

    ``unpacked`` are the bytes of the largest matrix that is unpacked for a product.
    """

    weights: int
    guide: int
    trained: int
    trained_rest: int
    cast: int
    unpacked: int

    @classmethod
    def of(cls, plan: Plan, mode: Mode, settings: Settings) -> "_Stored":
        size, r = DTYPE_BYTES[settings.dtype], settings.lora_r
        rest = plan.model_parameters - plan.target_parameters
        factored = [p for p in plan.linears if p.rank is not None]
        ours = mode.method == "factors"
        linears = plan.trained_parameters if ours else plan.target_parameters
        work = 2 if settings.mixed_precision != "no" else size
        matrices = [p.shape for p in (factored if ours else plan.linears)]
        largest = max((a * b for a, b in matrices), default=0)
        guide = cast = unpacked = 0
        if ours and mode.guide != "none":
            dense = sum(a * b for a, b in matrices)
            guide = sum(guide_bytes(s) for s in matrices) if mode.guide_bits else size * dense
            cast = 0 if mode.guide_bits else dense
            unpacked = work * largest if mode.guide_bits else 0
        weights, trained, trained_rest = size * (rest + linears), rest + linears, rest
        if mode.method == "qlora":
            weights = size * rest + sum(guide_bytes(s) for s in matrices)
            unpacked = work * largest
        if mode.adapters and ours:
            trained = sum(r * (p.shape[0] + p.shape[1] + 2 * p.rank) for p in factored if p.rank)
        elif mode.adapters:
            trained = sum(r * (a + b) for a, b in matrices)
        elif mode.trainable == "factors":
            trained = sum(p.trained_parameters for p in factored)
        if mode.adapters:
            weights += size * trained
        if mode.adapters or mode.trainable == "factors":
            trained_rest = 0
        if mode.guide == "dense":
            trained += sum(a * b for a, b in matrices)
        cast += trained if mode.method == "qlora" else rest + linears + (trained if mode.adapters else 0)
        return cls(weights, guide, trained, trained_rest, cast, unpacked)


def _state_bytes(settings: Settings) -> float:
    """Bytes of both moments, for each number that is trained."""
    if settings.optim in _BLOCKWISE:
        return 2 + 2 * 4 / 256  # each with a float32 scale for 256 of them
    return 2 * DTYPE_BYTES[settings.dtype] if settings.optim in _TORCH else 8


def _width(settings: Settings) -> int:
    """Bytes of a linear's output."""
    return 2 if settings.mixed_precision != "no" else DTYPE_BYTES[settings.dtype]


def _activations(plan: Plan, a: Architecture, mode: Mode, settings: Settings) -> tuple[int, int, int]:
    """Bytes kept of one block, of all blocks as they are when backward begins, and of what is around the blocks."""
    width, mixed = _width(settings), settings.mixed_precision != "no"
    full = 4 if mixed else DTYPE_BYTES[settings.dtype]  # of the residual stream
    frozen = mode.adapters or mode.trainable == "factors"

    def norm(readers: int) -> int:
        """Its input (RMSNorm computes in float32), what it keeps for its weight, and what the linears read."""
        within = 4 if a.rms else full
        scaled = full if a.rms and not frozen else 0
        return within + scaled + (width * readers if mixed else width)

    per_token = a.hidden * (norm(a.attention_readers) + norm(a.ffn_readers))
    per_token += width * (2 * a.queries + 2 * a.keys + a.ffn_kept * a.ffn) + 4 * a.heads
    if a.dropout:
        per_token += 2 * a.hidden * (full if settings.device == "cpu" else 1)
    if a.attention_dropout and settings.device == "cpu":  # the CPU has no fused attention with dropout
        per_token += 3 * width * a.heads * settings.block_size
    one = settings.tokens * per_token + _inner(plan, a, mode, settings)
    every = settings.tokens * a.hidden * full * a.blocks if settings.gradient_checkpointing else one * a.blocks
    around = 0 if frozen else norm(1)
    return one, every, settings.tokens * a.hidden * around


def _inner(plan: Plan, a: Architecture, mode: Mode, settings: Settings) -> int:
    """What lies between two factors, or two matrices of an adapter, in one block (the mean of all)."""
    ranks = sum(p.rank or 0 for p in plan.linears) if mode.method == "factors" else 0
    adapters = 0
    if mode.adapters:
        count = 2 * len(plan.ranks) if mode.method == "factors" else len(plan.linears)
        adapters = settings.lora_r * count
    return round(settings.tokens * _width(settings) * (ranks + adapters) / a.blocks)


def _copies_of_the_step(a: Architecture, stored: _Stored, settings: Settings) -> int:
    """What the optimizer's step allocates: for all parameters at once on a GPU, for one after the other on a CPU."""
    size, largest = DTYPE_BYTES[settings.dtype], min(a.largest, stored.trained)
    on_cpu = settings.device == "cpu"
    if settings.optim == "adamw_torch":  # the denominators
        return 2 * size * largest if on_cpu else size * stored.trained
    if settings.optim in _BLOCKWISE and on_cpu:  # float32 copies of moments, gradient and (of 16 bits) weight, too
        return (20 if size == 4 else 24) * largest
    return 0
