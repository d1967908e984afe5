"""Tokenizer and batches, as numpy; nothing in here imports jax."""
