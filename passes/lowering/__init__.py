"""What becomes of a part of a graph when a Triton kernel computes it: a rule for each kernel.

A rule looks at one node, the last of what its kernel would compute, and says whether it may, or why
not; :func:`pabc.passes.lower_pass` decides which of those are worth it.
"""
