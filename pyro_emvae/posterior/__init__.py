r"""What an E-step hands on: draws, weights, expectations."""

from ._plates import plate_nesting
from .amortized import GuidePosterior
from .base import Posterior, Support
from .enumerated import EnumeratedPosterior
from .guide import PosteriorGuide

__all__ = ["EnumeratedPosterior", "GuidePosterior", "Posterior", "PosteriorGuide", "Support", "plate_nesting"]
