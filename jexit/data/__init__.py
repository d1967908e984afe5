"""Tokenizes text and makes batches of NumPy arrays; this package does not import jax."""
