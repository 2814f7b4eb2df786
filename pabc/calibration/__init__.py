"""Finds from a recorded generation which calls to run, and how to forecast the others."""
