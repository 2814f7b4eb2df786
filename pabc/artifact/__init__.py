"""Compiled models in files: :meth:`pabc.CompiledModel.save` and :func:`pabc.load`."""
