r"""How far the estimates may lie from the truth: standard errors of the model's parameters, and the draws' share."""

from .errors import StandardErrors
from .methods import standard_errors
from .monte_carlo_error import MonteCarloErrors, monte_carlo_error

__all__ = ["MonteCarloErrors", "StandardErrors", "monte_carlo_error", "standard_errors"]
