r"""A guide with a density, in place of draws that have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine

from ..particles import is_subsample, quiet
from ._newton import find_mode
from ._plates import plate_nesting
from .base import Posterior
from .enumerated import EnumeratedPosterior
from .guide import PosteriorGuide

__all__ = ["proposal"]


def proposal(obj: str, model: Callable) -> PosteriorGuide:
    r"""Return a guide from which the evidence of a model can be had by weights, at the present theta.

    Of discrete latents it is the exact posterior, of continuous ones Laplace's approximation, the Gaussian at the mode.

    Args:
        obj: Who asks, for its errors.
        model: The Pyro model.

    Raises:
        StepError: Both kinds of latents in one model; by the guide, no mode.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x): pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)
        >>> guide = proposal("log_evidence", model)
        >>> bool(guide(torch.tensor(1.0))["z"].isfinite())
        True
    """

    def infer(args: tuple, kwargs: dict[str, Any]) -> Posterior:
        with quiet(), torch.no_grad():
            sites = poutine.trace(model).get_trace(*args, **kwargs).nodes.values()
            latents = [s for s in sites if s["type"] == "sample" and not s["is_observed"] and not is_subsample(s)]
            if any(site["fn"].has_enumerate_support for site in latents):
                return EnumeratedPosterior(model, args, kwargs, plate_nesting(model, args, kwargs))
            return find_mode(obj, model, args, kwargs)

    return PosteriorGuide(infer)
