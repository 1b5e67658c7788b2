r"""What is optimised: the terms of an objective, from the particles' densities; pure tensor functions."""

from .base import Objective, Term
from .elbo import ELBO
from .multi_sample import Bound, MultiSample
from .power_means import IWAE, Chi2, Renyi

__all__ = ["ELBO", "IWAE", "Bound", "Chi2", "MultiSample", "Objective", "Renyi", "Term"]
