r"""What an E-step hands on: draws, weights, expectations."""

from ._conjugacy import solve_conjugate
from ._newton import find_mode, solve_quadratic
from ._plates import plate_nesting
from .amortized import GuidePosterior
from .base import Outer, Posterior, Support
from .conjugate import ConjugatePosterior
from .enumerated import EnumeratedPosterior
from .gaussian import GaussianPosterior
from .guide import PosteriorGuide
from .prior import Prior
from .samples import SampledSite, SamplesPosterior, lay_out

__all__ = [
    "ConjugatePosterior",
    "EnumeratedPosterior",
    "GaussianPosterior",
    "GuidePosterior",
    "Outer",
    "Posterior",
    "PosteriorGuide",
    "Prior",
    "SampledSite",
    "SamplesPosterior",
    "Support",
    "find_mode",
    "lay_out",
    "plate_nesting",
    "solve_conjugate",
    "solve_quadratic",
]
