"""Bugs of ``kernels/norm.py``."""

MUTANTS = [
    (
        "norm: eps left out",
        "tl.sqrt(tl.sum(x * x, axis=0) / hidden + eps)",
        "tl.sqrt(tl.sum(x * x, axis=0) / hidden)",
        "tests/kernels/test_norm.py",
    ),
    (
        "norm: mask one short",
        "mask = offs < hidden\n",
        "mask = offs < hidden - 1\n",
        "tests/kernels/test_norm.py",
    ),
    (
        "norm: row offset in 32 bits",
        "row = tl.program_id(0).to(tl.int64)",
        "row = tl.program_id(0)",
        "tests/kernels/test_norm.py",
    ),
    (
        "norm: the residual read by the stride of x",
        "residual_ptr + row * residual_stride",
        "residual_ptr + row * x_stride",
        "tests/kernels/test_norm.py",
    ),
    (
        "norm: the residual's row offset in 32 bits",
        "residual_ptr + row * residual_stride",
        "residual_ptr + row.to(tl.int32) * residual_stride",
        "tests/kernels/test_norm.py",
    ),
    (
        "norm: the sum stored by the stride of x",
        "total_ptr + row * hidden",
        "total_ptr + row * x_stride",
        "tests/kernels/test_norm.py",
    ),
]

DEFINITION_MUTANTS = [
    (
        "norm: eps of the definition fifty times too large",
        "dtype.type(eps)",
        "dtype.type(50 * eps)",
        "tests/kernels/test_norm.py",
    ),
    (
        "norm: the definition's mean over one column too many",
        "np.mean(x * x, axis=-1, keepdims=True)",
        "np.sum(x * x, axis=-1, keepdims=True) / (x.shape[-1] + 1)",
        "tests/kernels/test_norm.py",
    ),
]
