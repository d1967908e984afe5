"""The KL divergence of every exit's logit lens from the final distribution."""

from jexit.kernels.exit_kl.api import exit_kl
from jexit.kernels.exit_kl.reference import ExitKL

__all__ = ["ExitKL", "exit_kl"]
