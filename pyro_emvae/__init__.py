r"""Custom guides, EM-style alternation and honest gradient estimators for Pyro."""

__version__ = "0.1.0.dev0"

from . import estimators, objectives, steps
from ._registry import register
from .compare import GradientComparison, compare_gradients
from .driver import Fit
from .em import EM
from .loss import MonteCarloELBO
from .svi import SVI

__all__ = [
    "EM",
    "SVI",
    "Fit",
    "GradientComparison",
    "MonteCarloELBO",
    "__version__",
    "compare_gradients",
    "estimators",
    "objectives",
    "register",
    "steps",
]
