r"""Runs a step, eager or recorded once as a graph of tensor operations; the only place of private torch names."""

from .gradients import Gradient, gradient, largest_change
from .maps import BatchedMap, RecordedMap, record_map
from .recording import Recording, record
from .replicates import Replicator
from .run import BACKENDS, POLICIES, Engine, State
from .trace import Traced, trace

__all__ = [
    "BACKENDS",
    "POLICIES",
    "BatchedMap",
    "Engine",
    "Gradient",
    "RecordedMap",
    "Recording",
    "Replicator",
    "State",
    "Traced",
    "gradient",
    "largest_change",
    "record",
    "record_map",
    "trace",
]
