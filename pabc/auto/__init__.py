"""Plans that make themselves: the first generation is recorded, later ones follow its plan."""
