r"""Exponential families about one of their members: natural parameters, statistics, and the way back to a context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._maps import flat

__all__ = ["Chart", "discrete_chart", "normal_chart", "vector_chart"]


@dataclass(frozen=True)
class Chart:
    r"""A family as an exponential family, in coordinates about the member that a context stands for.

    $$q_\eta(z)\propto h(z)\,e^{\eta\cdot t(z)},$$

    with statistics t that are about uncorrelated under that member, and h = 1 unless said otherwise. It falls into
    independent units, such as the coordinates of independent normals.

    Args:
        eta: Natural parameters of the member, ``(*batch, units, P)``.
        context: From natural parameters to the context, ``(*batch, columns)``; not finite where there is no density.
        statistics: From values ``(*shape, *event)`` to ``(*shape, units, P)``; None for a discrete family, whose
            natural parameters are the logits of its outcomes.
        log_base: From values to log h of each unit, ``(*shape, units)``.
        outcomes: Of a discrete family, the values of one unit ``(P, *unit shape)``.
        min_draws: Draws from which the natural parameters of an affine function of t can be found.
    """

    eta: Tensor
    context: Callable[[Tensor], Tensor] = field(repr=False)
    statistics: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    log_base: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    outcomes: Tensor | None = field(default=None, repr=False)
    min_draws: int = 2


def normal_chart(
    loc: Tensor, std: Tensor, context: Callable[[Tensor, Tensor], Tensor], real: Callable[[Tensor], Tensor]
) -> Chart:
    r"""Return the chart of independent normals, with $t=(y,y^2)$ and $y=(r(z)-m)/s$.

    Args:
        loc, std: m and s, ``(*batch, units)``.
        context: From such to a context.
        real: r, from values to ``(*shape, units)``.
    """
    loc, std = loc.detach(), std.detach()
    eta = torch.stack([torch.zeros_like(loc), torch.full_like(loc, -0.5)], -1)

    def back(eta: Tensor) -> Tensor:
        width = (-2 * eta[..., 1]).rsqrt()
        return context(loc + std * eta[..., 0] * width.square(), std * width)

    def statistics(value: Tensor) -> Tensor:
        y = (real(value) - loc) / std
        return torch.stack([y, y.square()], -1)

    return Chart(eta, back, statistics)


def vector_chart(
    loc: Tensor, tril: Tensor, event_shape: torch.Size, context: Callable[[Tensor, Tensor], Tensor]
) -> Chart:
    r"""Return the chart of a multivariate normal, with $t=(y,\ y_iy_j,\,i\le j)$ and $y=L^{-1}(z-m)$.

    Args:
        loc, tril: m ``(*batch, n)`` and L ``(*batch, n, n)``.
        event_shape: Of one value.
        context: From such to a context.
    """
    loc, tril = loc.detach(), tril.detach()
    n = loc.shape[-1]
    i, j = torch.triu_indices(n, n, device=loc.device)
    place = torch.empty(n, n, dtype=torch.long, device=loc.device)
    place[i, j] = place[j, i] = torch.arange(len(i), device=loc.device)
    eta = torch.cat([loc.new_zeros(n), torch.where(i == j, -0.5, 0.0).to(loc)]).expand(*loc.shape[:-1], 1, -1)

    def back(eta: Tensor) -> Tensor:
        square = eta[..., 0, n:][..., place]
        precision = -(square + torch.diag_embed(square.diagonal(dim1=-2, dim2=-1)))
        root, failed = torch.linalg.cholesky_ex(precision)
        root = torch.where((failed == 0)[..., None, None], root, torch.nan)
        inverse = torch.linalg.solve_triangular(root, torch.eye(n).to(root).expand_as(root), upper=False)
        shift = inverse.mT @ (inverse @ eta[..., 0, :n, None])
        covariance = torch.where(torch.isfinite(inverse), inverse, 0.0)
        covariance = covariance.mT @ covariance + torch.where((failed == 0)[..., None, None], 0.0, torch.eye(n).to(eta))
        local = torch.linalg.cholesky(covariance)
        return context(loc + (tril @ shift).squeeze(-1), tril @ local)

    def statistics(value: Tensor) -> Tensor:
        y = torch.linalg.solve_triangular(tril, (flat(value, event_shape) - loc)[..., None], upper=False)[..., 0]
        return torch.cat([y, y[..., i] * y[..., j]], -1).unsqueeze(-2)

    return Chart(eta.contiguous(), back, statistics, min_draws=(n + 3) // 2 + 1)


def discrete_chart(logits: Tensor, outcomes: Tensor, context: Callable[[Tensor], Tensor]) -> Chart:
    """Return the chart of a discrete family, from the logits ``(*batch, units, P)`` of its outcomes."""
    return Chart(logits.detach().log_softmax(-1), context, outcomes=outcomes)
