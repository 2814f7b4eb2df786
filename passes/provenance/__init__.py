"""Where dimensions come from: what relations of ops (:mod:`pabc.passes.relations`) say about them.

`follow.py` names the axes of inputs, in the arithmetic of `factors.py`; `positions.py` follows
loops; `copies.py` finds positions that hold copies of one value.
"""
