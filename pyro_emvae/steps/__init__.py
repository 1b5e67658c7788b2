r"""Half-steps of EM: one file each."""

from .base import HalfStep, Info
from .gradient import Gradient

__all__ = ["Gradient", "HalfStep", "Info"]
