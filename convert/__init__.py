"""Converts models between Hugging Face checkpoints and jexit's model directories."""
