r"""Looking at a model before the fit, and at a fit with ArviZ's eyes; nothing here changes what it looks at."""

from .arviz import to_arviz
from .explain import Explanation, explain

__all__ = ["Explanation", "explain", "to_arviz"]
