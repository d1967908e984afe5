"""Log-probabilities of given tokens, entropy and log-sum-exp, for a linear output head."""

from jexit.kernels.linear_logprob.api import linear_logprob
from jexit.kernels.linear_logprob.reference import LinearLogprob

__all__ = ["LinearLogprob", "linear_logprob"]
