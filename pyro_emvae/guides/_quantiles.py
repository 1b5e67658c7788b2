r"""Quantiles of each coordinate of a distribution; torch lacks those of Beta, Gamma, StudentT and discrete ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import transforms

from .._checks import EmvaeError, fail

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
        >>> quantile("example", "z", dist.Beta(2.0, 1.0), torch.tensor([0.25]))
        tensor([0.5000])
    """
    like = _like(fn)
    levels = torch.as_tensor(levels, dtype=like.dtype, device=like.device).reshape(-1, *[1] * len(fn.shape()))
    found = _quantile(fn, levels)
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


def _quantile(fn: Any, levels: Tensor) -> Tensor | None:
    if isinstance(fn, dist.MultivariateNormal):
        return dist.Normal(fn.mean, fn.variance.sqrt()).icdf(levels)
    if isinstance(fn, dist.TransformedDistribution):
        return _transformed(fn, levels)
    if isinstance(fn, dist.Independent):
        return _quantile(fn.base_dist, levels)
    for kind, function in _OF_KIND.items():
        if isinstance(fn, kind):
            return function(fn, levels)
    try:
        return fn.icdf(levels)
    except NotImplementedError:
        return None


def _transformed(fn: Any, levels: Tensor) -> Tensor | None:
    """Return the quantiles under a change of shape, or an increasing map of each coordinate."""
    shaped = [t for t in fn.transforms if isinstance(t, transforms.ReshapeTransform)]
    if len(shaped) != len(fn.transforms):
        return None
    base = _quantile(fn.base_dist, levels.reshape(-1, *[1] * len(fn.base_dist.shape())))
    for transform in shaped:
        base = None if base is None else transform(base)
    return base


def _scipy(function: str, *arguments: Tensor) -> Tensor:
    from scipy import special

    like = arguments[0]
    arrays = [x.detach().double().cpu().numpy() for x in arguments]
    return torch.as_tensor(getattr(special, function)(*arrays)).to(like)


def _beta(fn: Any, levels: Tensor) -> Tensor:
    return _scipy("betaincinv", fn.concentration1, fn.concentration0, levels)


def _gamma(fn: Any, levels: Tensor) -> Tensor:
    return _scipy("gammaincinv", fn.concentration, levels) / fn.rate


def _dirichlet(fn: Any, levels: Tensor) -> Tensor:
    a = fn.concentration
    return _scipy("betaincinv", a, a.sum(-1, keepdim=True) - a, levels)


def _student(fn: Any, levels: Tensor) -> Tensor:
    return fn.loc + fn.scale * _scipy("stdtrit", fn.df, levels)


def _bernoulli(fn: Any, levels: Tensor) -> Tensor:
    return (levels > 1 - fn.probs).to(fn.probs)


def _categorical(fn: Any, levels: Tensor) -> Tensor:
    below = fn.probs.cumsum(-1)[..., :-1]
    return (levels.unsqueeze(-1) > below).sum(-1)


_OF_KIND = {
    dist.Beta: _beta,
    dist.Gamma: _gamma,
    dist.Dirichlet: _dirichlet,
    dist.StudentT: _student,
    dist.Bernoulli: _bernoulli,
    dist.Categorical: _categorical,
}
