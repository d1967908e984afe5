"""Ahead-of-time compilation for accelerators that this machine does not have."""
