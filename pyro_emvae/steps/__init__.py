r"""Half-steps of EM: one file each."""

from .base import HalfStep, Info
from .closed_form import ClosedForm
from .enumerated import Enumerated
from .gaussian import Gaussian
from .gradient import Gradient
from .laplace import Laplace
from .monte_carlo import MonteCarlo
from .ready_linear import linear_gaussian, local_level

__all__ = [
    "ClosedForm",
    "Enumerated",
    "Gaussian",
    "Gradient",
    "HalfStep",
    "Info",
    "Laplace",
    "MonteCarlo",
    "linear_gaussian",
    "local_level",
]
