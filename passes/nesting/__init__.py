"""What `nest.py` is made of: which regions repeat, and what a part of the stream adds to it."""
