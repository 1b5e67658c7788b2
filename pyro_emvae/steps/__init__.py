r"""Half-steps of EM: one file each."""

from .base import HalfStep, Info
from .closed_form import ClosedForm
from .enumerated import Enumerated
from .gaussian import Gaussian
from .gradient import Gradient
from .laplace import Laplace

__all__ = ["ClosedForm", "Enumerated", "Gaussian", "Gradient", "HalfStep", "Info", "Laplace"]
