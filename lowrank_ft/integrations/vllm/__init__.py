"""vLLM serves compact checkpoints: a plugin that vLLM finds by its entry point, ``vllm.general_plugins``.

vLLM's own model code runs; only its linears are made by :mod:`lowrank_ft.integrations.vllm.method`. Nothing here imports
vLLM before vLLM calls :func:`register`.
"""


def register() -> None:
    """Teach vLLM the quantization method ``lowrank``; calling it again does no harm."""
    import lowrank_ft.integrations.vllm.config  # noqa: F401  # registers itself
