"""Kernels for the elementwise passes over scores of `l2_norm_gelu`, for rounding to 8 bits, and for products of sparse
layers on CPUs.

`fused_passes.usable`, `rounding.usable`, `rounded_scores.usable` and `native_grouped.usable` say where; PyTorch's
operators are used elsewhere.
"""
