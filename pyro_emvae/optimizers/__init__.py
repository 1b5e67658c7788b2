r"""Optimizers as pure rules, and one optimizer per block of parameters, equal to torch's and Pyro's.

A `Rule` updates lists of tensors; a `BlockOptimizer` runs what the user gave as few groups of many tensors; an
`OptimView` is ``svi.optim``.
"""

from .block import BlockOptimizer
from .entry import Group
from .rows import RowAdam
from .rules import SGD, Adagrad, Adam, AdamW, ClippedAdam, RMSprop, Rule
from .view import OptimView

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "BlockOptimizer",
    "ClippedAdam",
    "Group",
    "OptimView",
    "RMSprop",
    "RowAdam",
    "Rule",
]
