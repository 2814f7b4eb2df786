"""Rules of published methods, written from their papers, as references for `bench/pareto.py`.

They decide which calls are computed, and how the others follow. None is the authors' code.
"""
