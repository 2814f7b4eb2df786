"""The demo: a small trained video model of handwritten digits that move as a caption says."""
