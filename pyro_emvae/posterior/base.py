r"""The contract of a posterior: the only thing that an M-step sees of an E-step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._checks import StepError, fail
from ..particles import Particles, generators, replay

__all__ = ["Outer", "Posterior", "Support", "expected_log_joint"]

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Outer:
    r"""The statistic $a_nb_n^\top$ per datum, for sums over many data: `Support.total` forms no product per datum.

    Args:
        left, right: ``(S, *plates, a)`` and ``(S, *plates, b)``, or broadcastable to it.
    """

    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)

    @property
    def product(self) -> Tensor:
        return self.left[..., :, None] * self.right[..., None, :]


@dataclass(frozen=True)
class Support:
    r"""Weighted values whose average is the posterior expectation: $E[f(z_n)]=\sum_s w_{sn}f(z_{sn})$.

    Draws of equal weight, draws weighted by importance, all outcomes of discrete latents, nodes of a cubature.

    Args:
        values: By latent, ``(S, *plates, *event)``; every plate dim is there, those of other plates have size 1.
        log_weights: ``(S, *plates)`` or broadcastable to it; their exponentials sum to one over S for each datum.
        num_plates: Number of plate dims.
        scale, mask: What the model multiplies by and keeps, for the latents: numbers, or tensors over the plates.
        drawn: Plates of the model that drew their batch at random, so that nobody outside knows which data it holds.
        sampled: Whether the values are draws, so that averages over them have a Monte Carlo error.
    """

    values: Values = field(repr=False)
    log_weights: Tensor = field(repr=False)
    num_plates: int
    scale: Any = 1.0
    mask: Any = None
    drawn: tuple[str, ...] = ()
    sampled: bool = False

    @cached_property
    def weights(self) -> Tensor:
        """The weights themselves."""
        return self.log_weights.exp()

    def expect(self, function: Callable[[Values], Any]) -> Any:
        """Return the expectation per datum of a tensor or `Outer`, or of each in a dict: ``(*plates, ...)``."""
        return _each(function(self.values), lambda x: self._average(x.product if isinstance(x, Outer) else x))

    def total(self, function: Callable[[Values], Any]) -> Any:
        """Return the expectation summed over the plates, times scale, where the mask is true."""
        return _each(function(self.values), self._total)

    def _total(self, x: Tensor | Outer) -> Tensor:
        if not isinstance(x, Outer):
            return self._sum(self._average(x))
        left, right, weights = x.left, x.right, self.weights
        self._check(left)
        self._check(right)
        if len(left) == 1:
            right, weights = self._average(right)[None], weights.new_ones(1)
        elif weights.numel() > len(weights):
            left, weights = left * weights[..., None], weights.new_ones(len(left))
        if isinstance(self.scale, Tensor) or self.scale != 1.0 or self.mask is not None:
            left = torch.stack([self.weigh(row) for row in left])
        shape = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
        left, right = (y.expand(*shape, -1).reshape(shape[0], -1, y.shape[-1]) for y in (left, right))
        return torch.tensordot(weights.flatten(), left.mT @ right, 1)

    def _average(self, x: Tensor) -> Tensor:
        x = x.reshape((1,) * (1 + self.num_plates - x.dim()) + x.shape)
        self._check(x)
        if len(x) == 1:  # the weights sum to one
            return x[0]
        rest, weights = x.dim() - 1 - self.num_plates, self.weights
        if weights.numel() == len(x):
            return torch.tensordot(weights.flatten(), x, 1)
        return (weights.reshape(weights.shape + (1,) * rest) * x).sum(0)

    @cached_property
    def _sizes(self) -> list[int]:
        """The sizes ``(S, *plates)`` of the values."""
        lead = 1 + self.num_plates
        sizes = [self.log_weights.shape, *(value.shape[:lead] for value in self.values.values())]
        return [max(each) for each in zip(*sizes, strict=False)]

    def _check(self, x: Tensor) -> None:
        """Refuse what does not lie along draws and plates, and would be added up along others."""
        lead = tuple(x.shape[: 1 + self.num_plates])
        fits = all(size in (1, mine) or mine == 1 for size, mine in zip(lead[1:], self._sizes[1:], strict=False))
        if len(lead) <= self.num_plates or lead[0] not in (1, self._sizes[0]) or not fits:
            fail(
                StepError,
                "Posterior",
                "take the expectation of a statistic",
                got=f"shape {tuple(x.shape)} for {self._sizes[0]} values of the latents with plates "
                f"{tuple(self._sizes[1:])}",
                because="a statistic is (S, *plates, ...) for S values, with size 1 where it is the same for all",
                fix="Write x[None] for what does not depend on the latents.",
            )

    def weigh(self, x: Tensor) -> Tensor:
        """Return values per datum ``(*plates, ...)`` times scale, and zero where the mask is false."""
        rest = (1,) * (x.dim() - self.num_plates)
        for factor in (self.scale, self.mask):
            if isinstance(factor, Tensor):
                factor = factor.reshape((1,) * (self.num_plates - factor.dim()) + factor.shape + rest)
                # not a product: a statistic of a missing value may be NaN
                x = torch.where(factor, x, 0.0) if factor.dtype == torch.bool else x * factor
            elif factor is not None and factor != 1.0:
                x = x * factor
        return x

    def _sum(self, x: Tensor) -> Tensor:
        x, dims = self.weigh(x), tuple(range(self.num_plates))
        return x.sum(dims) if dims else x


def _each(result: Any, function: Callable[[Tensor], Tensor]) -> Any:
    for x in result.values() if isinstance(result, Mapping) else [result]:
        if not isinstance(x, Tensor | Outer):
            fail(
                StepError,
                "Posterior",
                "take the expectation of a statistic",
                got=f"a {type(x).__name__}",
                because="a statistic is a tensor (S, *plates, ...), or several are a dict of such",
                fix='Return {"n": torch.ones_like(x)[None]}, for instance.',
            )
    return {k: function(x) for k, x in result.items()} if isinstance(result, Mapping) else function(result)


def expected_log_joint(
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    support: Support,
    vectorize: bool = True,
    lacking: Mapping[str, int] | None = None,
) -> Tensor:
    r"""Return $\sum_s w_{sn}\log p_\theta(x_n,z_{sn})$ over all data, to be differentiated by theta.

    Args:
        model, args, kwargs: What is replayed on the support's values.
        support: Values and weights.
        vectorize: Whether all values are replayed in one run.
        lacking: How many of the outermost plate dims a latent lacks; runs one by one get values without them.
    """
    count, nesting = support.log_weights.shape[0], support.num_plates
    if vectorize or count == 1:
        runs = [(support.values, count)]
    else:
        lacking = lacking or {}
        each = {n: v.reshape(len(v), *v.shape[1 + lacking.get(n, 0) :]) for n, v in support.values.items()}
        runs = [({n: v[s] for n, v in each.items()}, 1) for s in range(count)]
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
    def sample(self, plates: Mapping[str, Any] | None = None) -> Values:
        """Draw all latents with `pyro.sample`, inside their plates: the body of a guide.

        Args:
            plates: Plates by name that are already stated, to be opened around the sites; others are stated.
        """

    @abstractmethod
    def expected_log_joint(self, num_particles: int) -> Tensor:
        r"""Return $E[\log p_\theta(x,z)]$ at the present theta, to be differentiated by it: scalar, nats."""

    def held(self, num_particles: int) -> Callable[[], Tensor]:
        """Return the expected log joint as a function of theta alone, without noise: the same draws in each call."""
        rewind = generators()

        def expected() -> Tensor:
            rewind()
            return self.expected_log_joint(num_particles)

        return expected

    def tempered(self, beta: float) -> Posterior:
        r"""Return $q(z)\propto p_\theta(x,z)^\beta$ on the same data, at the theta of the E-step.

        Raises:
            StepError: This kind of posterior cannot be tempered.
        """
        fail(
            StepError,
            type(self).__name__,
            f"be annealed with the factor {beta:.4g}",
            got=f"a posterior of kind {self.kind!r}",
            because="its power is not known",
            fix="Anneal with steps.Enumerated(), Gaussian(), MonteCarlo() or Gradient(), or leave anneal= out.",
        )

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
