"""Checks a machine: its hardware and software, the correctness of its results, and its speed."""
