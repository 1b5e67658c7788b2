r"""Run the guide, replay the model: values, log p and log q per site."""

from .checks import check_match, check_plates, choose_vectorize, subsample_values, vectorizable
from .dependence import Dependence, dependence
from .enumerable import BUDGET, mixed_up, summable
from .enumeration import MAX_OUTCOMES, is_annotated, num_outcomes
from .handlers import Recorder, config_estimators, hold_batch, is_computed, is_subsample, plates_of, with_own_mask
from .quiet import ModuleWatch, generators, keep_buffers, quiet
from .report import listen, report
from .run import draw, is_messenger, refuse_non_finite, replay, run_model, stack_runs
from .simulate import Place, Simulation, find_places, held, score, simulate
from .sites import Particles, Site, reduce_to

__all__ = [
    "BUDGET",
    "MAX_OUTCOMES",
    "Dependence",
    "ModuleWatch",
    "Particles",
    "Place",
    "Recorder",
    "Simulation",
    "Site",
    "check_match",
    "check_plates",
    "choose_vectorize",
    "config_estimators",
    "dependence",
    "draw",
    "find_places",
    "generators",
    "held",
    "hold_batch",
    "is_annotated",
    "is_computed",
    "is_messenger",
    "is_subsample",
    "keep_buffers",
    "listen",
    "mixed_up",
    "num_outcomes",
    "plates_of",
    "quiet",
    "reduce_to",
    "refuse_non_finite",
    "replay",
    "report",
    "run_model",
    "score",
    "simulate",
    "stack_runs",
    "subsample_values",
    "summable",
    "vectorizable",
    "with_own_mask",
]
