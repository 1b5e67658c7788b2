r"""Half-steps of EM: one file each."""

from .averaged import Averaged, Damped
from .base import HalfStep, Info
from .closed_form import ClosedForm
from .conjugate import Conjugate
from .enumerated import Enumerated
from .gaussian import Gaussian
from .gradient import Gradient
from .laplace import Laplace
from .monte_carlo import MonteCarlo
from .ready_chains import hidden_markov
from .ready_linear import linear_gaussian, local_level
from .ready_mixtures import bernoulli_mixture, categorical_mixture, gaussian_mixture, poisson_mixture
from .sleep import Sleep
from .wake_sleep import WakeSleep

__all__ = [
    "Averaged",
    "ClosedForm",
    "Conjugate",
    "Damped",
    "Enumerated",
    "Gaussian",
    "Gradient",
    "HalfStep",
    "Info",
    "Laplace",
    "MonteCarlo",
    "Sleep",
    "WakeSleep",
    "bernoulli_mixture",
    "categorical_mixture",
    "gaussian_mixture",
    "hidden_markov",
    "linear_gaussian",
    "local_level",
    "poisson_mixture",
]
