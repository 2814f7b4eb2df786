"""Plans that make themselves: a first generation is recorded, later ones follow its plan."""

from pabc.automatic.request import Auto, auto

__all__ = ["Auto", "auto"]
