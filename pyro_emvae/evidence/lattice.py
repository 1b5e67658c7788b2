r"""Lattices that find out where a density has its mass, for many densities of few dimensions at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = ["Frame", "Lattice", "Spread", "ball", "integrate"]

Density = Callable[[Tensor], Tensor]


class Spread:
    r"""Running mean and covariance of weighted points, and the log of the weights' sum, per density.

    Example:
        >>> spread = Spread()
        >>> spread.update(torch.zeros(2, 1), torch.tensor([[[1.0]], [[3.0]]]))
        >>> spread.mean, spread.covariance, spread.log_sum
        (tensor([[2.]]), tensor([[[1.]]]), tensor([0.6931]))
    """

    log_sum: Tensor
    mean: Tensor
    covariance: Tensor

    def __init__(self) -> None:
        self.count = 0

    def update(self, log_weights: Tensor, points: Tensor) -> None:
        """Take in log weights ``(S, N)`` and points ``(S, N, d)``."""
        log_sum = log_weights.logsumexp(0)
        shift = torch.where(log_sum.isfinite(), log_sum, 0.0)
        weights = (log_weights - shift).exp()
        mean = torch.einsum("sn,snd->nd", weights, points)
        away = points - mean
        covariance = torch.einsum("sn,snd,sne->nde", weights, away, away)
        if self.count:
            total = torch.logaddexp(self.log_sum, log_sum)
            share = (log_sum - total).exp().nan_to_num(nan=0.0)[:, None]
            step = mean - self.mean
            both = (1 - share)[..., None] * self.covariance + share[..., None] * covariance
            covariance = both + (share * (1 - share))[..., None] * step[:, :, None] * step[:, None]
            log_sum, mean = total, self.mean + share * step
        self.log_sum, self.mean, self.covariance = log_sum, mean, covariance
        self.count += len(log_weights)


@dataclass(frozen=True)
class Frame:
    r"""Coordinates $u=c+Lt$ in which each density has about mean 0 and covariance 1.

    Args:
        center: c, ``(N, d)``.
        tril: L, lower triangular, ``(N, d, d)``.
    """

    center: Tensor = field(repr=False)
    tril: Tensor = field(repr=False)

    @classmethod
    def around(cls, mean: Tensor, covariance: Tensor) -> Frame:
        """Return the frame of a mean and covariance."""
        return cls(mean, torch.linalg.cholesky(covariance))

    @property
    def log_volume(self) -> Tensor:
        """The log determinant of L: ``(N)``."""
        return self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def at(self, t: Tensor) -> Tensor:
        """Return u ``(S, N, d)`` at t ``(S, d)`` or ``(S, N, d)``."""
        if t.dim() == 2:
            return self.center + torch.einsum("nij,sj->sni", self.tril, t)
        return self.center + torch.einsum("nij,snj->sni", self.tril, t)

    def moved(self, found: Spread, known: Spread | None, smallest: float = 0.1) -> tuple[Frame, bool]:
        """Return the frame of a mean and covariance found in t, and whether that is about this one.

        What is known in u from elsewhere counts as much, for a lattice may have met a part of the mass alone.
        """
        mean = self.center + (self.tril @ found.mean[..., None]).squeeze(-1)
        covariance = self.tril @ found.covariance @ self.tril.mT
        if known is not None:
            step = 0.5 * (known.mean - mean)
            mean = mean + step
            covariance = 0.5 * (covariance + known.covariance) + step[:, :, None] * step[:, None]
        there = torch.linalg.solve_triangular(self.tril, (mean - self.center)[..., None], upper=False)
        half = torch.linalg.solve_triangular(self.tril, covariance, upper=False)
        inner = torch.linalg.solve_triangular(self.tril, half.mT, upper=False)
        variances, axes = torch.linalg.eigh(0.5 * (inner + inner.mT))
        fits = (variances > 0.4).all() & (variances < 2.5).all() & (there.abs() < 1.0).all()
        tril = self.tril @ (axes * variances.clamp(min=smallest).sqrt()[:, None])
        return Frame.around(mean, tril @ tril.mT), bool(fits)


def ball(dims: int, step: float, radius: float, like: Tensor) -> Tensor:
    r"""Return the whole numbers i with $|i|\cdot\text{step}\le\text{radius}$: ``(M, dims)``.

    Example:
        >>> ball(2, 1.0, 1.0, torch.zeros(())).tolist()
        [[-1.0, 0.0], [0.0, -1.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    """
    most = math.floor(radius / step)
    line = torch.arange(-most, most + 1, dtype=like.dtype, device=like.device)
    cube = torch.cartesian_prod(*[line] * dims).reshape(-1, dims)
    return cube[cube.square().sum(-1) <= (radius / step) ** 2]


class TooMany(Exception):
    """More nodes per density are needed than allowed; carries their number and how far two lattices were apart."""


@dataclass(frozen=True)
class Lattice:
    r"""Values of N densities on a lattice in their frames, of which each density uses a part.

    Args:
        frame: Where the lattice lies.
        points: Whole numbers ``(M, d)``.
        step: Distance h of neighbours in t.
        used: Which points each density uses, -1 to fill up: ``(K, N)``.
        values: Log densities there, ``-inf`` where filled up: ``(K, N)``.
        dropped: The share of each integral that may lie where no points are used: ``(N)``.
    """

    frame: Frame = field(repr=False)
    points: Tensor = field(repr=False)
    step: float
    used: Tensor = field(repr=False)
    values: Tensor = field(repr=False)
    dropped: Tensor = field(repr=False)

    @property
    def log_integral(self) -> Tensor:
        r"""$\log\sum_sf(u_s)\,h^d|L|$ per density, the trapezoidal rule: ``(N)``."""
        dims = self.points.shape[-1]
        return self.values.logsumexp(0) + dims * math.log(self.step) + self.frame.log_volume

    def refined(self, density: Density, radius: float, drop: float, chunk: int, max_nodes: int) -> Lattice:
        r"""Return a lattice of steps $h/\sqrt2$ where this one has all but a share `drop` of the mass.

        It spreads from there to neighbours along the axes for as long as it finds mass, for what a coarse lattice has
        missed between its points is next to what it has met.
        """
        step = self.step / math.sqrt(2)
        points = ball(self.points.shape[-1], step, radius, self.points)
        heavy, dropped = self._heavy(drop)
        new = heavy[self._places((points * (step / self.step)).round())]
        nothing = self.values[:0]
        lattice = Lattice(self.frame, points, step, nothing.long(), nothing, self.dropped)
        known = torch.zeros_like(new)
        while bool(new.any()):
            lattice, known = lattice._joined(density, new, chunk, max_nodes), known | new
            heavy, outside = lattice._heavy(drop)
            new = lattice._grown(heavy)[:-1] & ~known
        return replace(lattice, dropped=self.dropped + dropped + outside)

    def _joined(self, density: Density, new: Tensor, chunk: int, max_nodes: int) -> Lattice:
        """Return the lattice with more points in use: ``(M, N)``, true where they are new."""
        used = torch.nn.utils.rnn.pad_sequence([row.nonzero().flatten() for row in new.T], padding_value=-1)
        total = int((self.used >= 0).sum(0).add(new.sum(0)).max())
        if total > max_nodes:
            raise TooMany(total)
        values = torch.cat([density(self.frame.at(self.step * self.points[part])) for part in used.split(chunk)])
        values = values.masked_fill(used < 0, -math.inf)
        return replace(self, used=torch.cat([self.used, used]), values=torch.cat([self.values, values]))

    def _heavy(self, drop: float) -> tuple[Tensor, Tensor]:
        """Say which points of each density have all but a share `drop` of its mass, and what share that leaves out.

        The number of points is what the average density needs: a few that are spread wide do not set it for all.
        """
        values, order = self.values.sort(0)
        tail = values.softmax(0).cumsum(0)  # what is lost without a point and all lighter ones
        most = int((tail.mean(1) > drop).sum())
        light = tail <= drop
        light[: len(light) - most] = True
        places = torch.where(light, -1, self.used.gather(0, order))
        heavy = torch.zeros(len(self.points) + 1, places.shape[1], dtype=torch.bool, device=places.device)
        heavy.scatter_(0, places % len(heavy), True)  # -1 is the row that stands for no point
        heavy[-1] = False
        return heavy, torch.where(light, tail, 0.0).amax(0)

    def _grown(self, some: Tensor) -> Tensor:
        """Add their neighbours along the axes to some points: ``(M + 1, N)``."""
        axes = torch.eye(self.points.shape[-1], dtype=self.points.dtype, device=self.points.device)
        grown = some.clone()
        for axis in (*axes, *-axes):
            grown[:-1] |= some[self._places(self.points + axis)]
        return grown

    def _places(self, points: Tensor) -> Tensor:
        """Return the places of whole numbers ``(M, d)`` among this lattice's points, -1 for none."""
        most = int(max(self.points.abs().max(), points.abs().max()))
        base = (2 * most + 1) ** torch.arange(points.shape[-1], device=points.device)
        code, codes = (((p + most).long() * base).sum(-1) for p in (self.points, points))
        table = torch.full(((2 * most + 1) ** points.shape[-1],), -1, device=points.device)
        table[code] = torch.arange(len(code), device=points.device)
        return table[codes]


STEP = 1.3  # standard deviations; the trapezoidal rule is then right to 2e-5 on a normal density
RADIUS = 5.0
ROUNDS = 8


def integrate(
    density: Density, frame: Frame, known: Spread | None = None, *, tol: float, chunk: int, max_nodes: int
) -> tuple[Lattice, Tensor]:
    r"""Integrate N densities over $\mathbb R^d$ by the trapezoidal rule on lattices that adapt to them.

    $$Z_n\approx h^d|L_n|\sum_{i\in\mathbb Z^d,\,|ih|\le R}f_n(c_n+L_nih).$$

    First means and covariances are found, from lattices in the frame so far; then the ball grows until it has nothing
    at its rim; then the step h shrinks by $\sqrt2$, on the part where there is mass, until two lattices agree. The rule
    converges faster than any power of h for smooth densities that decay.

    Args:
        density: Log densities at points ``(S, N, d)``: ``(S, N)``.
        frame: Where they may lie.
        known: Means and covariances of draws from them, however few.
        tol: Nats per density, on average, that the last two lattices may differ by.
        chunk: Points per call of the density.
        max_nodes: Most points per density.

    Returns:
        The last lattice, and how far each log integral may be off: its difference to that of the lattice before, and
        the share that was left out: ``(N)``, nats.

    Raises:
        TooMany: The two lattices do not agree yet.

    Source: Naylor and Smith 1982 for the adapted frame; Trefethen and Weideman 2014 for the trapezoidal rule.

    Example:
        >>> frame = Frame(torch.zeros(1, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)[None])
        >>> normal = lambda u: -0.5 * (u - 3.0).square().sum(-1)
        >>> lattice, error = integrate(normal, frame, tol=1e-9, chunk=1000, max_nodes=10_000)
        >>> f"{lattice.log_integral.exp().item() / (2 * math.pi):.9f}", bool(error < 1e-9)
        ('1.000000000', True)
    """
    drop, error = tol / 100, math.nan
    lattice, radius = _settle(density, frame, known, drop, chunk, max_nodes)
    while True:
        try:
            finer = lattice.refined(density, radius, drop, chunk, max_nodes)
        except TooMany as found:
            raise TooMany(*found.args, error) from None
        errors = (finer.log_integral - lattice.log_integral).abs() + finer.dropped
        error = float(errors.mean())
        if error <= tol:
            return finer, errors
        lattice = finer


def _settle(
    density: Density, frame: Frame, known: Spread | None, drop: float, chunk: int, max_nodes: int
) -> tuple[Lattice, float]:
    """Find frames that fit, and the radius of a ball at whose rim there is no mass, on average."""
    radius, rounds, fits = RADIUS, 0, False
    while True:
        points = ball(frame.center.shape[-1], STEP, radius, frame.center)
        if len(points) > max_nodes:
            raise TooMany(len(points), math.nan)
        spread, values = Spread(), []
        for part in (STEP * points).split(chunk):
            values.append(density(frame.at(part)))
            spread.update(values[-1], part[:, None])
        values, rounds = torch.cat(values), rounds + 1
        if rounds <= ROUNDS and not fits:
            frame, fits = frame.moved(spread, known)
            continue
        rim = STEP * points.square().sum(-1).sqrt() > radius - STEP
        outside = values.softmax(0)[rim].sum(0)
        if float(outside.mean()) <= drop:
            used = torch.arange(len(points), device=points.device)[:, None].expand_as(values)
            return Lattice(frame, points, STEP, used, values, outside), radius
        radius *= 1.2
