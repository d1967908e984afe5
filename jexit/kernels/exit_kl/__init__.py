"""The KL divergence from the final next-token distribution to that of every exit.

The distribution of an exit is its logit lens: the output head applied to the exit's hidden state.
"""

from jexit.kernels.exit_kl.api import exit_kl
from jexit.kernels.exit_kl.reference import ExitKL

__all__ = ["ExitKL", "exit_kl"]
