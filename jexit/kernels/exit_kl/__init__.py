"""KL of every exit's logit lens to the final distribution."""

from jexit.kernels.exit_kl.api import exit_kl
from jexit.kernels.exit_kl.reference import ExitKL

__all__ = ["ExitKL", "exit_kl"]
