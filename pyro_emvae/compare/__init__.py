r"""Estimators side by side: one table at the present parameters, or a sweep over particles, stages and dimensions."""

from .gradients import compare_gradients
from .result import GradientComparison

__all__ = ["GradientComparison", "compare_gradients"]
