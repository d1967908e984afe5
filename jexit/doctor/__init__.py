"""A check of this machine: what it is, whether its results are correct, and how fast it is."""
