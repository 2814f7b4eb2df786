"""A small trained video model: handwritten digits that move as a caption says."""
