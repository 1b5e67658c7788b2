r"""Factors of vectors: multivariate normal, Wishart, and both as a pair. Each is found from derivatives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ._families import Factor, Values, _finite

__all__ = ["NormalWishartFactor", "VectorFactor", "WishartFactor"]


class _Found(Factor):
    """A factor that says at which values it wants derivatives, and solves for its parameters one after the other."""

    num_nodes = None

    def nodes(self) -> tuple[dict[str, Tensor], Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class VectorFactor(_Found):
    r"""A normal with full covariance $LL^\top$: $f'(z)=h-\Lambda z$, from differences along the columns of L."""

    name: str
    loc: Tensor = field(repr=False)
    scale_tril: Tensor = field(repr=False)
    family = "MultivariateNormal"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @classmethod
    def start(cls, name: str, fn: Any) -> VectorFactor:
        scale = _finite(fn.variance, 1.0).sqrt()
        return cls(name, _finite(fn.mean, 0.0), torch.diag_embed(torch.where(scale > 0, scale, 1.0)))

    def _positive(self) -> tuple[Tensor, ...]:
        return (self.scale_tril.diagonal(dim1=-2, dim2=-1),)

    def conditional(self, name: str, values: Values) -> Any:
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)

    def around(self, noise: Values, wide: bool) -> dict[str, Tensor]:
        return {self.name: self.loc + _times(self.scale_tril, noise[self.name])}

    def levels(self) -> dict[str, Tensor]:
        """Return the mean, one deviation off along each column, and one more value to prove the form."""
        size = self.loc.shape[-1]
        probe = torch.linspace(-1.5, 1.2, size).to(self.loc)
        off = torch.cat([torch.zeros(1, size).to(self.loc), torch.eye(size).to(self.loc), probe[None]])
        off = off.reshape(size + 2, *(1,) * (self.loc.dim() - 1), size)
        return {self.name: self.loc + _times(self.scale_tril, off)}

    def fit(self, values: list[Values], slopes: list[Values]) -> tuple[Factor, Tensor]:
        tril = self.scale_tril
        white = [_times(tril.mT, s[self.name]) for s in slopes]
        precision = torch.stack([white[0] - x for x in white[1:-1]], -1)
        y = torch.linspace(-1.5, 1.2, self.loc.shape[-1]).to(self.loc)
        miss = _miss(white[0] - precision @ y, white[-1], precision.abs() @ y.abs())
        miss = torch.cat([miss, _miss(precision, precision.mT).flatten(-2)], -1)
        inverse, info = _inverse_root(0.5 * (precision + precision.mT))
        loc = self.loc + _times(tril, _times(inverse @ inverse.mT, white[0]))
        root = torch.linalg.cholesky_ex((tril @ inverse) @ (tril @ inverse).mT)[0]
        root = torch.where(info[..., None, None] == 0, root, torch.nan)
        return VectorFactor(self.name, loc, root), miss

    def pair(self) -> dict[str, Tensor]:
        columns = math.sqrt(self.loc.shape[-1]) * self.scale_tril.movedim(-1, 0)
        return {self.name: torch.cat([self.loc + columns, self.loc - columns])}

    def natural(self) -> tuple[Tensor, ...]:
        """Return the precision and its product with the mean."""
        precision = torch.cholesky_inverse(self.scale_tril)
        return precision, _times(precision, self.loc)

    def member(self, eta: list[Tensor]) -> VectorFactor:
        """Return the member of these natural parameters."""
        root, _ = _inverse_root(eta[0])
        scale_tril = torch.linalg.cholesky_ex(root @ root.mT)[0]
        return replace(self, loc=_times(root @ root.mT, eta[1]), scale_tril=scale_tril)


@dataclass(frozen=True)
class WishartFactor(_Found):
    r"""$f'(\Lambda)=\tfrac12(\nu-D-1)\Lambda^{-1}-\tfrac12V^{-1}$, with the mean $\nu V$."""

    name: str
    df: Tensor = field(repr=False)
    inverse: Tensor = field(repr=False)
    family = "Wishart"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @classmethod
    def start(cls, name: str, fn: Any) -> WishartFactor:
        mean = fn.mean.detach()
        df = fn.df.detach().expand(mean.shape[:-2]) if hasattr(fn, "df") else _ones(mean) * (mean.shape[-1] + 2.0)
        return cls(name, df.clone(), torch.linalg.inv(mean / df[..., None, None]))

    def _positive(self) -> tuple[Tensor, ...]:
        return self.df - (self.inverse.shape[-1] - 1), _pivots(self.inverse)

    def conditional(self, name: str, values: Values) -> Any:
        return dist.Wishart(self.df, precision_matrix=self.inverse)

    def entropy(self, name: str) -> Tensor:
        return _wishart_entropy(self.df, self.inverse)

    def around(self, noise: Values, wide: bool) -> dict[str, Tensor]:
        return {self.name: _near(_mean(self), noise[self.name])}

    def levels(self) -> dict[str, Tensor]:
        """Return the mean, twice the mean, and one more value to prove the form."""
        mean = _mean(self)
        return {self.name: torch.stack([mean, 2 * mean, _near(mean, _probe(mean))])}

    def fit(self, values: list[Values], slopes: list[Values]) -> tuple[Factor, Tensor]:
        at, found = ([v[self.name] for v in each] for each in (values, slopes))
        c, inverse, miss = _by_precision(at, [_symmetric(s) for s in found])
        return WishartFactor(self.name, 2 * c + self.inverse.shape[-1] + 1, inverse), miss.flatten(-2)

    def pair(self) -> dict[str, Tensor]:
        ratio = _ratios(self.df, self.inverse.shape[-1])
        return {self.name: ratio[..., None, None] * _mean(self)}


@dataclass(frozen=True)
class NormalWishartFactor(_Found):
    r"""$\Lambda\sim\mathrm{Wishart}(\nu,V)$, $\mu|\Lambda\sim N(m,(\beta\Lambda)^{-1})$.

    $f=\tfrac12(\nu-D)\log|\Lambda|-\tfrac12\mathrm{tr}\,\Lambda\big(V^{-1}+\beta(\mu-m)(\mu-m)^\top\big)$.
    """

    precision: str
    mean: str
    df: Tensor = field(repr=False)
    inverse: Tensor = field(repr=False)
    m: Tensor = field(repr=False)
    count: Tensor = field(repr=False)
    family = "NormalWishart"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.precision, self.mean)

    def _positive(self) -> tuple[Tensor, ...]:
        return self.df - (self.inverse.shape[-1] - 1), _pivots(self.inverse), self.count

    def conditional(self, name: str, values: Values) -> Any:
        if name == self.precision:
            return dist.Wishart(self.df, precision_matrix=self.inverse)
        return dist.MultivariateNormal(self.m, precision_matrix=self.count[..., None, None] * values[self.precision])

    def marginal(self, name: str) -> Any:
        if name == self.precision:
            return self.conditional(name, {})
        df = self.df - self.inverse.shape[-1] + 1
        scale = torch.linalg.cholesky(self.inverse / (self.count * df)[..., None, None])
        return dist.MultivariateStudentT(df, self.m, scale)

    def entropy(self, name: str) -> Tensor:
        if name == self.precision:
            return _wishart_entropy(self.df, self.inverse)
        size = self.inverse.shape[-1]
        log_det = _mean(self).logdet() - size * _gap(self.df, size)
        return 0.5 * (size * (1 + math.log(2 * math.pi) - self.count.log()) - log_det)

    def around(self, noise: Values, wide: bool) -> dict[str, Tensor]:
        mean = _mean(self)
        return {self.precision: _near(mean, noise[self.precision]), self.mean: self.m + self._off(noise[self.mean])}

    def _off(self, noise: Tensor) -> Tensor:
        """Return standard noise on the scale of the mean."""
        return _times(_inverse_root(self.count[..., None, None] * _mean(self))[0], noise)

    def levels(self) -> dict[str, Tensor]:
        """Return the means, twice the precision, another mean, and one more value of both to prove the form."""
        mean, probe = _mean(self), torch.linspace(-1.5, 1.2, self.m.shape[-1]).to(self.m)
        off = self._off(torch.ones_like(self.m))
        other = self.m + self._off(probe.expand(self.m.shape))
        return {
            self.precision: torch.stack([mean, 2 * mean, mean, _near(mean, _probe(mean))]),
            self.mean: torch.stack([self.m, self.m, self.m + off, other]),
        }

    def fit(self, values: list[Values], slopes: list[Values]) -> tuple[Factor, Tensor]:
        lam, mu = ([v[name] for v in values] for name in self.names)
        by_lam, by_mu = [_symmetric(s[self.precision]) for s in slopes], [s[self.mean] for s in slopes]
        off = mu[2] - mu[0]
        count = (off * (by_mu[0] - by_mu[2])).sum(-1) / (off * _times(lam[0], off)).sum(-1)
        m = mu[0] + torch.linalg.solve(lam[0], by_mu[0][..., None]).squeeze(-1) / count[..., None]
        squares = [0.5 * count[..., None, None] * (x - m)[..., :, None] * (x - m)[..., None, :] for x in mu]
        first = [by_lam[k] + squares[k] for k in (0, 1, 3)]
        c, inverse, miss = _by_precision([lam[k] for k in (0, 1, 3)], first)
        more = [_miss(count[..., None] * _times(lam[k], m - mu[k]), by_mu[k]) for k in (1, 2, 3)]
        found = replace(self, df=2 * c + self.m.shape[-1], inverse=inverse, m=m, count=count)
        return found, torch.cat([miss.flatten(-2), *more], -1)

    def pair(self) -> dict[str, Tensor]:
        size = self.m.shape[-1]
        mean, ratio = _mean(self), _ratios(self.df, size)
        first = torch.zeros_like(self.m)
        first[..., 0] = 1.0
        root = math.sqrt(size) * self._off(first) * ratio.rsqrt()[..., None]
        lam = ratio[..., None, None] * mean
        return {self.precision: torch.cat([lam, lam]), self.mean: torch.cat([self.m + root, self.m - root])}

    def natural(self) -> tuple[Tensor, ...]:
        """Return the factors of log|Lambda|, Lambda, Lambda mu and mu' Lambda mu."""
        outer = self.count[..., None, None] * self.m[..., :, None] * self.m[..., None, :]
        return self.df, self.inverse + outer, self.count[..., None] * self.m, self.count

    def member(self, eta: list[Tensor]) -> NormalWishartFactor:
        """Return the member of these natural parameters."""
        df, inverse, h, count = eta
        m = h / count[..., None]
        return replace(self, df=df, inverse=inverse - h[..., :, None] * m[..., None, :], m=m, count=count)


# Parts ------------------------------------------------------------------------------------------------------------


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None]).squeeze(-1)


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)


def _ones(matrix: Tensor) -> Tensor:
    return matrix.new_ones(matrix.shape[:-2])


def _mean(factor: Any) -> Tensor:
    return factor.df[..., None, None] * _symmetric(torch.linalg.inv(factor.inverse))


def _pivots(matrix: Tensor) -> Tensor:
    """Return the diagonal of the Cholesky factor, NaN where the matrix is not positive definite."""
    root, info = torch.linalg.cholesky_ex(matrix)
    return torch.where(info[..., None] == 0, root.diagonal(dim1=-2, dim2=-1), torch.nan)


def _inverse_root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return upper triangular C with CC' the inverse, and where the matrix is not positive definite."""
    root, info = torch.linalg.cholesky_ex(matrix)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(root.mT, eye.expand_as(matrix), upper=True), info


def _probe(mean: Tensor) -> Tensor:
    return torch.randn(mean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(mean)


def _near(mean: Tensor, noise: Tensor) -> Tensor:
    """Return a positive definite matrix about the mean, by standard noise ``(..., D, D)``."""
    root = torch.linalg.cholesky(mean)
    factor = torch.eye(mean.shape[-1]).to(mean) + 0.3 * noise
    return root @ (0.5 * factor @ factor.mT + 0.5 * torch.eye(mean.shape[-1]).to(mean)) @ root.mT


def _by_precision(at: list[Tensor], slopes: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    r"""Solve $f'(\Lambda)=c\Lambda^{-1}-\tfrac12A$ from $\Lambda_0$ and $2\Lambda_0$, and prove it at a third."""
    size = at[0].shape[-1]
    c = 2 * ((slopes[0] - slopes[1]) * at[0]).sum((-2, -1)) / size
    first, last = (c[..., None, None] * torch.linalg.inv(at[k]) for k in (0, 2))
    half = _symmetric(first - slopes[0])
    root = torch.linalg.cholesky(at[0])
    # in the coordinates of the mean, in which all elements are of one size
    found, expected, terms = (root.mT @ x @ root for x in (last - half, slopes[2], first))
    twice = root.mT @ (0.5 * first - half - slopes[1]) @ root
    miss = torch.maximum(_miss(found, expected, terms.abs()), twice.abs() / (1 + terms.abs()))
    return c, 2 * half, miss


def _miss(found: Tensor, expected: Tensor, size: Any = 0.0) -> Tensor:
    return (found - expected).abs() / (1.0 + found.abs() + expected.abs() + size)


def _gap(df: Tensor, size: int) -> Tensor:
    r"""Return $(\log|E\Lambda|-E\log|\Lambda|)/D$."""
    i = torch.arange(size, dtype=torch.float64, device=df.device)
    return df.log() - math.log(2) - torch.digamma(0.5 * (df.double()[..., None] - i)).mean(-1).to(df)


def _wishart_entropy(df: Tensor, inverse: Tensor) -> Tensor:
    """Return the entropy; torch's own warns where the degrees of freedom are near their bound."""
    size = inverse.shape[-1]
    log_v = -inverse.logdet()
    log_det = size * (df.log() - _gap(df, size)) + log_v
    log_b = -0.5 * df * (log_v + size * math.log(2)) - torch.mvlgamma(0.5 * df, size)
    return 0.5 * df * size - 0.5 * (df - size - 1) * log_det - log_b


def _ratios(df: Tensor, size: int) -> Tensor:
    """Return two multiples of the mean with the right means of themselves and of their log determinants."""
    gap = _gap(df, size)
    d = torch.acosh(gap.exp())
    return torch.stack([-gap - d, -gap + d]).exp()
