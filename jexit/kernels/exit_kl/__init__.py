"""KL(final ‖ exit), the divergence of each exit's next-token distribution from the last layer's.

The distribution at an exit is that of the logit lens: final norm and output head, applied to the
hidden state there.
"""

from jexit.kernels.exit_kl.api import exit_kl
from jexit.kernels.exit_kl.reference import ExitKL

__all__ = ["ExitKL", "exit_kl"]
