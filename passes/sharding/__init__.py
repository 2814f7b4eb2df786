"""What :func:`pabc.passes.shard_pass` is made of: where an axis is in a tensor (`places.py`), how
tensors are cut, gathered and switched (`moves.py`), what each op does to a shard (`rules.py`)."""
