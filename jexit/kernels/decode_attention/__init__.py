"""Attention of one query a row over the keys that the row has."""

from jexit.kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
