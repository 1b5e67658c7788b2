r"""Half-steps of EM: one file each."""

from .averaged import Averaged, Damped
from .base import HalfStep, Info
from .closed_form import ClosedForm
from .conjugate import Conjugate
from .enumerated import Enumerated
from .fixed import Fixed
from .gaussian import Gaussian
from .gradient import Gradient
from .laplace import Laplace
from .mean_field import MeanField
from .monte_carlo import MonteCarlo
from .ready_chains import hidden_markov
from .ready_linear import linear_gaussian, local_level
from .ready_mixtures import bernoulli_mixture, categorical_mixture, gaussian_mixture, poisson_mixture

__all__ = [
    "Averaged",
    "ClosedForm",
    "Conjugate",
    "Damped",
    "Enumerated",
    "Fixed",
    "Gaussian",
    "Gradient",
    "HalfStep",
    "Info",
    "Laplace",
    "MeanField",
    "MonteCarlo",
    "bernoulli_mixture",
    "categorical_mixture",
    "gaussian_mixture",
    "hidden_markov",
    "linear_gaussian",
    "local_level",
    "poisson_mixture",
]
