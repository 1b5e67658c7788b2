r"""Gradient estimators: one file each, found by name in the registry."""

from .base import Control, Draw, Estimator, Probed, SiteTerms, Situation
from .decaying_average import DecayingAverage
from .draws import Antithetic, Independent, Sobol
from .gumbel_rao import GumbelRao
from .gumbel_softmax import GumbelSoftmax
from .leave_one_out import LeaveOneOut
from .measure_valued import MeasureValued
from .neural_baseline import NeuralBaseline
from .partial import PartialPathwise
from .pathwise import AdaptiveSticking, Analytic, Full, Pathwise, StickTheLanding
from .policies import POLICIES, auto_table
from .reinmax import ReinMax
from .score import Score, ScoreFunction
from .straight_through import StraightThrough

__all__ = [
    "POLICIES",
    "AdaptiveSticking",
    "Analytic",
    "Antithetic",
    "Control",
    "DecayingAverage",
    "Draw",
    "Estimator",
    "Full",
    "GumbelRao",
    "GumbelSoftmax",
    "Independent",
    "LeaveOneOut",
    "MeasureValued",
    "NeuralBaseline",
    "PartialPathwise",
    "Pathwise",
    "Probed",
    "ReinMax",
    "Score",
    "ScoreFunction",
    "SiteTerms",
    "Situation",
    "Sobol",
    "StickTheLanding",
    "StraightThrough",
    "auto_table",
]
