r"""What the normals share: one vector in the shape of the value, and its marginal quantiles."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import ReshapeTransform
from torch import Tensor

from ._maps import limited

__all__ = ["loading", "marginals", "reshaped"]


def loading(w: Tensor) -> Tensor:
    """Return weights on other coordinates or factors, kept below 54 in float32 and 8192 in float64.

    Beyond, a correlation is 1 to the precision of its dtype, and covariances are singular.
    """
    return limited(w, torch.finfo(w.dtype).eps ** -0.25)


def reshaped(fn: Any, event_shape: torch.Size) -> Any:
    """Return a distribution of vectors as one of values of another shape."""
    if event_shape == fn.event_shape:
        return fn
    return dist.TransformedDistribution(fn, [ReshapeTransform(fn.event_shape, event_shape)])


def marginals(fn: Any) -> Any:
    """Return the normals of the coordinates of a multivariate normal, reshaped or not."""
    base = getattr(fn, "base_dist", fn)
    loc, std = (part.reshape(fn.batch_shape + fn.event_shape) for part in (base.mean, base.variance.sqrt()))
    return dist.Normal(loc, std)
