"""Grids of runs, and what came out of them."""
