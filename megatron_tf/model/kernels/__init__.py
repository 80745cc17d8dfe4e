"""Kernels for the elementwise passes over scores of `l2_norm_gelu`, and for products of sparse layers on CPUs.

Each module has a function that says whether it can be used; otherwise PyTorch's operators are.
"""
