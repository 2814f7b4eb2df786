"""One table of what each op does to the dimensions of its operands, and the terms it is stated in.

`terms.py` has the terms, `table.py` the table; `groups.py` names groups of ops. Axis provenance,
copies, positions, residual streams, row copies and sharding interpret these terms: an op that is
new to pabc gets one entry here, and none of them needs to know what it does. Only where a shard
needs other arguments does sharding have a rule of its own (:mod:`pabc.passes.sharding.rules`).
"""
