"""Nodes for ComfyUI: a model whose samplers skip calls, and a picture of the plan.

Nothing of ComfyUI is imported: its objects come in as arguments.
"""

from pabc.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
