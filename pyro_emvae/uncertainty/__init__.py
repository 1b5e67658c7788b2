r"""How far the estimates may lie from the truth: standard errors of the model's parameters."""

from .errors import StandardErrors
from .methods import standard_errors

__all__ = ["StandardErrors", "standard_errors"]
