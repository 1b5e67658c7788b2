r"""Distribution functions and their inverses that torch has not; from scipy, without gradients."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.transforms import ReshapeTransform

from ._supports import base_of

__all__ = ["marginals", "quantile", "special"]

NORMALS = (dist.MultivariateNormal, dist.LowRankMultivariateNormal)


def special(name: str, *arguments: Tensor) -> Tensor:
    r"""Return a function of ``scipy.special``, on the device and in the dtype of its first argument.

    Example:
        >>> special("stdtrit", torch.tensor(10.0), torch.tensor(0.975))
        tensor(2.2281)
    """
    from scipy import special as functions

    arrays = [tensor.detach().double().cpu().numpy() for tensor in arguments]
    return torch.as_tensor(getattr(functions, name)(*arrays), dtype=arguments[0].dtype, device=arguments[0].device)


def marginals(fn: Any) -> Any:
    """Return the normals of the coordinates of a normal, multivariate or not, reshaped or not."""
    base = getattr(fn, "base_dist", fn)
    loc, std = (part.reshape(fn.batch_shape + fn.event_shape) for part in (base.mean, base.variance.sqrt()))
    return dist.Normal(loc, std)


def quantile(fn: Any, level: Tensor) -> Tensor | None:
    r"""Return the marginal quantiles of each coordinate: the least value whose distribution function reaches the level.

    Args:
        fn: A distribution.
        level: Probabilities that broadcast against ``(*batch, *event)``.

    Returns:
        The quantiles; None for a distribution that has none, as a one-hot vector.

    Example:
        >>> quantile(dist.Beta(2.0, 1.0), torch.tensor([0.25]))
        tensor([0.5000])
    """
    fn = base_of(fn)
    if isinstance(fn, NORMALS):
        return marginals(fn).icdf(level)
    for kind, function in _OF_KIND.items():
        if isinstance(fn, kind):
            return function(fn, level)
    if isinstance(fn, dist.TransformedDistribution) and not isinstance(fn, dist.LogNormal):
        inner = base_of(fn.base_dist)
        shaped = all(isinstance(transform, ReshapeTransform) for transform in fn.transforms)
        return marginals(fn).icdf(level) if shaped and isinstance(inner, (dist.Normal, *NORMALS)) else None
    try:
        return fn.icdf(level)
    except NotImplementedError:
        return None


def _beta(fn: Any, level: Tensor) -> Tensor:
    return special("betaincinv", fn.concentration1, fn.concentration0, level)


def _gamma(fn: Any, level: Tensor) -> Tensor:
    return special("gammaincinv", fn.concentration, level) / fn.rate


def _dirichlet(fn: Any, level: Tensor) -> Tensor:
    """Return the quantiles of each entry, which is Beta distributed; they need not add up to 1."""
    one = fn.concentration
    return special("betaincinv", one, one.sum(-1, keepdim=True) - one, level)


def _student(fn: Any, level: Tensor) -> Tensor:
    return fn.loc + fn.scale * special("stdtrit", fn.df, level)


def _bernoulli(fn: Any, level: Tensor) -> Tensor:
    return (level > torch.sigmoid(-fn.logits)).to(fn.logits.dtype)


def _categorical(fn: Any, level: Tensor) -> Tensor:
    below = fn.probs.cumsum(-1)[..., :-1]
    return (below < level.unsqueeze(-1)).sum(-1)


_OF_KIND = {
    dist.Beta: _beta,
    dist.Gamma: _gamma,
    dist.Dirichlet: _dirichlet,
    dist.StudentT: _student,
    dist.Bernoulli: _bernoulli,
    dist.Categorical: _categorical,
}
