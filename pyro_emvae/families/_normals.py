r"""What the normals share: where they start, one vector in the shape of the value, marginals."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import ReshapeTransform
from torch import Tensor

from ._maps import flat, limited
from ._quantiles import marginals
from .base import Family

__all__ = ["VectorNormal", "loading", "reshaped"]


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


class VectorNormal(Family):
    """A multivariate normal whose context begins with the location: abstract."""

    def start(self, value: Tensor, event_shape: torch.Size) -> Tensor:
        zeros = super().start(value, event_shape)
        loc = flat(value, event_shape)
        return torch.cat([loc, zeros[..., loc.shape[-1] :]], -1)

    def cdf(self, fn: Any, value: Tensor) -> Tensor:
        return marginals(fn).cdf(value)
