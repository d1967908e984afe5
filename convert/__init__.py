"""Conversion between Hugging Face checkpoints and jexit's model directories."""
