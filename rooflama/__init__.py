"""rooflama: Llama-family models on Triton kernels, each held to a NumPy definition."""
