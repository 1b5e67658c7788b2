r"""Custom guides, EM-style alternation and honest gradient estimators for Pyro.

$$\log p_\theta(x)=L(\phi,\theta)+\mathrm{KL}(q_\phi\|p_\theta(z|x)),\qquad L=E_q[\log p_\theta(x,z)-\log q_\phi(z)].$$
"""

__version__ = "0.1.0.dev0"

from . import (
    annealing,
    convergence,
    estimators,
    families,
    guides,
    objectives,
    optimizers,
    plots,
    posterior,
    problems,
    steps,
    testing,
)
from ._checks import (
    BlockError,
    DataError,
    EmvaeError,
    EstimatorError,
    ModelError,
    NonFiniteError,
    OptimizerError,
    RecordingError,
    StepError,
)
from ._registry import Traits, register
from .compare import GradientComparison, compare_gradients, sweep_gradients
from .diagnostics import Explanation, explain, to_arviz
from .driver import Fit
from .em import EM
from .evidence import ActiveUnits, Estimate, Gap, active_units, elbo, elbo_gap, log_evidence, mutual_information
from .information import Information
from .loss import MonteCarloELBO
from .particles import config_estimators
from .svi import SVI
from .uncertainty import MonteCarloErrors, StandardErrors, monte_carlo_error, standard_errors

__all__ = [
    "EM",
    "SVI",
    "ActiveUnits",
    "BlockError",
    "DataError",
    "EmvaeError",
    "Estimate",
    "EstimatorError",
    "Explanation",
    "Fit",
    "Gap",
    "GradientComparison",
    "Information",
    "ModelError",
    "MonteCarloELBO",
    "MonteCarloErrors",
    "NonFiniteError",
    "OptimizerError",
    "RecordingError",
    "StandardErrors",
    "StepError",
    "Traits",
    "__version__",
    "active_units",
    "annealing",
    "compare_gradients",
    "config_estimators",
    "convergence",
    "elbo",
    "elbo_gap",
    "estimators",
    "explain",
    "families",
    "guides",
    "log_evidence",
    "monte_carlo_error",
    "mutual_information",
    "objectives",
    "optimizers",
    "plots",
    "posterior",
    "problems",
    "register",
    "standard_errors",
    "steps",
    "sweep_gradients",
    "testing",
    "to_arviz",
]
