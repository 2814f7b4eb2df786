"""Runs compiled models: captured programs, the state of generations, checks per call, counts.

Importing it registers the implementations of the ops that move slots to host memory.
"""

from pabc.runtime import transfers

__all__ = ["transfers"]
