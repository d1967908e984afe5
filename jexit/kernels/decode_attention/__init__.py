"""Attention for decoding: one query per row, which attends to the keys cached for that row."""

from jexit.kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
