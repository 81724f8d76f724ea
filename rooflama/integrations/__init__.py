"""rooflama's kernels inside other libraries. Each module imports its library when it is used.

transformers    ``attn_implementation="rooflama"``, and flash attention's functions for continuous batching
flash           flash-attn 2's functions for decoders
vllm            an attention backend, which vLLM finds by itself
"""
