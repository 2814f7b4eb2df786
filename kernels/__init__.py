"""Triton kernels, one a file, each with a plain PyTorch reference; imported as `pabc.kernels`."""
