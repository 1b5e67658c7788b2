r"""A Pyro guide that carries an E-step's rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .base import Posterior

__all__ = ["PosteriorGuide"]


class PosteriorGuide:
    r"""Draws from the posterior that an E-step finds for the data it is called with, at the present theta.

    ``is_exact`` is whether the posterior of the last call was exact, so that log p - log q is the log evidence.

    It works wherever a guide does: `Predictive`, `log_evidence`, `to_arviz`, `Trace_ELBO`. It has no parameters.

    Args:
        infer: A function of args and kwargs that returns a `Posterior`.
        has_density: Whether its draws have a log q; those of chains have none.
    """

    def __init__(self, infer: Callable[[tuple, dict], Posterior], has_density: bool = True) -> None:
        self.infer, self.has_density, self.is_exact = infer, has_density, False

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            with poutine.block():
                posterior = self.infer(args, kwargs)
            self.is_exact = posterior.is_exact
            return posterior.sample()
