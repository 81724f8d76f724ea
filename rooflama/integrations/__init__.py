"""rooflama's kernels inside other libraries. Each module is imported by the user who wants it, and imports its library.

transformers    ``attn_implementation="rooflama"``
"""
