r"""Guides that build themselves from the model; where a family's context comes from."""

from ._natural import NaturalSteps
from .amortized import AutoAmortized
from .exact import AutoExact
from .mcmc import AutoMCMC
from .mean_field import AutoMeanField
from .mixture import AutoMixture
from .semi_amortized import AutoSemiAmortized

__all__ = [
    "AutoAmortized",
    "AutoExact",
    "AutoMCMC",
    "AutoMeanField",
    "AutoMixture",
    "AutoSemiAmortized",
    "NaturalSteps",
]
