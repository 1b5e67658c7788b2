r"""Quantiles of each coordinate of a posterior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import EmvaeError, fail
from ..families import quantile_of

__all__ = ["quantile"]


def quantile(obj: str, site: str, fn: Any, levels: Sequence[float] | Tensor) -> Tensor:
    r"""Return the marginal quantiles of each coordinate: the least value whose distribution function reaches the level.

    Args:
        obj, site: Who asks, for which site, for errors.
        fn: A distribution.
        levels: Probabilities, Q of them.

    Shape: ``(Q, *batch, *event)``.

    Raises:
        EmvaeError: The distribution has no quantiles here, as a one-hot vector has none.

    Example:
        >>> import pyro.distributions as dist
        >>> quantile("example", "z", dist.Beta(2.0, 1.0), torch.tensor([0.25]))
        tensor([0.5000])
    """
    like = _like(fn)
    levels = torch.as_tensor(levels, dtype=like.dtype, device=like.device).reshape(-1, *[1] * len(fn.shape()))
    found = quantile_of(fn, levels)
    if found is None:
        fail(
            EmvaeError,
            obj,
            f"give quantiles of site {site!r}",
            got=type(fn).__name__,
            because="they need the inverse distribution function of each coordinate",
            fix="Draw from the guide with pyro.infer.Predictive and take empirical quantiles.",
        )
    return found.expand(levels.shape[:1] + fn.shape())


def _like(fn: Any) -> Tensor:
    """Return a tensor of a distribution's dtype and device."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    own = [x for x in vars(fn).values() if isinstance(x, Tensor) and x.is_floating_point()]
    return own[0] if own else torch.zeros(())
