r"""How the particles of a reparameterised site are drawn: one by one, in mirrored pairs, or as a lattice of points."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, TransformedDistribution
from torch.quasirandom import SobolEngine

from .base import Draw, base

__all__ = ["Antithetic", "Draws", "Independent", "Sobol", "from_noise", "is_normal"]


class Draws(ABC):
    """How the noise of all particles of a site is drawn."""

    kind: ClassVar[str] = "noise"
    min_particles: ClassVar[int] = 2

    def __call__(self, fn: Any, num_particles: int) -> Draw | None:
        """Draw all particles; their distributions may differ."""
        return Draw(from_noise(fn, self.noise(fn, num_particles)))

    @abstractmethod
    def noise(self, fn: Any, num_particles: int) -> Tensor:
        """Return standard normal noise in the shape of the site's values, particles first."""

    def fits(self, fn: Any) -> str | None:
        """Return why a distribution's noise cannot be drawn so, as a clause, or None."""
        return None if is_normal(fn) else "it draws the noise of normal distributions, and of transforms of them"


@dataclass(frozen=True)
class Independent(Draws):
    """Independent particles, by the distribution's own sampler."""

    kind: ClassVar[str] = "independent"
    min_particles: ClassVar[int] = 1

    def __call__(self, fn: Any, num_particles: int) -> Draw | None:
        return None

    def noise(self, fn: Any, num_particles: int) -> Tensor:
        return _randn(fn, num_particles)

    def fits(self, fn: Any) -> str | None:
        return None


@dataclass(frozen=True)
class Antithetic(Draws):
    r"""Mirrored pairs: the second half of the particles has the noise $-\epsilon_k$ of the first.

    Odd functions of the noise cancel within a pair: for an integrand linear in it the variance is zero, for an even
    one it is twice that of independent draws. With an odd number, the last particle stands alone.

    Source: Hammersley and Morton 1956; Wu, Goodman and Ermon 2019, "Differentiable antithetic sampling", for the
    plain mirrored case.
    """

    def noise(self, fn: Any, num_particles: int) -> Tensor:
        half = _randn(fn, num_particles - num_particles // 2)
        return torch.cat([half, -half[: num_particles // 2]])


@dataclass(frozen=True)
class Sobol(Draws):
    r"""Randomised quasi-Monte Carlo: a Sobol sequence over a site's event dims, shifted and shuffled at random.

    $\epsilon_k=\Phi^{-1}(u_k)$, $u_k=(s_{\pi(k)}+v)\bmod 1$ with one uniform shift v and one permutation $\pi$ per
    element of the site's plates. Each particle alone has the site's distribution, so the gradient is unbiased; within
    a site points fill the space evenly, while sites and plate elements are as independent as in Latin hypercubes.

    Source: Buchholz, Wenzel and Mandt 2018, "Quasi-Monte Carlo variational inference"; the random shift: Cranley and
    Patterson 1976. Differs: shuffled per site, so that many one-dimensional sites are no one line.
    """

    def noise(self, fn: Any, num_particles: int) -> Tensor:
        like = _like(fn)
        event = fn.event_shape.numel()
        batch = torch.Size(fn.batch_shape[1:])
        points = _lattice(event, num_particles).to(like)
        order = torch.rand((num_particles, *batch), dtype=like.dtype, device=like.device).argsort(0)
        shift = torch.rand((*batch, event), dtype=like.dtype, device=like.device)
        uniform = torch.remainder(points[order] + shift, 1.0)
        tiny = torch.finfo(like.dtype).eps / 4
        return torch.special.ndtri(uniform.clamp(tiny, 1 - tiny)).reshape(fn.shape())

    def fits(self, fn: Any) -> str | None:
        if fn.event_shape.numel() > SobolEngine.MAXDIM:
            return f"Sobol sequences have at most {SobolEngine.MAXDIM} dims, and this site has {fn.event_shape.numel()}"
        return super().fits(fn)


@functools.lru_cache(maxsize=64)
def _lattice(event: int, num_particles: int) -> Tensor:
    return SobolEngine(event).draw(num_particles, dtype=torch.float64)


def is_normal(fn: Any) -> bool:
    """Whether a distribution's values are a function of standard normal noise."""
    inner = base(fn)
    if isinstance(inner, TransformedDistribution):
        return is_normal(inner.base_dist)
    return isinstance(inner, Normal | MultivariateNormal)


def _like(fn: Any) -> Tensor:
    inner = base(fn)
    while isinstance(inner, TransformedDistribution):
        inner = base(inner.base_dist)
    return inner.loc


def _randn(fn: Any, rows: int) -> Tensor:
    like = _like(fn)
    return torch.randn((rows, *fn.shape()[1:]), dtype=like.dtype, device=like.device)


def from_noise(fn: Any, noise: Tensor) -> Tensor:
    """Return the value, with its path, that standard normal noise becomes."""
    inner = base(fn)
    if isinstance(inner, TransformedDistribution):
        value = from_noise(inner.base_dist, noise)
        for transform in inner.transforms:
            value = transform(value)
        return value
    if isinstance(inner, MultivariateNormal):
        return inner.loc + (inner.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    return inner.loc + inner.scale * noise
