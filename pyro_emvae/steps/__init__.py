r"""Half-steps of EM: one file each."""

from .base import HalfStep, Info
from .closed_form import ClosedForm
from .enumerated import Enumerated
from .gradient import Gradient
from .ready_mixtures import bernoulli_mixture, categorical_mixture, gaussian_mixture, poisson_mixture

__all__ = [
    "ClosedForm",
    "Enumerated",
    "Gradient",
    "HalfStep",
    "Info",
    "bernoulli_mixture",
    "categorical_mixture",
    "gaussian_mixture",
    "poisson_mixture",
]
