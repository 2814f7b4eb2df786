"""Generations on several ranks: what is run (`cases.py`), on which models (`subjects.py`), with all
that is sent counted (`counting.py`); and ranks simulated in one process (`simulator.py`)."""
