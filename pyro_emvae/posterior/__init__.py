r"""What an E-step hands on: draws, weights, expectations."""

from ._plates import plate_nesting
from .amortized import GuidePosterior
from .base import Posterior, Support
from .enumerated import EnumeratedPosterior
from .guide import PosteriorGuide
from .prior import Prior
from .samples import SampledSite, SamplesPosterior, lay_out

__all__ = [
    "EnumeratedPosterior",
    "GuidePosterior",
    "Posterior",
    "PosteriorGuide",
    "Prior",
    "SampledSite",
    "SamplesPosterior",
    "Support",
    "lay_out",
    "plate_nesting",
]
