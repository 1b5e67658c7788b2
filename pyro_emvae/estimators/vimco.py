r"""Score-function gradients of objectives of several particles, each with a baseline of the other particles."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .._checks import EstimatorError, fail
from .._registry import Traits, register
from ..objectives import Bound
from .base import SiteTerms, State
from .score import ScoreFunction

__all__ = ["OVIS", "VIMCO", "MultiSampleScore", "direct"]

OF_OTHERS = Traits(min_particles=2, objectives=("multi_sample",), higher_order=True)


def other_groups(signal: Tensor, bound: Bound) -> Tensor:
    """Return a global latent's signal less its mean over the groups with other draws."""
    count, size = len(signal), bound.size
    return (count * signal - signal.sum(0, keepdim=True)) / (count - size)


def scored(bound: Bound, baseline: Tensor) -> Tensor:
    """Return L c (h - baseline) per particle; the baseline comes folded, see `Bound`."""
    return bound.size * bound.scale * bound.unfold(bound.value.detach().unsqueeze(0) - baseline)


@dataclass(frozen=True)
class VIMCO(ScoreFunction):
    r"""Score-function gradient of an objective of several particles; the baseline puts a mean in a particle's place.

    $$\hat g=\sum_k\big(h(\ell)-h(\ell_{-k},\bar\ell_{-k})-\partial_kh\big)\,\nabla_\phi\log q_\phi(z_k).$$

    The last part is the direct derivative of the weights by log q. When to use: discrete latents, few particles, or a
    guide far from the posterior. Its signal-to-noise ratio falls with K, since that last part has no baseline: see
    `OVIS`. Unbiased. Cost: K model and guide runs, one backward; baselines take O(K) for power means.

    Args:
        mean: ``"geometric"``: the particle gets the mean of the others' log weights. ``"arithmetic"``: it gets their
            mean weight, so that the baseline is h of the others.

    Of a global latent above ``num_local_particles``, the baseline is the mean over the other groups.

    Raises:
        EstimatorError: If fewer than two particles are given.

    Source: Mnih and Rezende 2016, "Variational inference for Monte Carlo objectives". Differs: any h, one
    baseline per datum.

    Example:
        >>> VIMCO().traits.min_particles
        2
    """

    mean: str = "geometric"
    traits: ClassVar[Traits] = OF_OTHERS

    def __post_init__(self) -> None:
        if self.mean not in ("geometric", "arithmetic"):
            fail(
                EstimatorError,
                "VIMCO",
                "average the other particles",
                got=f"mean={self.mean!r}",
                because="a particle gets the geometric or the arithmetic mean of the others' weights",
                fix='Write mean="geometric".',
            )

    def advantage(self, site: SiteTerms, signal: Tensor, rows: int, state: State) -> Tensor:
        if site.name in site.bound.above:
            return other_groups(signal, site.bound)
        return scored(site.bound, site.bound.without(self.mean))


@dataclass(frozen=True)
class OVIS(ScoreFunction):
    r"""Score-function gradient of an objective of several particles; the baseline of asymptotically least variance.

    $$\hat g=\sum_k\big(h(\ell)-c_k-\partial_kh\big)\,\nabla_\phi\log q_\phi(z_k),\qquad
      c_k=h(\ell_{-k})+\log(1-\tfrac1K)\,\textstyle\sum_j\partial_jh.$$

    For IWAE the factor is $-\log(1-v_k)-v_k$ with normalised weights v, of order $K^{-2}$ where weights are alike, so
    that the signal-to-noise ratio grows with $\sqrt K$. It is `VIMCO` with ``mean="arithmetic"`` but for a constant.
    When to use: discrete latents and many particles, near the posterior; else `VIMCO`. Unbiased. Cost: as `VIMCO`.

    Raises:
        EstimatorError: If fewer than two particles are given.

    Source: Liévin, Dittadi, Christensen and Winther 2020, "Optimal variance control of the score-function gradient
    estimator for importance-weighted bounds", with their gamma = 0. Their gamma = 1 leaves out
    $-\partial_kh$; its mean is the gradient plus that of reweighted wake-sleep, and it is not offered. The constant for
    other h is chosen so that the factor vanishes in the same way where weights are alike.

    Example:
        >>> OVIS().traits.unbiased
        True
    """

    traits: ClassVar[Traits] = OF_OTHERS

    def advantage(self, site: SiteTerms, signal: Tensor, rows: int, state: State) -> Tensor:
        bound = site.bound
        if site.name in bound.above:
            return other_groups(signal, bound)
        constant = bound.objective.sign * math.log1p(-1 / bound.size)
        return scored(bound, bound.without("arithmetic") + constant)


@dataclass(frozen=True)
class MultiSampleScore(ScoreFunction):
    r"""`VIMCO` or `OVIS`, whichever has had the smaller factors.

    Both come from the same log weights, at no cost. Running means over particles and data of
    $(h-c_k-\partial_kh)^2$ decide, one step late, so that the gradient stays unbiased; before the first step it is
    `VIMCO` for K < 8, else `OVIS`.

    When to use: discrete latents of an objective of several particles; ``estimator="auto"`` does. Unbiased.

    Args:
        decay: Of the running means, in [0, 1).

    Raises:
        EstimatorError: If fewer than two particles are given.

    Source: Mnih and Rezende 2016; Liévin et al. 2020.

    Example:
        >>> MultiSampleScore().decay
        0.9
    """

    decay: float = 0.9
    traits: ClassVar[Traits] = replace(OF_OTHERS, stateful=True, auto=25)

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            fail(
                EstimatorError,
                "MultiSampleScore",
                "average the factors",
                got=f"decay={self.decay}",
                because="the decay lies in [0, 1)",
                fix="Write decay=0.9.",
            )

    def init(self, site: SiteTerms, signal: Tensor | None) -> State:
        zero = torch.zeros_like(signal.sum())
        return {"vimco": zero, "ovis": zero + (1.0 if site.bound.size < 8 else -1.0), "steps": zero}

    def advantage(self, site: SiteTerms, signal: Tensor, rows: int, state: State) -> Tensor:
        one, other = _both(site, signal, rows, state)
        return torch.where(state["ovis"] < state["vimco"], other, one)

    def update(self, site: SiteTerms, signal: Tensor | None, state: State) -> State:
        bound = site.bound
        own = 0.0 if site.name in bound.above else direct(bound)
        found = [((a - own) ** 2).mean() for a in _both(site, signal, len(signal), state)]
        decay = torch.where(state["steps"] > 0, self.decay, 0.0).to(signal)
        new = [decay * state[n] + (1 - decay) * x for n, x in zip(("vimco", "ovis"), found, strict=True)]
        return {"vimco": new[0], "ovis": new[1], "steps": torch.ones_like(state["steps"])}


def _both(site: SiteTerms, signal: Tensor, rows: int, state: State) -> tuple[Tensor, Tensor]:
    return site.once("both", state, lambda: tuple(e.advantage(site, signal, rows, state) for e in (VIMCO(), OVIS())))


def direct(bound: Bound) -> Tensor:
    """Return what the direct derivative by log q takes off each factor."""
    return bound.size * bound.scale * bound.unfold(bound.objective.slopes(bound.held))


register(
    "estimator",
    "vimco",
    VIMCO,
    summary="several particles: score function, a mean of the others in each particle's place",
    source="Mnih & Rezende 2016",
)
register(
    "estimator",
    "ovis",
    OVIS,
    summary="several particles: score function, baseline of asymptotically least variance",
    source="Liévin et al. 2020",
)
register(
    "estimator",
    "multi_sample_score",
    MultiSampleScore,
    summary="several particles: vimco or ovis, whichever had the smaller factors",
    source="Mnih & Rezende 2016; Liévin et al. 2020",
)
