r"""Half-steps of EM: one file each."""

from .averaged import Averaged, Damped
from .base import HalfStep, Info
from .closed_form import ClosedForm
from .combined import combined
from .conjugate import Conjugate
from .enumerated import Enumerated
from .fixed import Fixed
from .gaussian import Gaussian
from .gradient import Gradient
from .laplace import Laplace
from .lbfgs import LBFGS
from .mean_field import MeanField
from .monte_carlo import MonteCarlo
from .natural_gradient import NaturalGradient
from .phase import Phase
from .ready_chains import hidden_markov
from .ready_glm import glm_intercepts, linear_mixed, random_effects
from .ready_linear import linear_gaussian, local_level
from .ready_mixtures import bernoulli_mixture, categorical_mixture, gaussian_mixture, poisson_mixture
from .sleep import Sleep
from .until import Criterion, HeldOut, MutualInformation
from .wake_sleep import WakeSleep

__all__ = [
    "LBFGS",
    "Averaged",
    "ClosedForm",
    "Conjugate",
    "Criterion",
    "Damped",
    "Enumerated",
    "Fixed",
    "Gaussian",
    "Gradient",
    "HalfStep",
    "HeldOut",
    "Info",
    "Laplace",
    "MeanField",
    "MonteCarlo",
    "MutualInformation",
    "NaturalGradient",
    "Phase",
    "Sleep",
    "WakeSleep",
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
