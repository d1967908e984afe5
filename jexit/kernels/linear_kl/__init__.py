"""The KL divergence between the next-token distributions of a student and a teacher model."""

from jexit.kernels.linear_kl.api import linear_kl

__all__ = ["linear_kl"]
