"""The parts of `nest.py`: which regions repeat, and what a part of the stream adds to it."""
