"""rooflama's kernels inside other libraries. Each module is imported by the user who wants it, and imports its library.

transformers    ``attn_implementation="rooflama"``, and flash attention's functions for continuous batching
flash           flash-attn 2's functions for decoders
"""
