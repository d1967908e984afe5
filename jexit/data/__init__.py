"""The tokenizer and the batches, as NumPy arrays; this package does not import jax."""
