r"""Custom guides, EM-style alternation and honest gradient estimators for Pyro.

$$\log p_\theta(x)=L(\phi,\theta)+\mathrm{KL}(q_\phi\|p_\theta(z|x)),\qquad L=E_q[\log p_\theta(x,z)-\log q_\phi(z)].$$
"""

__version__ = "0.1.0.dev0"

import importlib
from typing import TYPE_CHECKING, Any

from . import annealing, convergence, estimators, objectives, optimizers, posterior, steps
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
from .driver import Fit
from .em import EM
from .evidence import ActiveUnits, Estimate, Gap, active_units, elbo, elbo_gap, log_evidence, mutual_information
from .information import Information
from .loss import MonteCarloELBO
from .particles import config_estimators
from .svi import SVI

if TYPE_CHECKING:
    from . import families, guides, plots, problems, testing
    from .compare import GradientComparison, compare_gradients, sweep_gradients
    from .diagnostics import Explanation, explain, to_arviz
    from .uncertainty import MonteCarloErrors, StandardErrors, monte_carlo_error, standard_errors

LATER = {
    "families": "families",
    "guides": "guides",
    "plots": "plots",
    "problems": "problems",
    "testing": "testing",
    "GradientComparison": "compare",
    "compare_gradients": "compare",
    "sweep_gradients": "compare",
    "Explanation": "diagnostics",
    "explain": "diagnostics",
    "to_arviz": "diagnostics",
    "MonteCarloErrors": "uncertainty",
    "StandardErrors": "uncertainty",
    "monte_carlo_error": "uncertainty",
    "standard_errors": "uncertainty",
}

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


def __getattr__(name: str) -> Any:
    """Import what not every program needs when it is first asked for (PEP 562)."""
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{LATER[name]}", __name__)
    globals()[name] = value = module if name == LATER[name] else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
