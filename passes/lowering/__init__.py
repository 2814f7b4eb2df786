"""Rules that replace parts of a graph by calls of Triton kernels, one rule for each kernel.

A rule looks at the last node of what its kernel would compute and returns a
:class:`~pabc.passes.lowering.match.Match`, which says whether the kernel can compute it or why not.
:func:`pabc.passes.lower_pass` decides which matches are worth a rewrite.

Kernels are imported within functions: that imports Triton, which takes long and may be missing.
"""
