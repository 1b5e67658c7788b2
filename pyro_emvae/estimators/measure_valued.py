r"""The measure-valued (weak) derivative: a difference of the integrand at coupled draws of two distributions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._registry import Traits, register
from .base import Estimator, SiteTerms, Situation, State, base

__all__ = ["MeasureValued"]


@dataclass(frozen=True)
class MeasureValued(Estimator):
    r"""Measure-valued gradient: by each parameter $\omega$ of each coordinate of a site,

    $$\nabla_\omega E_q[f]=c_\omega\big(E_{q^+_\omega}[f]-E_{q^-_\omega}[f]\big),$$

    with the pair drawn from common noise, and all other coordinates as drawn. Of

    * ``Normal``: by the mean, $c=1/(\sigma\sqrt{2\pi})$ and $\mu\pm\sigma W$, W Rayleigh; by the standard deviation,
      $c=1/\sigma$, $\mu+\sigma M$ and $\mu+\sigma MU$, M double-sided Maxwell and U uniform;
    * ``Gamma``: by the rate, $c=\alpha/\beta$, z and z plus an exponential draw; by the concentration, which has no
      such pair in closed form, the score function with the mean of the other particles as its baseline;
    * ``Poisson``: c = 1, z + 1 and z;
    * ``Bernoulli``, ``Categorical`` and ``OneHotCategorical``: every outcome, weighted by its probability.

    When to use: an integrand that is not differentiable, or too rough for the pathwise gradient, in few dimensions.
    Unbiased. Cost: model evaluations per particle and coordinate: 4 for a normal, 1 for a Gamma or Poisson, as many as
    outcomes for the others; elements of a plate share them. All are made in one vectorized run.

    Raises:
        EstimatorError: The site has another distribution.

    Source: Pflug 1989; Mohamed, Rosca, Figurnov and Mnih 2020, "Monte Carlo gradient estimation in machine learning",
    section 6 and table 1; coupling: their section 7.2. Differs: all outcomes in place of pairs for discrete sites.

    Example:
        >>> MeasureValued().traits.probes
        'yes'
    """

    traits: ClassVar[Traits] = Traits(probes="yes", noisy=True)

    def fits(self, at: Situation) -> str | None:
        return None if _pair(at.fn) else f"no pair of measures is known for {type(base(at.fn)).__name__}"

    def probes(self, site: SiteTerms, rows: int, state: State) -> Tensor | None:
        return _pair(site.fn).values(site)

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Tensor | None]:
        term = _pair(site.fn).term(site, signal, rows)
        return {"value": term, "guide": term}


class Pair(ABC):
    """The pairs of one kind of distribution."""

    @abstractmethod
    def values(self, site: SiteTerms) -> Tensor:
        """Return the values at which f is wanted: ``(probes, *value.shape)``."""

    @abstractmethod
    def term(self, site: SiteTerms, signal: Tensor, rows: int) -> Tensor:
        """Return a term with the derivative's gradient."""


class NormalPair(Pair):
    def values(self, site: SiteTerms) -> Tensor:
        z = site.value.detach()
        uniform = torch.rand_like(z)
        rayleigh = (-2 * torch.log1p(-torch.rand_like(z))).sqrt()
        maxwell = torch.randn((3, *z.shape), dtype=z.dtype, device=z.device).norm(dim=0) * torch.randn_like(z).sign()
        moves = [rayleigh, -rayleigh, maxwell, maxwell * uniform]
        loc, scale = (_parameter(site, name).detach() for name in ("loc", "scale"))
        return torch.cat([_one_by_one(z, loc + scale * move, site.fn.event_dim) for move in moves])

    def term(self, site: SiteTerms, signal: Tensor, rows: int) -> Tensor:
        loc, scale = (_parameter(site, name) for name in ("loc", "scale"))
        up, down, wide, narrow = (_by_coordinate(f, site) for f in site.probed.signal.chunk(4))
        by_loc = (up - down) / (scale.detach() * math.sqrt(2 * math.pi))
        return by_loc * loc + (wide - narrow) / scale.detach() * scale


class GammaPair(Pair):
    def values(self, site: SiteTerms) -> Tensor:
        z = site.value.detach()
        further = z - torch.log1p(-torch.rand_like(z)) / _parameter(site, "rate").detach()
        return _one_by_one(z, further, site.fn.event_dim)

    def term(self, site: SiteTerms, signal: Tensor, rows: int) -> Tensor:
        concentration, rate = (_parameter(site, name) for name in ("concentration", "rate"))
        at_z = signal.reshape(signal.shape + (1,) * site.fn.event_dim)
        by_rate = concentration.detach() / rate.detach() * (at_z - _by_coordinate(site.probed.signal, site))
        baseline = (at_z.sum(0, keepdim=True) - at_z) / (rows - 1) if rows > 1 else 0.0
        score = type(base(site.fn))(concentration, rate.detach(), validate_args=False).log_prob(site.value.detach())
        return by_rate * rate + (at_z - baseline) * score


class PoissonPair(Pair):
    def values(self, site: SiteTerms) -> Tensor:
        z = site.value.detach()
        return _one_by_one(z, z + 1, site.fn.event_dim)

    def term(self, site: SiteTerms, signal: Tensor, rows: int) -> Tensor:
        at_z = signal.reshape(signal.shape + (1,) * site.fn.event_dim)
        return (_by_coordinate(site.probed.signal, site) - at_z) * _parameter(site, "rate")


class Outcomes(Pair):
    def values(self, site: SiteTerms) -> Tensor:
        z, single = site.value.detach(), base(site.fn).event_dim
        outcomes = base(site.fn).enumerate_support(expand=False)
        outcomes = outcomes.reshape(len(outcomes), *outcomes.shape[outcomes.dim() - single :])
        event = site.fn.event_dim - single
        return torch.cat([_one_by_one(z, o.to(z).expand(z.shape), event, single) for o in outcomes])

    def term(self, site: SiteTerms, signal: Tensor, rows: int) -> Tensor:
        single = base(site.fn).event_dim
        support = base(site.fn).enumerate_support(expand=False)
        probabilities = _probabilities(site, support, single)
        parts = site.probed.signal.chunk(len(support))
        return sum(_by_coordinate(f, site, single) * p for f, p in zip(parts, probabilities, strict=True))


PAIRS = {
    "Normal": NormalPair(),
    "Gamma": GammaPair(),
    "Poisson": PoissonPair(),
    "Bernoulli": Outcomes(),
    "Categorical": Outcomes(),
    "OneHotCategorical": Outcomes(),
}


def _pair(fn: Any) -> Pair | None:
    return PAIRS.get(type(base(fn)).__name__)


def _parameter(site: SiteTerms, name: str) -> Tensor:
    """Return a parameter of the site's distribution; of particles run one by one, each has its own."""
    if not site.runs:
        return getattr(base(site.fn), name)
    rows = [getattr(base(run.fn), name).expand(run.fn.shape()) for run in site.runs]
    return torch.stack([row.reshape(site.value.shape[1:]) for row in rows])


def _probabilities(site: SiteTerms, support: Tensor, single: int) -> Tensor:
    """Return the probabilities of all outcomes, ``(outcomes, particles?, *plates, *event)``, each run its own."""
    if not site.runs:
        return base(site.fn).log_prob(support).exp()
    rows = []
    for run in site.runs:
        shape = run.fn.shape()
        row = base(run.fn).log_prob(support).exp().expand(len(support), *shape[: len(shape) - single])
        rows.append(row.reshape(len(support), *site.value.shape[1 : site.value.dim() - single]))
    return torch.stack(rows, 1)


def _one_by_one(z: Tensor, other: Tensor, event_dim: int, single: int = 0) -> Tensor:
    """Return `z` with one coordinate of its event dims replaced at a time: ``(coordinates, *z.shape)``."""
    if event_dim == 0:
        return other.unsqueeze(0)
    shape = z.shape[z.dim() - event_dim - single : z.dim() - single]
    eye = torch.eye(shape.numel(), dtype=torch.bool, device=z.device)
    chosen = eye.reshape(shape.numel(), *(1,) * (z.dim() - event_dim - single), *shape, *(1,) * single)
    return torch.where(chosen, other, z)


def _by_coordinate(signal: Tensor, site: SiteTerms, single: int = 0) -> Tensor:
    """Return signals at one-by-one replaced coordinates in the shape of the coordinates: ``(..., *event)``."""
    event = site.fn.event_shape[: len(site.fn.event_shape) - single]
    return signal.movedim(0, -1).reshape((*signal.shape[1:], *event))


register(
    "estimator",
    "measure_valued",
    MeasureValued,
    aliases=("mvd", "weak_derivative"),
    summary="difference at coupled draws of two measures, per coordinate",
    source="Mohamed et al. 2020, section 6",
)
