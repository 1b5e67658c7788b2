r"""Natural-gradient steps of factors in which a model is not conjugate, by nodes of the present factors.

The natural gradient of the bound by the natural parameters $\eta$ of q is $\hat\eta-\eta$ with

$$\hat\eta=\partial_{E[t]}E_q[f]=\mathrm{Cov}_q(t,t)^{-1}\,\mathrm{Cov}_q(t,f),$$

t the statistics of q, f the expected log joint given the latent: the regression of f on t under q, which is the
$\eta$ of f itself where the model is conjugate. For normals it needs the slopes of f alone: $\hat\lambda=-E_q[f'']$ and
$\hat\lambda\hat m=\hat\lambda m+E_q[f']$, with $E_q[f'']=E_q[yf']/s$, $y=(z-m)/s$.

Source: Khan and Lin 2017, eq. 10; Opper and Archambeau 2009, with the theorems of Bonnet and Price, for normals;
Salimans and Knowles 2013, eq. 13, for the regression. Differs: by quadrature in place of draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._families import (
    BetaFactor,
    DirichletFactor,
    Factor,
    GammaFactor,
    NormalFactor,
    _beta_nodes,
    _gamma_nodes,
    _hermite,
)
from ._vectors import VectorFactor

__all__ = ["by_slopes", "by_values", "can_climb", "is_sloped", "least_nodes", "nodes_of"]

MAX_NODES = 1_000


def is_sloped(factor: Factor) -> bool:
    """Whether a factor needs slopes of the log joint, and not its values."""
    return isinstance(factor, NormalFactor | VectorFactor)


def can_climb(factor: Factor) -> bool:
    """Whether a factor can be moved so: it has nodes for the expectation of any function."""
    valued = isinstance(factor, GammaFactor | BetaFactor | DirichletFactor)
    return is_sloped(factor) or (valued and factor.num_nodes is not None)


def least_nodes(factor: Factor) -> int:
    """Return the least number of nodes that `nodes_of` makes: three per coordinate of a vector."""
    return 3 ** factor.loc.shape[-1] if isinstance(factor, VectorFactor) else 1


def nodes_of(factor: Factor, count: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return nodes ``(S, *batch, *event)`` of a factor and their weights ``(S, *batch)``.

    Gauss-Hermite rules of `count` nodes for normals; for vectors their products, of as many nodes per coordinate as
    make no more than 1,000 together, and three at least; the trapezoid rules of `_families` for the others.
    """
    if isinstance(factor, VectorFactor):
        y, weights = _product(factor, count)
        return {factor.name: factor.around({factor.name: y}, wide=True)[factor.name]}, weights
    if isinstance(factor, NormalFactor):
        y, log_weights = _hermite(factor.loc, count)
        return {factor.name: factor.loc + factor.scale * y}, log_weights.exp()
    if isinstance(factor, DirichletFactor):
        values, log_weights = factor.nodes()
        return values, log_weights.exp()
    gamma = isinstance(factor, GammaFactor)
    z, log_weights = _gamma_nodes(factor.a, count) if gamma else _beta_nodes(factor.a, factor.b, count)
    return {factor.name: z / factor.b if gamma else z}, log_weights.exp()


def _product(factor: VectorFactor, count: int) -> tuple[Tensor, Tensor]:
    """Return standard nodes ``(S, 1, ..., D)`` and weights ``(S, 1, ...)``."""
    size, ones = factor.loc.shape[-1], (1,) * (factor.loc.dim() - 1)
    each = next((n for n in range(count, 3, -1) if n**size <= MAX_NODES), min(3, count))
    y, log_weights = (x.flatten() for x in _hermite(factor.loc, each))
    place = torch.cartesian_prod(*[torch.arange(each)] * size).reshape(-1, size)
    return y[place].reshape(-1, *ones, size), log_weights[place].sum(-1).exp().reshape(-1, *ones)


def by_slopes(factor: Factor, values: Tensor, weights: Tensor, slopes: Tensor) -> list[Tensor]:
    """Return the natural parameters of the normal that a step of length 1 leads to.

    Args:
        factor: q.
        values, weights: Its nodes.
        slopes: Derivatives of the expected log joint there, ``(S, *batch, *event)``.
    """
    if isinstance(factor, VectorFactor):
        tril, w = factor.scale_tril, weights[..., None]
        y = torch.linalg.solve_triangular(tril, (values - factor.loc)[..., None], upper=False).squeeze(-1)
        slope, curved = (w * slopes).sum(0), ((w * y)[..., :, None] * slopes[..., None, :]).sum(0)
        curvature = torch.linalg.solve_triangular(tril.mT, curved, upper=True)
        precision = -0.5 * (curvature + curvature.mT)
        return [precision, (precision @ factor.loc[..., None]).squeeze(-1) + slope]
    slope = (weights * slopes).sum(0)
    precision = -(weights * (values - factor.loc) * slopes).sum(0) / factor.scale.square()
    return [precision, precision * factor.loc + slope]


def by_values(factor: Factor, values: Tensor, weights: Tensor, log_p: Tensor) -> list[Tensor]:
    """Return the parameters of the Gamma, Beta or Dirichlet that a step of length 1 leads to.

    Args:
        factor: q.
        values, weights: Its nodes.
        log_p: The expected log joint there, up to a constant, ``(S, *batch)``.
    """
    z, w = values.double(), weights.double()
    if isinstance(factor, GammaFactor):
        unit = (factor.a / factor.b).double()
        t = torch.stack([z.log(), -z / unit], -1)
    else:
        unit = 1.0
        t = z.log() if isinstance(factor, DirichletFactor) else torch.stack([z.log(), (-z).log1p()], -1)
    t, f = t - (w[..., None] * t).sum(0), log_p.double() - (w * log_p.double()).sum(0)
    weighted = w[..., None] * t
    gram = (weighted[..., :, None] * t[..., None, :]).sum(0)
    found = torch.linalg.solve_ex(gram, (weighted * f[..., None]).sum(0))[0]
    if isinstance(factor, DirichletFactor):
        return [_near(factor.a, found + 1, dim=-1)]
    first, second = found.unbind(-1)
    both = torch.stack([first + 1, second / unit if isinstance(factor, GammaFactor) else second + 1], -1)
    return list(_near(torch.stack([factor.a, factor.b], -1), both, dim=-1).unbind(-1))


def _near(old: Tensor, new: Tensor, dim: int) -> Tensor:
    """Return the point on the way from old to new, per element, where no parameter has changed more than ten times.

    Far from its optimum a regression says little: the mean of 1/z is infinite under Gamma(1, b).
    """
    step = new - old
    room = torch.where(step > 0, 9.0 * old, 0.9 * old) / step.abs()
    return (old + room.amin(dim, keepdim=True).clamp(max=1.0) * step).to(old.dtype)
