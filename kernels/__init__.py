"""Triton kernels, one a file, each with a plain PyTorch reference; imported as `pabc.kernels`.

Nothing is imported here: Triton is, by the modules that need it, when a kernel may be used.
"""
