"""CUDA C kernels as text, and what runs them on arrays: CuPy's on a GPU, NumPy's through a CPU emulator.

One module per operator: `conv_transpose`, `conv_transpose_mma`, `batch_norm`, `tanh`, `max_pool`, `group_norm`, and the
fusions `bn_tanh_max_pool` and `conv_bn_pool`. Their functions take outputs and workspaces as arguments and allocate
nothing. `modelnew` puts torch on top.
"""
