"""Bugs of ``kernels/mlp.py``."""

MUTANTS = [
    (
        "swiglu: gate and up swapped",
        "out = gate / (1.0 + tl.exp(-exponent)) * up",
        "out = up / (1.0 + tl.exp(-up)) * gate",
        "tests/kernels/test_mlp.py",
    ),
    (
        "geglu: the logistic approximation in place of the tanh",
        "exponent = _TWICE_SQRT_2_OVER_PI * (gate + 0.044715 * gate * gate * gate)",
        "exponent = 1.702 * gate",
        "tests/kernels/test_mlp.py",
    ),
]
