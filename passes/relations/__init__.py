"""One table of what each op does to the dimensions of its operands, and the terms it is stated in.

`terms.py` has the terms, `table.py` the table; `groups.py` names the ops that only change a
layout. Axis provenance, copies, positions, sharding and lowering interpret these terms: an op that
is new to pabc gets one entry here, and no reader needs to know it by name.
"""
