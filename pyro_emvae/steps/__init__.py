r"""Half-steps of EM: one file each."""

from .averaged import Averaged, Damped
from .base import HalfStep, Info
from .closed_form import ClosedForm
from .combined import combined
from .conjugate import Conjugate
from .enumerated import Enumerated
from .gaussian import Gaussian
from .gradient import Gradient
from .laplace import Laplace
from .lbfgs import LBFGS
from .monte_carlo import MonteCarlo
from .phase import Phase
from .ready_chains import hidden_markov
from .ready_glm import glm_intercepts, linear_mixed, random_effects
from .ready_linear import linear_gaussian, local_level
from .ready_mixtures import bernoulli_mixture, categorical_mixture, gaussian_mixture, poisson_mixture

__all__ = [
    "LBFGS",
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
    "Phase",
    "bernoulli_mixture",
    "categorical_mixture",
    "combined",
    "gaussian_mixture",
    "glm_intercepts",
    "hidden_markov",
    "linear_gaussian",
    "linear_mixed",
    "local_level",
    "poisson_mixture",
    "random_effects",
]
