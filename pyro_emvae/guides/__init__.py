r"""Guides that build themselves from the model; where a family's context comes from."""

from .amortized import AutoAmortized
from .semi_amortized import AutoSemiAmortized

__all__ = ["AutoAmortized", "AutoSemiAmortized"]
