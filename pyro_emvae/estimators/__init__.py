r"""Gradient estimators: one file each, found by name in the registry."""

from .base import Control, Draw, Estimator, Probed, SiteTerms, Situation
from .decaying_average import DecayingAverage
from .leave_one_out import LeaveOneOut
from .partial import PartialPathwise
from .pathwise import Full, Pathwise, StickTheLanding
from .policies import POLICIES, auto_table
from .score import Score

__all__ = [
    "POLICIES",
    "Control",
    "DecayingAverage",
    "Draw",
    "Estimator",
    "Full",
    "LeaveOneOut",
    "PartialPathwise",
    "Pathwise",
    "Probed",
    "Score",
    "SiteTerms",
    "Situation",
    "StickTheLanding",
    "auto_table",
]
