"""Triton 3.6's interpreter beside NumPy 2.4: loop bounds that are arrays of one element.

The interpreter of Triton 3.6 takes a loop bound with ``int(array)``, which NumPy 2.4 refuses unless the array has no
dimension. Triton 3.7 squeezes the array first. The repair does the same, and nothing on later versions.
"""

import triton


def repair_loop_bounds() -> None:
    """Let every array of one element bound a loop of an interpreted kernel, for this process."""
    if not triton.__version__.startswith("3.6."):
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor  # called at each launch

    def patch_tensor_and_bounds(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_bounds
