r"""What an E-step hands on: draws, weights, expectations."""

from .base import Posterior
from .amortized import GuidePosterior

__all__ = ["GuidePosterior", "Posterior"]
