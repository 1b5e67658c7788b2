r"""Half-steps of EM: one file each."""

from .base import HalfStep, Info
from .closed_form import ClosedForm
from .enumerated import Enumerated
from .gradient import Gradient
from .monte_carlo import MonteCarlo

__all__ = ["ClosedForm", "Enumerated", "Gradient", "HalfStep", "Info", "MonteCarlo"]
