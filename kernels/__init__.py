"""Triton kernels of the GPU planner, one operation a file; installed as `tt_fast.kernels`.

Every file holds device functions, the kernel that applies them alone, and its launcher. `segment`
strings the device functions together: many tokens, all layers, one launch. Launchers own shapes and
grids and trust their arguments; `tt_fast.planning.cuda` checks them.
"""
