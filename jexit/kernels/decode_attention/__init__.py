"""Attention for decoding: one query per row attends to the keys in this row's cache."""

from jexit.kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
