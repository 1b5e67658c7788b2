r"""What an E-step hands on: draws, weights, expectations."""

from ._conjugacy import solve_conjugate
from ._density import BlockDensity
from ._factored import FactoredJoint
from ._kept import gather_factors, is_local, scatter_factors
from ._mean_field import Ascent, Update
from ._newton import find_mode, solve_quadratic
from ._plates import in_plates, plate_nesting
from .amortized import GuidePosterior
from .base import Outer, Posterior, Support
from .complete import CompleteData, complete_data, second_order_support
from .conjugate import ConjugatePosterior
from .enumerated import EnumeratedPosterior
from .gaussian import GaussianPosterior
from .guide import PosteriorGuide
from .mean_field import MeanFieldPosterior, first_ascent
from .point_masses import AtPointMasses
from .prior import Prior
from .proposal import proposal
from .quadrature import QuadraturePosterior, integrate_at_mode
from .samples import SampledSite, SamplesPosterior, lay_out

__all__ = [
    "Ascent",
    "AtPointMasses",
    "BlockDensity",
    "CompleteData",
    "ConjugatePosterior",
    "EnumeratedPosterior",
    "FactoredJoint",
    "GaussianPosterior",
    "GuidePosterior",
    "MeanFieldPosterior",
    "Outer",
    "Posterior",
    "PosteriorGuide",
    "Prior",
    "QuadraturePosterior",
    "SampledSite",
    "SamplesPosterior",
    "Support",
    "Update",
    "complete_data",
    "find_mode",
    "first_ascent",
    "gather_factors",
    "in_plates",
    "integrate_at_mode",
    "is_local",
    "lay_out",
    "plate_nesting",
    "proposal",
    "scatter_factors",
    "second_order_support",
    "solve_conjugate",
    "solve_quadratic",
]
