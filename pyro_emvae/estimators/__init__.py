r"""Gradient estimators: one file each, found by name in the registry."""

from .arm import Arm
from .arms import Arms, Disarm
from .base import Control, Draw, Estimator, Probed, SiteTerms, Situation
from .decaying_average import DecayingAverage
from .double_control import DoubleControlVariate
from .draws import Antithetic, Independent, Sobol
from .dreg import DReG
from .enumerated import Enumerated
from .gumbel_rao import GumbelRao
from .gumbel_softmax import GumbelSoftmax
from .leave_one_out import LeaveOneOut
from .measure_valued import MeasureValued
from .neural_baseline import NeuralBaseline
from .partial import PartialPathwise
from .pathwise import AdaptiveSticking, Analytic, Full, Pathwise, StickTheLanding
from .policies import POLICIES, auto_table, table
from .reinmax import ReinMax
from .relax import Rebar, Relax
from .score import Score, ScoreFunction
from .straight_through import StraightThrough
from .top_k import RaoBlackwellTopK
from .unordered_set import UnorderedSet
from .vimco import OVIS, VIMCO, MultiSampleScore

__all__ = [
    "OVIS",
    "POLICIES",
    "VIMCO",
    "AdaptiveSticking",
    "Analytic",
    "Antithetic",
    "Arm",
    "Arms",
    "Control",
    "DReG",
    "DecayingAverage",
    "Disarm",
    "DoubleControlVariate",
    "Draw",
    "Enumerated",
    "Estimator",
    "Full",
    "GumbelRao",
    "GumbelSoftmax",
    "Independent",
    "LeaveOneOut",
    "MeasureValued",
    "MultiSampleScore",
    "NeuralBaseline",
    "PartialPathwise",
    "Pathwise",
    "Probed",
    "RaoBlackwellTopK",
    "Rebar",
    "ReinMax",
    "Relax",
    "Score",
    "ScoreFunction",
    "SiteTerms",
    "Situation",
    "Sobol",
    "StickTheLanding",
    "StraightThrough",
    "UnorderedSet",
    "auto_table",
    "table",
]
