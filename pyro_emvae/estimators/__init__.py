r"""Gradient estimators: one file each, found by name in the registry."""

from .base import Control, Draw, Estimator, Probed, SiteTerms, Situation
from .decaying_average import DecayingAverage
from .draws import Antithetic, Independent, Sobol
from .dreg import DReG
from .enumerated import Enumerated
from .leave_one_out import LeaveOneOut
from .measure_valued import MeasureValued
from .neural_baseline import NeuralBaseline
from .partial import PartialPathwise
from .pathwise import AdaptiveSticking, Analytic, Full, Pathwise, StickTheLanding
from .policies import POLICIES, auto_table
from .score import Score, ScoreFunction
from .vimco import OVIS, VIMCO, MultiSampleScore

__all__ = [
    "OVIS",
    "POLICIES",
    "VIMCO",
    "AdaptiveSticking",
    "Analytic",
    "Antithetic",
    "Control",
    "DReG",
    "DecayingAverage",
    "Draw",
    "Enumerated",
    "Estimator",
    "Full",
    "Independent",
    "LeaveOneOut",
    "MeasureValued",
    "MultiSampleScore",
    "NeuralBaseline",
    "PartialPathwise",
    "Pathwise",
    "Probed",
    "Score",
    "ScoreFunction",
    "SiteTerms",
    "Situation",
    "Sobol",
    "StickTheLanding",
    "auto_table",
]
