"""rooflama's attention as a backend of vLLM, written against vLLM 0.33.0.

vLLM finds ``register`` through the entry point group ``vllm.general_plugins`` wherever rooflama is installed, and calls
it in each of its processes. Nothing changes until the backend is asked for:

    vllm serve MODEL --attention-backend CUSTOM

``backend`` holds the classes that vLLM then imports.
"""


def register() -> None:
    """Make rooflama vLLM's custom attention backend, unless another plugin has taken that place."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    custom = AttentionBackendEnum.CUSTOM
    if not custom.is_overridden():
        register_backend(custom, "rooflama.integrations.vllm.backend.RooflamaBackend")
