r"""Gradient estimators: one file each, found by name in the registry."""

from .arm import Arm
from .arms import Arms, Disarm
from .base import Control, Draw, Estimator, Probed, SiteTerms, Situation
from .decaying_average import DecayingAverage
from .double_control import DoubleControlVariate
from .leave_one_out import LeaveOneOut
from .partial import PartialPathwise
from .pathwise import Full, Pathwise, StickTheLanding
from .policies import POLICIES, auto_table
from .relax import Rebar, Relax
from .score import Score
from .top_k import RaoBlackwellTopK
from .unordered_set import UnorderedSet

__all__ = [
    "POLICIES",
    "Arm",
    "Arms",
    "Control",
    "DecayingAverage",
    "Disarm",
    "DoubleControlVariate",
    "Draw",
    "Estimator",
    "Full",
    "LeaveOneOut",
    "PartialPathwise",
    "Pathwise",
    "Probed",
    "RaoBlackwellTopK",
    "Rebar",
    "Relax",
    "Score",
    "SiteTerms",
    "Situation",
    "StickTheLanding",
    "UnorderedSet",
    "auto_table",
]
