r"""The contract of a posterior: the only thing that an M-step sees of an E-step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..particles import Particles, replay

__all__ = ["Posterior", "Support", "expected_log_joint"]

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Support:
    r"""Weighted values whose average is the posterior expectation: $E[f(z_n)]=\sum_s w_{sn}f(z_{sn})$.

    Draws of equal weight, draws weighted by importance, all outcomes of discrete latents, nodes of a cubature.

    Args:
        values: By latent, ``(S, *plates, *event)``; every plate dim is there, those of other plates have size 1.
        log_weights: ``(S, *plates)`` or broadcastable to it; their exponentials sum to one over S for each datum.
        num_plates: Number of plate dims.
        scale, mask: What the model multiplies by and keeps, for the latents: numbers, or tensors over the plates.
    """

    values: Values = field(repr=False)
    log_weights: Tensor = field(repr=False)
    num_plates: int
    scale: Any = 1.0
    mask: Any = None

    def expect(self, function: Callable[[Values], Any]) -> Any:
        """Return the expectation per datum of a tensor, or of each tensor in a dict: ``(*plates, ...)``."""
        return _each(function(self.values), self._average)

    def total(self, function: Callable[[Values], Any]) -> Any:
        """Return the expectation summed over the plates, times scale, where the mask is true."""
        return _each(function(self.values), lambda x: self._sum(self._average(x)))

    def _average(self, x: Tensor) -> Tensor:
        rest = x.dim() - 1 - self.num_plates
        weights = self.log_weights.exp()
        return (weights.reshape(weights.shape + (1,) * rest) * x).sum(0)

    def weigh(self, x: Tensor) -> Tensor:
        """Return values per datum ``(*plates, ...)`` times scale, and zero where the mask is false."""
        rest = (1,) * (x.dim() - self.num_plates)
        for factor in (self.scale, self.mask):
            if isinstance(factor, Tensor):
                factor = factor.reshape((1,) * (self.num_plates - factor.dim()) + factor.shape + rest)
                # not a product: a statistic of a missing value may be NaN
                x = torch.where(factor, x, 0.0) if factor.dtype == torch.bool else x * factor
            elif factor is not None:
                x = x * factor
        return x

    def _sum(self, x: Tensor) -> Tensor:
        x, dims = self.weigh(x), tuple(range(self.num_plates))
        return x.sum(dims) if dims else x


def _each(result: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return {k: function(x) for k, x in result.items()} if isinstance(result, Mapping) else function(result)


def expected_log_joint(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], support: Support, vectorize: bool = True
) -> Tensor:
    r"""Return $\sum_s w_{sn}\log p_\theta(x_n,z_{sn})$ over all data, to be differentiated by theta.

    Args:
        model, args, kwargs: What is replayed on the support's values.
        support: Values and weights.
        vectorize: Whether all values are replayed in one run.
    """
    count, nesting = support.log_weights.shape[0], support.num_plates
    if vectorize or count == 1:
        runs = [(support.values, count)]
    else:
        runs = [({n: v[s] for n, v in support.values.items()}, 1) for s in range(count)]
    total: Any = 0.0
    weights = support.log_weights.exp()
    for place, (values, rows) in enumerate(runs):
        particles = replay(model, _draw_nothing, values, args, kwargs, num_particles=rows, max_plate_nesting=nesting)
        mine = weights if len(runs) == 1 else weights[place : place + 1]
        for site in particles.model.values():
            row = particles.rows(site.scaled)
            outside = [dim for dim in range(1, row.dim()) if row.shape[dim] == 1 and mine.shape[dim] > 1]
            factor = mine.mean(outside, keepdim=True) if outside else mine
            # a weight of zero, times a log density of minus infinity, is zero
            total = total + torch.where(factor > 0, factor * row, 0.0).sum()
    return total


def _draw_nothing(*args: Any, **kwargs: Any) -> None:
    """A guide for a model whose values are all given."""


class Posterior(ABC):
    """A distribution over the latents given the data, as an E-step leaves it."""

    kind: str
    is_exact: bool = False
    entropy: float = math.nan

    @abstractmethod
    def support(self, num_particles: int) -> Support:
        """Return weighted values; an exact posterior returns all of them, or a cubature, whatever the number."""

    @abstractmethod
    def marginal(self, site: str) -> Any:
        """Return the distribution of one site."""

    @abstractmethod
    def sample(self) -> Values:
        """Draw all latents with `pyro.sample`, inside their plates: the body of a guide."""

    @abstractmethod
    def expected_log_joint(self, num_particles: int) -> Tensor:
        r"""Return $E[\log p_\theta(x,z)]$ at the present theta, to be differentiated by it: scalar, nats."""

    def particles(self, num_particles: int) -> Particles:
        """Return draws with the densities of model and guide."""
        raise NotImplementedError

    def expect(self, function: Callable[[Values], Any], num_particles: int = 100) -> Any:
        r"""Return the expectation of a function of the latents' values, per datum.

        Args:
            function: Takes a dict from latent to values ``(S, *plates, *event)`` and returns a tensor
                ``(S, *plates, ...)`` or a dict of such.
            num_particles: Draws, where draws are needed.
        """
        return self.support(num_particles).expect(function)
