r"""Gradient estimators: one file each, found by name in the registry."""

from .arm import Arm
from .arms import Arms, Disarm
from .base import Control, Draw, Estimator, Probed, SiteTerms, Situation
from .decaying_average import DecayingAverage
from .double_control import DoubleControlVariate
from .draws import Antithetic, Independent, Sobol
from .dreg import DReG
from .leave_one_out import LeaveOneOut
from .measure_valued import MeasureValued
from .neural_baseline import NeuralBaseline
from .partial import PartialPathwise
from .pathwise import AdaptiveSticking, Analytic, Full, Pathwise, StickTheLanding
from .policies import POLICIES, auto_table
from .relax import Rebar, Relax
from .score import Score, ScoreFunction
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
    "RaoBlackwellTopK",
    "Rebar",
    "Relax",
    "Score",
    "ScoreFunction",
    "SiteTerms",
    "Situation",
    "Sobol",
    "StickTheLanding",
    "UnorderedSet",
    "auto_table",
]
