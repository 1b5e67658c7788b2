r"""Runs a step, eager or recorded once as a graph of tensor operations; the only place of private torch names."""

from .gradients import Gradient, gradient
from .recording import Recording, record
from .replicates import Replicator
from .run import Engine, State, choose
from .trace import Traced, trace

__all__ = ["Engine", "Gradient", "Recording", "Replicator", "State", "Traced", "choose", "gradient", "record", "trace"]
