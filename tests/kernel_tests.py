"""Which tests belong to which file of ``kernels/``, parts included, and the command that runs them on two cores.

``python tests/kernel_tests.py quantized_tiles`` stops at the first failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The tests of kernels/NAME.py are tests/kernels/test_NAME.py, and here are the exceptions: what else tests a file, or
# tests a part. Those come first that find most in the least time.
_OTHERWISE: dict[str, tuple[str, ...]] = {
    "attention_common": ("attention_edges", "attention_decode", "attention_prefill", "strides", "paged_cache"),
    "attention_decode": ("attention_edges", "attention_decode", "strides", "beyond_int32_outputs"),
    "attention_prefill": ("attention_edges", "attention_prefill", "strides", "beyond_int32_outputs"),
    "attention_prefill_blocks": ("attention_prefill_hopper", "attention_prefill"),
    "attention_prefill_hopper_roles": ("attention_prefill_hopper",),
    "attention_prefill_hopper_softmax": ("attention_prefill_hopper",),
    "attention_prefill_hopper_tiles": ("attention_prefill_hopper",),
    "backend": ("norm", "kernel"),
    "checks": ("norm", "mlp", "embedding", "paged_cache_refused", "quantized_matmul_inputs"),
    "errors": ("norm",),
    "kernel": ("kernel", "every_kernel", "norm"),
    "launch": ("every_kernel", "norm", "quantized_wgmma_invariant"),
    "facts": ("kernel",),
    "gpu": ("rehearsal",),
    "interpreter": ("attention_edges", "paged_cache"),
    "mlp": ("mlp", "beyond_int32_outputs"),
    "norm": ("norm", "beyond_int32_outputs"),
    "paged_cache": ("paged_cache", "paged_cache_refused", "strides", "beyond_int32_outputs"),
    "paged_checks": ("paged_cache_refused", "attention_edges", "rope", "attention_decode", "attention_prefill"),
    "paged_common": ("paged_cache", "paged_cache_refused", "strides", "rope"),
    "quantized_gemv": ("quantized_matmul",),
    "quantized_matmul": (
        "quantized_matmul_inputs",
        "quantized_wgmma_invariant",
        "quantized_fixed_point",
        "quantized_matmul",
    ),
    "weight": ("embedding", "quantized_matmul_inputs", "dequantize"),
    "quantized_tiles": ("embedding", "dequantize", "quantized_fixed_point", "quantized_matmul"),
    "quantized_wgmma": ("quantized_wgmma", "quantized_wgmma_invariant"),
    "quantized_wgmma_codes": ("quantized_wgmma", "quantized_wgmma_invariant"),
    "quantized_wgmma_ends": ("quantized_wgmma", "quantized_wgmma_invariant"),
    "quantized_wgmma_output": ("quantized_wgmma", "quantized_wgmma_invariant"),
    "quantized_wgmma_scales": ("quantized_wgmma", "quantized_wgmma_invariant"),
    "rope": ("rope", "strides"),
    "rope_cache_write": ("rope", "strides"),
    "sampling": ("sampling", "sampling_filters"),
    "sampling_filters": ("sampling_filters", "sampling"),
}

KERNEL_TESTS = {
    path.stem: _OTHERWISE.get(path.stem, (path.stem,))
    for path in sorted((ROOT / "kernels").glob("*.py"))
    if path.stem != "__init__"
}


def suite_of(name: str) -> list[str]:
    """The test files of ``kernels/NAME.py``, from the root, in the order in which they are run."""
    return [f"tests/kernels/test_{test}.py" for test in KERNEL_TESTS[name]]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in KERNEL_TESTS:
        print(f"name one kernel file: {', '.join(KERNEL_TESTS)}", file=sys.stderr)
        return 2
    environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "--dist", "load", "--maxschedchunk", "1"]
    return subprocess.run([*command, *suite_of(arguments[0])], cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
