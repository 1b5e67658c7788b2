r"""Conjugate families: each is found from derivatives of a log joint density, and has nodes for expectations."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["BetaFactor", "DirichletFactor", "Factor", "GammaFactor", "GivenFactor", "NormalFactor", "NormalGammaFactor"]

Values = Mapping[str, Tensor]
NODES, REACH = 64, 8.5
_STICKS = {2: NODES, 3: 40, 4: 16}


class Factor(ABC):
    r"""The posterior of one latent, or of two that depend on each other, independent over its plates' elements.

    Parameters are tensors over the latent's batch shape.
    """

    names: tuple[str, ...]
    family: str
    num_nodes: int | None = NODES

    @abstractmethod
    def conditional(self, name: str, values: Values) -> Any:
        """Return the distribution of a latent given those before it in `names`."""

    def marginal(self, name: str) -> Any:
        """Return the distribution of one latent."""
        return self.conditional(name, {})

    def entropy(self, name: str) -> Tensor:
        """Return the expected entropy of a latent given those before it: the batch shape, nats."""
        return self.conditional(name, {}).entropy()

    @abstractmethod
    def around(self, noise: Values, wide: bool) -> dict[str, Tensor]:
        """Return values about the mean, by standard noise: a posterior deviation off, or on the scale of the latent."""

    @abstractmethod
    def fit(self, values: list[Values], slopes: list[Values]) -> tuple[Factor, Tensor]:
        """Return the member of the family with these derivatives at these values, and by how much it misses them.

        The miss is relative to the size of the terms, per unit and equation.
        """

    @abstractmethod
    def nodes(self) -> tuple[dict[str, Tensor], Tensor]:
        """Return nodes ``(S, *batch, *event)`` and log weights ``(S, *batch)`` for expectations of any function."""

    @abstractmethod
    def pair(self) -> dict[str, Tensor]:
        """Return few nodes ``(S, *batch, *event)`` of equal weight, exact for the sufficient statistics."""

    @property
    def is_proper(self) -> bool:
        """Whether it is a density: parameters finite, and positive where they have to be."""
        return all(bool((torch.isfinite(x) & (x > 0)).all()) for x in self._positive())

    @abstractmethod
    def _positive(self) -> tuple[Tensor, ...]:
        """Return the parameters that have to be positive."""


def _solve(rows: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Solve linear equations ``(R, *batch, k)`` for k unknowns by least squares; return them and the relative miss."""
    a, b = rows.movedim(0, -2).double(), right.movedim(0, -1).double()[..., None]
    found = torch.linalg.lstsq(a, b).solution
    miss = (a @ found - b).abs() / (1.0 + b.abs() + a.abs() @ found.abs())
    return found.squeeze(-1), miss.squeeze(-1)


def _unbind(found: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    return found.to(like.dtype).unbind(-1)


@dataclass(frozen=True)
class BetaFactor(Factor):
    r"""$f'(z)\,z(1-z)=(a-1)(1-z)-(b-1)z$."""

    name: str
    a: Tensor = field(repr=False)
    b: Tensor = field(repr=False)
    family = "Beta"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @classmethod
    def start(cls, name: str, fn: Any) -> BetaFactor:
        mean = _finite(fn.mean, 0.5).clamp(0.05, 0.95)
        return cls(name, 2 * mean, 2 * (1 - mean))

    def _positive(self) -> tuple[Tensor, ...]:
        return self.a, self.b

    def conditional(self, name: str, values: Values) -> Any:
        return dist.Beta(self.a, self.b)

    def around(self, noise: Values, wide: bool) -> dict[str, Tensor]:
        width = 1.0 if wide else (1 / self.a + 1 / self.b).sqrt().clamp(max=1.0)
        return {self.name: torch.sigmoid((self.a / self.b).log() + width * noise[self.name])}

    def fit(self, values: list[Values], slopes: list[Values]) -> tuple[Factor, Tensor]:
        z, slope = (torch.stack([v[self.name] for v in each]) for each in (values, slopes))
        found, miss = _solve(torch.stack([1 - z, -z], -1), z * (1 - z) * slope)
        return BetaFactor(self.name, *_unbind(found + 1, z)), miss

    def nodes(self) -> tuple[dict[str, Tensor], Tensor]:
        z, log_weights = _beta_nodes(self.a, self.b, NODES)
        return {self.name: z}, log_weights

    def pair(self) -> dict[str, Tensor]:
        p = _beta_pair(self.a, self.b)
        return {self.name: p}


@dataclass(frozen=True)
class GammaFactor(Factor):
    r"""$f'(z)\,z=(a-1)-bz$."""

    name: str
    a: Tensor = field(repr=False)
    b: Tensor = field(repr=False)
    family = "Gamma"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @classmethod
    def start(cls, name: str, fn: Any) -> GammaFactor:
        mean = _positive_mean(fn)
        return cls(name, torch.ones_like(mean), 1 / mean)

    def _positive(self) -> tuple[Tensor, ...]:
        return self.a, self.b

    def conditional(self, name: str, values: Values) -> Any:
        return dist.Gamma(self.a, self.b)

    def around(self, noise: Values, wide: bool) -> dict[str, Tensor]:
        width = 1.0 if wide else self.a.rsqrt().clamp(max=1.0)
        return {self.name: self.a / self.b * (width * noise[self.name]).exp()}

    def fit(self, values: list[Values], slopes: list[Values]) -> tuple[Factor, Tensor]:
        z, slope = (torch.stack([v[self.name] for v in each]) for each in (values, slopes))
        unit = self.a / self.b
        found, miss = _solve(torch.stack([torch.ones_like(z), -z / unit], -1), z * slope)
        a, b = _unbind(found, z)
        return GammaFactor(self.name, a + 1, b / unit), miss

    def nodes(self) -> tuple[dict[str, Tensor], Tensor]:
        z, log_weights = _gamma_nodes(self.a, NODES)
        return {self.name: z / self.b}, log_weights

    def pair(self) -> dict[str, Tensor]:
        return {self.name: _gamma_pair(self.a) / self.b}


@dataclass(frozen=True)
class NormalFactor(Factor):
    r"""$f'(z)\,s=h-\lambda s^2\,y$ with $y=(z-m)/s$."""

    name: str
    loc: Tensor = field(repr=False)
    scale: Tensor = field(repr=False)
    family = "Normal"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @classmethod
    def start(cls, name: str, fn: Any) -> NormalFactor:
        scale = _finite(fn.stddev, 1.0)
        return cls(name, _finite(fn.mean, 0.0), torch.where(scale > 0, scale, 1.0))

    def _positive(self) -> tuple[Tensor, ...]:
        return (self.scale,)

    def conditional(self, name: str, values: Values) -> Any:
        return dist.Normal(self.loc, self.scale)

    def around(self, noise: Values, wide: bool) -> dict[str, Tensor]:
        return {self.name: self.loc + self.scale * noise[self.name]}

    def fit(self, values: list[Values], slopes: list[Values]) -> tuple[Factor, Tensor]:
        z, slope = (torch.stack([v[self.name] for v in each]) for each in (values, slopes))
        y = (z - self.loc) / self.scale
        found, miss = _solve(torch.stack([torch.ones_like(y), -y], -1), self.scale * slope)
        h, precision = _unbind(found, z)
        return NormalFactor(self.name, self.loc + self.scale * h / precision, self.scale * precision.rsqrt()), miss

    def nodes(self) -> tuple[dict[str, Tensor], Tensor]:
        s, log_weights = _grid(self.loc, NODES)
        return {self.name: self.loc + self.scale * s}, log_weights - log_weights.logsumexp(0)

    def pair(self) -> dict[str, Tensor]:
        return {self.name: torch.stack([self.loc - self.scale, self.loc + self.scale])}


@dataclass(frozen=True)
class DirichletFactor(Factor):
    r"""$z_j(f_j-\sum_kz_kf_k)=(a_j-1)-z_j\sum_k(a_k-1)$, the derivatives along the simplex."""

    name: str
    a: Tensor = field(repr=False)
    family = "Dirichlet"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @classmethod
    def start(cls, name: str, fn: Any) -> DirichletFactor:
        mean = _finite(fn.mean, 1.0).clamp(min=0.05)
        return cls(name, mean / mean.mean(-1, keepdim=True))

    def _positive(self) -> tuple[Tensor, ...]:
        return (self.a,)

    def conditional(self, name: str, values: Values) -> Any:
        return dist.Dirichlet(self.a)

    def around(self, noise: Values, wide: bool) -> dict[str, Tensor]:
        width = 1.0 if wide else self.a.rsqrt().clamp(max=1.0)
        return {self.name: torch.softmax(self.a.log() + width * noise[self.name], -1)}

    def fit(self, values: list[Values], slopes: list[Values]) -> tuple[Factor, Tensor]:
        z, slope = (torch.stack([v[self.name] for v in each]) for each in (values, slopes))
        size = z.shape[-1]
        rows = torch.eye(size, dtype=z.dtype, device=z.device) - z[..., :, None]
        right = z * (slope - (z * slope).sum(-1, keepdim=True))
        flat = (x.movedim(z.dim() - 1, 1).flatten(0, 1) for x in (rows, right))
        found, miss = _solve(*flat)
        return DirichletFactor(self.name, found.to(z.dtype) + 1), miss

    @property
    def num_nodes(self) -> int | None:
        size = self.a.shape[-1]
        return _STICKS[size] ** (size - 1) if size in _STICKS else None

    def nodes(self) -> tuple[dict[str, Tensor], Tensor]:
        """Return nodes of stick breaking, a product of Beta nodes."""
        size = self.a.shape[-1]
        after = self.a.flip(-1).cumsum(-1).flip(-1)
        left, log_weights, parts = self.a.new_ones(1, *self.a.shape[:-1]), self.a.new_zeros(1, *self.a.shape[:-1]), []
        for k in range(size - 1):
            v, w = _beta_nodes(self.a[..., k], after[..., k + 1], _STICKS[size])
            parts = [_outer(part, torch.ones_like(v)) for part in parts] + [_outer(left, v)]
            left, log_weights = _outer(left, 1 - v), _outer(log_weights.exp(), w.exp()).log()
        return {self.name: torch.stack([*parts, left], -1)}, log_weights

    def pair(self) -> dict[str, Tensor]:
        """Split the categories in two, and move the mass between them."""
        mean = (torch.digamma(self.a) - torch.digamma(self.a.sum(-1, keepdim=True))).exp()
        first = torch.zeros_like(mean, dtype=torch.bool)
        first[..., : max(1, mean.shape[-1] // 2)] = True
        p, q = (torch.where(part, mean, 0.0).sum(-1) for part in (first, ~first))
        z = _two_points(p, q)
        factor = torch.where(first, (z / p)[..., None], ((1 - z) / q)[..., None])
        return {self.name: mean * factor}


@dataclass(frozen=True)
class NormalGammaFactor(Factor):
    r"""$\tau\sim\mathrm{Gamma}(a,b)$, $\mu|\tau\sim N(m,1/(\lambda\tau))$.

    With $t=\tau/c$ and $y=(\mu-m_0)/s$: $f=(a-\tfrac12)\log\tau-t(B-Hy+\tfrac12Ly^2)$.
    """

    precision: str
    mean: str
    a: Tensor = field(repr=False)
    b: Tensor = field(repr=False)
    m: Tensor = field(repr=False)
    count: Tensor = field(repr=False)
    family = "NormalGamma"
    num_nodes = 400

    @property
    def names(self) -> tuple[str, ...]:
        return (self.precision, self.mean)

    @classmethod
    def start(cls, precision: str, mean: str, precision_fn: Any, mean_fn: Any) -> NormalGammaFactor:
        tau = _positive_mean(precision_fn)
        scale = _finite(mean_fn.stddev, 1.0)
        return cls(precision, mean, torch.ones_like(tau), 1 / tau, _finite(mean_fn.mean, 0.0), 1 / (tau * scale**2))

    def _positive(self) -> tuple[Tensor, ...]:
        return self.a, self.b, self.count

    def conditional(self, name: str, values: Values) -> Any:
        if name == self.precision:
            return dist.Gamma(self.a, self.b)
        return dist.Normal(self.m, (self.count * values[self.precision]).rsqrt())

    def marginal(self, name: str) -> Any:
        if name == self.precision:
            return dist.Gamma(self.a, self.b)
        return dist.StudentT(2 * self.a, self.m, (self.b / (self.a * self.count)).sqrt())

    def entropy(self, name: str) -> Tensor:
        if name == self.precision:
            return dist.Gamma(self.a, self.b).entropy()
        log_tau = torch.digamma(self.a) - self.b.log()
        return 0.5 * (1 + math.log(2 * math.pi) - self.count.log() - log_tau)

    def around(self, noise: Values, wide: bool) -> dict[str, Tensor]:
        tau, scale = self.a / self.b, (self.b / (self.a * self.count)).sqrt()
        width = 1.0 if wide else self.a.rsqrt().clamp(max=1.0)
        return {
            self.precision: tau * (width * noise[self.precision]).exp(),
            self.mean: self.m + scale * noise[self.mean],
        }

    def fit(self, values: list[Values], slopes: list[Values]) -> tuple[Factor, Tensor]:
        unit, scale = self.a / self.b, (self.b / (self.a * self.count)).sqrt()
        tau, mu = (torch.stack([v[name] for v in values]) for name in self.names)
        by_tau, by_mu = (torch.stack([s[name] for s in slopes]) for name in self.names)
        t, y = tau / unit, (mu - self.m) / scale
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        first = torch.stack([one, -t, t * y, -0.5 * t * y**2], -1)
        second = torch.stack([zero, zero, t, -t * y], -1)
        found, miss = _solve(torch.cat([first, second]), torch.cat([tau * by_tau, scale * by_mu]))
        shape, b, h, curvature = found.unbind(-1)
        b, loc, count = b - 0.5 * h**2 / curvature, self.m + scale * h / curvature, curvature / (unit * scale**2)
        new = (x.to(tau.dtype) for x in (shape + 0.5, b / unit, loc, count))
        return NormalGammaFactor(self.precision, self.mean, *new), miss

    def nodes(self) -> tuple[dict[str, Tensor], Tensor]:
        tau, log_weights = _gamma_nodes(self.a, 40)
        tau = tau / self.b
        y, inner = _hermite(self.m, 10)
        mu = self.m + y[None] * (self.count * tau).rsqrt()[:, None]
        log_weights = (log_weights[:, None] + inner[None]).flatten(0, 1)
        return {self.precision: _spread(tau, 10), self.mean: mu.flatten(0, 1)}, log_weights

    def pair(self) -> dict[str, Tensor]:
        tau = _gamma_pair(self.a) / self.b
        scale = (self.count * tau).rsqrt()
        return {
            self.precision: _spread(tau, 2),
            self.mean: torch.stack([self.m - scale, self.m + scale], 1).flatten(0, 1),
        }


@dataclass(frozen=True)
class GivenFactor(Factor):
    """A distribution of no family that is known here: expectations are taken over draws."""

    name: str
    fn: Any
    family = "given"
    num_nodes = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def _positive(self) -> tuple[Tensor, ...]:
        return ()

    def conditional(self, name: str, values: Values) -> Any:
        return self.fn

    def entropy(self, name: str) -> Tensor:
        try:
            return self.fn.entropy()
        except NotImplementedError:
            return torch.full(self.fn.batch_shape, math.nan)

    def around(self, noise: Values, wide: bool) -> dict[str, Tensor]:
        return {self.name: self.fn.sample()}

    def fit(self, values: list[Values], slopes: list[Values]) -> tuple[Factor, Tensor]:
        raise NotImplementedError

    def nodes(self) -> tuple[dict[str, Tensor], Tensor]:
        raise NotImplementedError

    def pair(self) -> dict[str, Tensor]:
        raise NotImplementedError


# Starts -------------------------------------------------------------------------------------------------------------


def _finite(x: Tensor, instead: float) -> Tensor:
    return torch.where(torch.isfinite(x), x, instead).detach()


def _positive_mean(fn: Any) -> Tensor:
    mean = _finite(fn.mean, 1.0)
    return torch.where(mean > 0, mean, 1.0)


# Nodes --------------------------------------------------------------------------------------------------------------


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Multiply ``(S, ...)`` and ``(R, ...)`` to ``(S * R, ...)``."""
    return (a[:, None] * b[None]).flatten(0, 1)


def _spread(x: Tensor, times: int) -> Tensor:
    return x[:, None].expand(-1, times, *x.shape[1:]).flatten(0, 1)


def _grid(like: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the trapezoid rule of a standard normal, without the node 0: ``(count, 1, ...)``, of one spacing."""
    spacing = 2 * REACH / count
    s = (torch.arange(count, dtype=torch.float64, device=like.device) - (count - 1) / 2) * spacing
    s = s.reshape(-1, *(1,) * like.dim()).expand(count, *like.shape)
    return s.to(like.dtype), (-0.5 * s**2).to(like.dtype)


def _hermite(like: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return Gauss-Hermite nodes of a standard normal, exact to degree ``2 * count - 1``, and log weights."""
    off = torch.arange(1, count, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    shape = (count, *(1,) * like.dim())
    return nodes.to(like).reshape(shape), vectors[0].square().log().to(like).reshape(shape)


def _potential_nodes(shape: Any, start: Tensor, s: Tensor) -> Tensor:
    """Solve ``g(d) = s^2 / 2`` for d of the sign of s, g convex with its minimum 0 at 0, by Newton's method."""
    d = start
    for _ in range(100):
        value, slope = shape(d)
        step = (value - 0.5 * s**2) / slope
        d = d - step
        if bool((step.abs() <= 1e-9 * (1e-6 + d.abs())).all()):
            break
    return d


def _rule(shape: Any, start: Tensor, s: Tensor, log_density: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return nodes d and log weights for the density $\propto e^{-g(d)}$.

    With $g(d)=\tfrac12s^2$ it is the normal density of s times $dd/ds=s/g'(d)$, and the trapezoid rule in s converges
    exponentially.
    """
    d = _potential_nodes(shape, start, s)
    log_weights = log_density + (s / shape(d)[1]).log()
    return d, log_weights - log_weights.logsumexp(0)


def _gamma_nodes(a: Tensor, count: int) -> tuple[Tensor, Tensor]:
    r"""Return nodes of Gamma(a, 1): with $z=ae^d$, $g(d)=a(e^d-1-d)$."""
    wide = a.double()
    s, log_density = _grid(wide, count)
    r = s * wide.rsqrt()
    start = torch.where(r > 0, (r + r**2 / 2).log1p(), r - r**2 / 2)

    def shape(d: Tensor) -> tuple[Tensor, Tensor]:
        return wide * (d.expm1() - d), wide * d.expm1()

    d, log_weights = _rule(shape, start, s, log_density)
    return (wide * d.exp()).to(a.dtype).clamp(min=torch.finfo(a.dtype).tiny), log_weights.to(a.dtype)


def _beta_nodes(a: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    r"""Return nodes of Beta(a, b): with the logit $\log(a/b)+d$, $g(d)=n\log(q+pe^d)-npd$, n = a + b, p = a / n."""
    first, second = a.double(), b.double()
    n = first + second
    p, q = first / n, second / n
    s, log_density = _grid(n, count)
    start = s * (n * p * q).rsqrt()
    log_p, log_q = p.log(), q.log()

    def shape(d: Tensor) -> tuple[Tensor, Tensor]:
        near = d.abs() < 0.5
        small = torch.where(near, d, 0.0)
        close, ratio = (p * small.expm1()).log1p(), p * q * small.expm1() / (q + p * small.exp())
        far, z = torch.logaddexp(log_q, log_p + d), torch.sigmoid(log_p - log_q + d)
        return n * (torch.where(near, close, far) - p * d), n * torch.where(near, ratio, z - p)

    d, log_weights = _rule(shape, start, s, log_density)
    kind = torch.finfo(a.dtype)
    return torch.sigmoid(log_p - log_q + d).to(a.dtype).clamp(kind.tiny, 1 - kind.eps), log_weights.to(a.dtype)


def _gamma_pair(a: Tensor) -> Tensor:
    r"""Return two nodes $e^{E\log z\pm d}$ of Gamma(a, 1) with the right means of z and log z."""
    wide = a.double()
    center = torch.digamma(wide)
    d = torch.acosh((wide.log() - center).exp())
    return torch.stack([center - d, center + d]).exp().to(a.dtype)


def _beta_pair(a: Tensor, b: Tensor) -> Tensor:
    """Return two nodes of Beta(a, b) with the right means of log z and log(1 - z)."""
    first, second = a.double(), b.double()
    total = torch.digamma(first + second)
    p, q = ((torch.digamma(x) - total).exp() for x in (first, second))
    return _two_points(p, q).to(a.dtype)


def _two_points(p: Tensor, q: Tensor) -> Tensor:
    r"""Return the roots of $z_1z_2=p^2$, $(1-z_1)(1-z_2)=q^2$: ``(2, ...)``."""
    half = 0.5 * (1 + p**2 - q**2)
    root = ((1 - p - q) * (1 + p - q) * (1 - p + q) * (1 + p + q)).clamp(min=0).sqrt() / 2
    large = half + root
    return torch.stack([p**2 / large, large])
