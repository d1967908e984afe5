"""Attention of one query per row over the keys in that row's cache."""

from jexit.kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
