r"""Where the values of a site live, in one word, and which families draw there."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import constraints
from torch.distributions import biject_to
from torch.distributions.constraints import MixtureSameFamilyConstraint

from .._distributions import base_of
from .._registry import entries

__all__ = ["base_of", "cardinality", "kind", "names_for", "serves", "support_of"]


def support_of(fn: Any, support: Any = None) -> Any:
    """Return the support of a distribution, or the one given; of a `MixtureSameFamily` its components'.

    Example:
        >>> import pyro.distributions as dist
        >>> support_of(dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Gamma(torch.ones(2), 1.0)))
        GreaterThanEq(lower_bound=0.0)
    """
    return _unmixed(fn.support if support is None else support)


def kind(fn: Any, support: Any = None) -> str:
    r"""Return where a site's values live.

    Returns:
        ``"binary"``, ``"categorical"`` (0 to K - 1), ``"one_hot"``, ``"count"`` (other discrete values); ``"real"``,
        ``"positive"``, ``"unit_interval"``, ``"simplex"``, ``"circle"`` (angles: a von Mises site, or the interval from
        -pi to pi), or ``"other"``.

    Example:
        >>> import pyro.distributions as dist
        >>> kind(dist.Beta(1.0, 1.0)), kind(dist.Poisson(torch.ones(3)).to_event(1))
        ('unit_interval', 'count')
    """
    c = _inner(support_of(fn, support))
    if c.is_discrete:
        return _discrete(c)
    if type(base_of(fn)).__name__ == "VonMises":
        return "circle"
    if isinstance(c, type(constraints.real)):
        return "real"
    if isinstance(c, constraints.greater_than | constraints.greater_than_eq) and _is(c.lower_bound, 0.0):
        return "positive"
    if isinstance(c, type(constraints.simplex)):
        return "simplex"
    if isinstance(c, constraints.interval | constraints.half_open_interval):
        if _is(c.lower_bound, 0.0) and _is(c.upper_bound, 1.0):
            return "unit_interval"
        if _is(c.lower_bound, -math.pi) and _is(c.upper_bound, math.pi):
            return "circle"
    return "other"


def serves(support: str, fn: Any, own: Any = None) -> bool:
    """Return whether a family with this trait can draw the values of a site, whose support may be given apart."""
    where = kind(fn, own)
    discrete = where in ("binary", "categorical", "one_hot", "count")
    if support == "continuous":
        return not discrete and _has_bijection(support_of(fn, own))
    return support in ("any", where) or (support == "discrete" and discrete)


def names_for(fn: Any, own: Any = None) -> list[str]:
    """Return the registered families that can serve a site; those made for its support first, then the default."""
    fitting = [entry for entry in entries("family") if serves(entry.traits.support, fn, own)]
    return [
        entry.name for entry in sorted(fitting, key=lambda e: (e.traits.support == "continuous", e.name != "normal"))
    ]


def cardinality(fn: Any, support: Any = None) -> int:
    """Return how many values a site of the kind ``"categorical"`` can have."""
    upper = torch.as_tensor(_inner(support_of(fn, support)).upper_bound)
    return int(upper.flatten()[0]) + 1


def _discrete(c: Any) -> str:
    if isinstance(c, type(constraints.boolean)):
        return "binary"
    if isinstance(c, type(constraints.one_hot)):
        return "one_hot"
    if isinstance(c, constraints.integer_interval) and _is(c.lower_bound, 0.0):
        upper = torch.as_tensor(c.upper_bound)
        if upper.numel() and bool((upper == upper.flatten()[0]).all()):
            return "categorical"
    return "count"


def _unmixed(support: Any) -> Any:
    if isinstance(support, MixtureSameFamilyConstraint):
        return _unmixed(support.base_constraint)
    if isinstance(support, constraints.independent):
        return constraints.independent(_unmixed(support.base_constraint), support.reinterpreted_batch_ndims)
    return support


def _inner(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _is(bound: Any, value: float) -> bool:
    bound = torch.as_tensor(bound)
    return bool(torch.isclose(bound.double(), torch.tensor(value, dtype=torch.float64, device=bound.device)).all())


def _has_bijection(support: Any) -> bool:
    try:
        biject_to(support)
    except NotImplementedError:
        return False
    return True
