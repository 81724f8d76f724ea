"""Rotary position embedding: from what files say of it to the cos and sin that the kernels read."""
