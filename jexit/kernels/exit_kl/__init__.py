"""The KL divergence from the final next-token distribution to the distribution at each exit.

The distribution at an exit is the logit lens: the output head applied to the hidden state there.
"""

from jexit.kernels.exit_kl.api import exit_kl
from jexit.kernels.exit_kl.reference import ExitKL

__all__ = ["ExitKL", "exit_kl"]
