"""How a model's forward becomes one graph: what :mod:`pabc.passes.capture` is made of."""
