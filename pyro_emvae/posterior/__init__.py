r"""What an E-step hands on: draws, weights, expectations."""

from .amortized import GuidePosterior
from .base import Posterior

__all__ = ["GuidePosterior", "Posterior"]
