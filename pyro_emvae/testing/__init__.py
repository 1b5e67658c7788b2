r"""Proof for one's own parts: `check_estimator`, `check_guide`, `check_step`, `assert_mean`, and exact means.

An estimator is right if its gradient has the right mean. Over finitely many outcomes the mean is a sum; over normal
noise it is a cubature rule that certifies itself; statistics, with their power checked, are left for the rest.
"""

from .cubature import Mean, exact_mean
from .estimators import Checked, check_estimator
from .guides import check_guide
from .mean import Underpowered, assert_mean, needed
from .replay import Replay
from .steps import check_step

__all__ = [
    "Checked",
    "Mean",
    "Replay",
    "Underpowered",
    "assert_mean",
    "check_estimator",
    "check_guide",
    "check_step",
    "exact_mean",
    "needed",
]
