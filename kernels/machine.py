"""Where kernels run. Importing this imports no triton."""

from __future__ import annotations

#: Compute capability from which on bfloat16 matrix units exist.
MIN_CAPABILITY = (8, 0)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the processor."""
    from triton.runtime.interpreter import InterpretedFunction

    from tt_fast.kernels.select import rank_kernel

    return isinstance(rank_kernel, InterpretedFunction)
