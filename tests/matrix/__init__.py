"""The pipelines that pabc is tried with: rows, columns, and the table that holds what came of them.

`python tests/matrix/write.py` writes the table; `tests/test_pipeline_matrix.py` checks it.
"""
