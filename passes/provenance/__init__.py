"""Follows dimensions back to their origins, by the relations of ops (:mod:`pabc.passes.relations`).

`follow.py` names the axes of inputs, in the arithmetic of `factors.py`; `positions.py` follows
loops; `copies.py` finds positions that hold copies of one value.
"""
