r"""Finite sites with event dims, told by all of their joint outcomes; Pyro enumerates elements of plates only."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

__all__ = ["Outcomes", "Product", "base_of", "is_finite"]

MAX_OUTCOMES = 4096


def base_of(fn: Any) -> Any:
    """Return the distribution inside `Independent` and `MaskedDistribution`."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def is_finite(fn: Any) -> bool:
    """Whether a site has few outcomes that can be listed."""
    return bool(fn.has_enumerate_support) or _num_outcomes(fn) <= MAX_OUTCOMES


def _num_outcomes(fn: Any) -> float:
    base = base_of(fn)
    if not base.has_enumerate_support or fn.event_dim <= base.event_dim:
        return math.inf
    return len(base.enumerate_support(expand=False)) ** _num_elements(fn)


def _num_elements(fn: Any) -> int:
    return math.prod(fn.event_shape[: fn.event_dim - base_of(fn).event_dim])


class Product(TorchDistribution):
    r"""A distribution with `.to_event()` whose joint outcomes are listed, $k^n$ of n elements with k outcomes each.

    Example:
        >>> fn = Product(dist.Bernoulli(torch.tensor([0.5, 0.2])).to_event(1))
        >>> fn.enumerate_support().tolist()
        [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_enumerate_support = True

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    @constraints.dependent_property
    def support(self) -> Any:
        return self.fn.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Product:
        return Product(self.fn.expand(torch.Size(batch_shape)))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.fn.sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.fn.log_prob(value)

    def outcomes(self) -> Tensor:
        """Return the joint outcomes, ``(S, *event)``."""
        base = base_of(self.fn)
        each = base.enumerate_support(expand=False).reshape(-1, *base.event_shape)
        places = torch.cartesian_prod(*[torch.arange(len(each))] * _num_elements(self.fn))
        return each[places.reshape(len(places), -1)].reshape(-1, *self.event_shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        found = self.outcomes()
        found = found.reshape(len(found), *(1,) * len(self.batch_shape), *self.event_shape)
        return found.expand(len(found), *self.batch_shape, *self.event_shape) if expand else found

    def at_outcomes(self, logits: Tensor) -> Outcomes:
        """Return the distribution that gives the outcomes these log probabilities, ``(*batch, S)``."""
        return Outcomes(self.outcomes(), logits)


class Outcomes(TorchDistribution):
    r"""A distribution over listed values.

    Args:
        values: ``(S, *event)``.
        logits: ``(*batch, S)``.

    Example:
        >>> fn = Outcomes(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([0.25, 0.75]).log())
        >>> fn.mean, fn.log_prob(torch.tensor([0.0, 1.0])).exp()
        (tensor([0.7500, 1.0000]), tensor(0.2500))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, values: Tensor, logits: Tensor) -> None:
        self.values, self._choice = values, dist.Categorical(logits=logits, validate_args=False)
        super().__init__(self._choice.batch_shape, values.shape[1:], validate_args=False)

    @constraints.dependent_property
    def support(self) -> Any:
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        return torch.tensordot(self._choice.probs, self.values.to(self._choice.probs), 1)

    @property
    def variance(self) -> Tensor:
        return torch.tensordot(self._choice.probs, self.values.to(self._choice.probs) ** 2, 1) - self.mean**2

    def expand(self, batch_shape: Any, _instance: Any = None) -> Outcomes:
        logits = self._choice.logits
        return Outcomes(self.values, logits.expand(torch.Size(batch_shape) + logits.shape[-1:]))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.values[self._choice.sample(sample_shape)]

    def log_prob(self, value: Tensor) -> Tensor:
        dims = len(self.event_shape)
        same = (value.unsqueeze(-1 - dims) == self.values).flatten(-dims).all(-1)
        return torch.where(same, self._choice.logits, -math.inf).logsumexp(-1)
