r"""Pairs of distributions whose KL divergence, as torch computes it, was found right, derivatives included.

`torch.distributions.kl_divergence` answers more pairs than it answers rightly: it dispatches subclasses, with a log
density of their own, to their parents' formula; of exponential families without one (Wishart) it gives the value and
drops the derivative by the first distribution's parameters; and it takes transforms for the same whose numbers are
equal now, though different parameters made them (`AffineBeta`).
"""

from __future__ import annotations

from typing import Any

import pyro.distributions
import torch.distributions
from torch import Tensor
from torch.distributions import ComposeTransform, ExpTransform, Transform, TransformedDistribution, Wishart

__all__ = ["has_closed_form", "loses_derivatives"]


def _both(*names: str) -> frozenset[type]:
    """Return torch's and Pyro's classes of these names."""
    return frozenset(getattr(module, name) for module in (torch.distributions, pyro.distributions) for name in names)


NORMALS = {"LowRankMultivariateNormal", "MultivariateNormal"}
GAMMAS = {"Chi2", "Exponential", "Gamma", "Normal"}
PAIRS = {
    "Beta": {"Beta", "ContinuousBernoulli", *GAMMAS},
    "Cauchy": {"Cauchy"},
    "Chi2": GAMMAS,
    "ContinuousBernoulli": {"ContinuousBernoulli", "Exponential", "Normal"},
    "Dirichlet": {"Dirichlet"},
    "Exponential": GAMMAS,
    "Gamma": GAMMAS,
    "Gumbel": {"Normal"},
    "HalfNormal": {"HalfNormal"},
    "Laplace": {"Laplace", "Normal"},
    "LowRankMultivariateNormal": NORMALS,
    "MultivariateNormal": NORMALS,
    "Normal": {"Laplace", "MultivariateNormal", "Normal"},
}
"""Names of the first and of the second. They are reparameterised, their supports are moved by no parameter, so that the
KL is finite (that to a Gumbel soon overflows), and it is right against quadrature and, for vectors, the formula by
matrices (tests/test_closed_forms.py).
"""

LEAVES = _both(*PAIRS)
WRAPPERS = _both("Independent")
TRANSFORMED = _both("LogNormal", "TransformedDistribution")
INVERSE = type(ExpTransform().inv)


def has_closed_form(one: Any, two: Any) -> bool:
    r"""Whether $\mathrm{KL}(one\|two)$ is finite and, where it is registered, right, by classes and transforms alone.

    Of classes only those themselves are taken, no subclass; of tensors, no value is looked at.

    Example:
        >>> from pyro.distributions import Gamma, NanMaskedNormal, Normal
        >>> normal = Normal(0.0, 1.0)
        >>> [has_closed_form(one, normal) for one in (Normal(2.0, 1.0), Gamma(1.0, 1.0), NanMaskedNormal(0.0, 1.0))]
        [True, True, False]
    """
    one, two = _unwrapped(one), _unwrapped(two)
    if type(one) in TRANSFORMED and type(two) in TRANSFORMED:
        pairs = zip(one.transforms, two.transforms, strict=False)
        same = len(one.transforms) == len(two.transforms) and all(_is_same(a, b) for a, b in pairs)
        return same and has_closed_form(one.base_dist, two.base_dist)
    return type(one) in LEAVES and type(two) in LEAVES and type(two).__name__ in PAIRS[type(one).__name__]


def loses_derivatives(one: Any, two: Any) -> bool:
    """Whether torch has the KL of a pair, and drops derivatives: by Wishart's parameters, or by those of transforms."""
    one, two = _unwrapped(one), _unwrapped(two)
    if isinstance(one, Wishart) and isinstance(two, Wishart):
        return True
    if not (isinstance(one, TransformedDistribution) and isinstance(two, TransformedDistribution)):
        return False
    pairs = [(a, b) for a, b in zip(one.transforms, two.transforms, strict=False) if a is not b]
    return any(_moves(t) for pair in pairs for t in pair) or loses_derivatives(one.base_dist, two.base_dist)


def _moves(transform: Transform) -> bool:
    """Whether a transform has a tensor that is differentiated."""
    inner = transform.parts if isinstance(transform, ComposeTransform) else ()
    own = any(isinstance(value, Tensor) and value.requires_grad for value in vars(transform).values())
    return own or any(map(_moves, inner))


def _unwrapped(fn: Any) -> Any:
    while type(fn) in WRAPPERS:
        fn = fn.base_dist
    return fn


def _is_same(one: Transform, two: Transform) -> bool:
    """Whether two transforms are one, or of one class without tensors and of the same numbers; and one-to-one."""
    if one is two:
        return one.bijective
    plain = type(one) is type(two) and one.bijective and _is_plain(one) and _is_plain(two)
    return plain and one == two


def _is_plain(transform: Transform) -> bool:
    """Whether a transform holds nothing but numbers; its inverse, which it keeps once asked for it, has no others."""
    own = [value for name, value in vars(transform).items() if name != "_inv"]
    return type(transform) is not INVERSE and all(value is None or isinstance(value, int | float) for value in own)
