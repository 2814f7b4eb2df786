"""`slow.txt` names tests that exist, and `write_slow.py` tells which are slow."""

from pathlib import Path

from write_slow import LIST, find_slow

LOG = """
12.00s call     tests/test_a.py::test_long
0.90s setup    tests/test_a.py::test_mixed[one]
0.20s call     tests/test_a.py::test_mixed[one]
0.80s call     tests/test_a.py::test_mixed[two]
1.05s call     tests/test_b.py::test_mostly_short[one]
0.10s call     tests/test_b.py::test_mostly_short[two]
3.00s call     tests/test_b.py::test_many[a b]
3.00s call     tests/test_b.py::test_many[c]
0.05s teardown tests/test_b.py::test_short
"""


def test_a_second_or_several_with_all_parameters_are_slow():
    found = ["test_a.py::test_long", "test_a.py::test_mixed", "test_b.py::test_many"]
    assert find_slow(LOG) == [f"tests/{name}" for name in found]


def test_every_name_is_that_of_a_test():
    for line in LIST.read_text().split():
        file, _, name = line.partition("::")
        text = (Path(__file__).parents[1] / file).read_text()
        assert f"\ndef {name}(" in text, line
