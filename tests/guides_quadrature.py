r"""Exact ELBOs and gradients for one latent per datum: sums over a grid, without draws, losses or handlers.

With probabilities $P_i$ of the grid's points under q and $f=\log p(x,z)-\log q(z)$, the ELBO is $\sum_iP_if_i$, and
the importance-weighted bound of two draws $\sum_{ij}P_iP_j\log\tfrac12(e^{f_i}+e^{f_j})$. Only the families' log
densities are used, of which `test_families_fit.py` proves that they integrate to one and that draws follow them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_emvae.families import Family

__all__ = ["Exact", "Part", "exact"]

NEGLIGIBLE = 1e-9  # probability of a point that pairs of points leave out


@dataclass(frozen=True)
class Part:
    r"""A component of q: its family, the event shape of its draws, and its contexts ``(rows, columns)``."""

    family: Family
    event_shape: torch.Size
    context: Tensor


@dataclass(frozen=True)
class Exact:
    r"""What is exact, by row.

    Args:
        value: The bound, in nats ``(rows,)``.
        variance: That of one draw of it; at least that of log p alone, for a closed-form KL leaves that.
        guide: Its gradient by the contexts of each part ``(rows, columns)``.
        model: Its gradient by the model's parameter ``(rows,)``.
    """

    value: Tensor
    variance: Tensor
    guide: tuple[Tensor, ...]
    model: Tensor


@dataclass(frozen=True)
class _Grid:
    """Values of the site, the same as the family draws them, and the log measures of the points."""

    values: Tensor
    drawn: Tensor
    log_measure: Tensor
    jacobian: Tensor


def _grid(prior: object, direct: bool, points: int, half: int) -> _Grid:
    if prior.support.is_discrete:
        values = prior.enumerate_support(expand=False).reshape(-1, *prior.event_shape)
        zero = torch.zeros(len(values), dtype=torch.float64)
        return _Grid(values, values, zero, zero)
    if isinstance(prior, dist.VonMises):
        values = torch.linspace(-math.pi, math.pi, points + 1, dtype=torch.float64)[:-1]
        zero = torch.zeros_like(values)
        return _Grid(values, values, zero + math.log(2 * math.pi / points), zero)
    if prior.event_dim:
        line = torch.arange(-half, half + 1, dtype=torch.float64)
        free, cell = torch.cartesian_prod(line, line), torch.zeros(len(line) ** 2, dtype=torch.float64)
    else:
        t = torch.linspace(-1.0, 1.0, points, dtype=torch.float64) * math.asinh(30.0 if direct else 150.0)
        free, cell = t.sinh(), (t.cosh() * (t[1] - t[0])).log()
    transform = biject_to(prior.support)
    values = transform(free)
    jacobian = transform.log_abs_det_jacobian(free, values)
    if direct:
        return _Grid(values, values, cell + jacobian, torch.zeros_like(cell))
    return _Grid(values, free, cell, jacobian)


def exact(
    prior: object,
    likelihood: Callable[[Tensor, Tensor], Tensor],
    parameter: Tensor,
    parts: Sequence[Part],
    log_weights: Tensor,
    *,
    two_draws: bool = False,
    points: int = 401,
    half: int = 40,
) -> Exact:
    r"""Return the exact bound and its gradients.

    Args:
        prior: Of the latent.
        likelihood: Called with values ``(points, 1, *event)`` and the parameter; log p(x | z) ``(points, rows)``.
        parameter: The model's ``(rows,)``.
        parts: The components of q.
        log_weights: Theirs.
        two_draws: The importance-weighted bound of two draws in place of the ELBO.
        points: Of a grid in one dimension.
        half: Half the width of that in two, whose cells have the width 1.
    """
    theta = parameter.detach().clone().requires_grad_()
    leaves = [part.context.detach().clone().requires_grad_() for part in parts]
    fns = [part.family.distribution(leaf, part.event_shape) for part, leaf in zip(parts, leaves, strict=True)]
    if isinstance(fns[0], dist.Delta):
        z = fns[0].v
        value = prior.log_prob(z) + likelihood(z.unsqueeze(0), theta)[0]
        grads = torch.autograd.grad(value.sum(), [*leaves, theta])
        return Exact(value.detach(), torch.zeros_like(value), tuple(grads[:-1]), grads[-1])
    grid = _grid(prior, parts[0].family.direct, points, half)
    log_q = torch.stack([fn.log_prob(grid.drawn.unsqueeze(1)) for fn in fns], -1)
    log_q = (log_q + log_weights).logsumexp(-1)
    log_p = prior.log_prob(grid.values.unsqueeze(1)) + likelihood(grid.values.unsqueeze(1), theta)
    log_p = log_p + grid.jacobian.unsqueeze(1)
    found = _sums(log_p, log_q, grid.log_measure, two_draws)
    grads = torch.autograd.grad(found[2], [*leaves, theta])
    return Exact(found[0], found[1], tuple(grads[:-1]), grads[-1])


def _sums(log_p: Tensor, log_q: Tensor, log_measure: Tensor, two_draws: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return bound and variance of a draw of it by row, and what has the bound's gradient."""
    f = log_p - log_q
    p = (log_q + log_measure.unsqueeze(1)).exp().detach()
    held = f.detach().masked_fill(p == 0, 0.0)
    assert bool(((p.sum(0) - 1).abs() < 1e-4).all()), "the grid does not hold q"
    if not two_draws:
        value = (p * held).sum(0)
        spread = [(p * (g - (p * g).sum(0)).square()).sum(0) for g in (held, log_p.detach().masked_fill(p == 0, 0.0))]
        above, direct = p * held, p
        return value, torch.maximum(*spread), _total(above, log_q) + _total(direct, f)
    value, variance, above, direct = [], [], torch.zeros_like(p), torch.zeros_like(p)
    for n in range(p.shape[1]):
        keep = p[:, n] > NEGLIGIBLE
        own, w = held[keep, n], p[keep, n]
        both = torch.logaddexp(own.unsqueeze(0), own.unsqueeze(1)) - math.log(2)
        above[keep, n] = 2 * w * (both @ w)
        direct[keep, n] = 2 * w * ((own.unsqueeze(1) - own.unsqueeze(0)).sigmoid() @ w)
        value.append(w @ both @ w)
        variance.append(w @ (both - value[-1]).square() @ w)
    return torch.stack(value), torch.stack(variance), _total(above, log_q) + _total(direct, f)


def _total(weight: Tensor, term: Tensor) -> Tensor:
    """Sum the terms with a weight; others may be infinite."""
    return (weight * torch.where(weight == 0, 0.0, term)).sum()
