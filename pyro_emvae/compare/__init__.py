r"""Estimators side by side: one table at the present parameters, or a sweep over particles, stages and dimensions."""

from .gradients import compare_gradients
from .result import GradientComparison
from .sweep import sweep_gradients

__all__ = ["GradientComparison", "compare_gradients", "sweep_gradients"]
