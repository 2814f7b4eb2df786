"""Saves compiled models to files, and loads them: `CompiledModel.save` and :func:`pabc.load`."""
