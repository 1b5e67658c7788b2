r"""Half-steps of EM: one file each."""

from .base import HalfStep, Info
from .closed_form import ClosedForm
from .enumerated import Enumerated
from .gradient import Gradient

__all__ = ["ClosedForm", "Enumerated", "Gradient", "HalfStep", "Info"]
