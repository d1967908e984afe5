"""Decoding attention, and vocabulary ops that never store [tokens, vocabulary] arrays."""

from jexit.kernels.decode_attention import decode_attention
from jexit.kernels.dispatch import using
from jexit.kernels.exit_kl import ExitKL, exit_kl
from jexit.kernels.linear_kl import linear_kl
from jexit.kernels.linear_logprob import LinearLogprob, linear_logprob

__all__ = [
    "ExitKL",
    "LinearLogprob",
    "decode_attention",
    "exit_kl",
    "linear_kl",
    "linear_logprob",
    "using",
]
