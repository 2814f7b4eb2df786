"""Turns a model's forward into one graph: the parts that :mod:`pabc.passes.capture` is made of."""
