"""The parts of :func:`pabc.passes.shard_pass`.

`places.py` says where an axis lies in a tensor; `moves.py` cuts, gathers and switches shards;
`rules.py` and `joint.py` say which ops a rank computes on its shard, and `heads.py` how attention
runs on some of the heads; `sharder.py` writes the graph of one rank.
"""
