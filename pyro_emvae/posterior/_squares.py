r"""Log densities of normals whose values and derivatives are cheap: few passes over the data, forth and twice back."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["squares"]

CHUNK = 2**18


def squares(fn: Any, value: Tensor) -> Tensor | None:
    r"""Return the log density of a `Normal` or `MultivariateNormal`, with or without ``to_event``; None for others.

    $$\log N(x_n;\mu_n,\operatorname{diag}\sigma^2)=\sum_j(x_{nj}-\mu_{nj})^2\,w_j+c,\qquad
      w_j=-\tfrac1{2\sigma_j^2},\quad c=-\sum_j\log(\sqrt{2\pi}\,\sigma_j);$$
    $$\log N(x_n;\mu_n,LL^\top)=-\tfrac12|L^{-1}(x_n-\mu_n)|^2+c,\qquad c=-\sum_j\log(\sqrt{2\pi}\,L_{jj}).$$

    A scale that all data share enters as it was before it was expanded: the sum over j is one product of a matrix and a
    vector, and L is inverted once, and multiplies as many data at a time as fit into the cache. That is
    ``fn.log_prob(value)`` up to rounding, and validated like it.

    Example:
        >>> fn = dist.Normal(torch.zeros(4, 2), torch.ones(2)).to_event(1)
        >>> bool((squares(fn, torch.ones(4, 2)) - fn.log_prob(torch.ones(4, 2))).abs().max() < 1e-6)
        True
        >>> squares(dist.Cauchy(0.0, 1.0), torch.ones(4)) is None
        True
    """
    events = 0
    while type(fn) is dist.Independent:
        events += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    log_density = {dist.Normal: _apart, dist.MultivariateNormal: _together}.get(type(fn))
    if log_density is None:
        return None
    if fn._validate_args:
        fn._validate_sample(value)
    return log_density(fn, value, events)


def _apart(fn: dist.Normal, value: Tensor, events: int) -> Tensor:
    scale = _shared(fn.scale)
    residual = fn.loc - value if fn.loc.requires_grad else value - fn.loc  # the one whose derivative has no sign
    weight, constant = -0.5 / scale.square(), -(scale.log() + 0.5 * math.log(2 * math.pi))
    if events == 1 and residual.dim() > 1 and math.prod(scale.shape[:-1]) == 1:
        width = residual.shape[-1]
        weight, constant = (x.reshape(-1).expand(width).to(residual.dtype) for x in (weight, constant))
        return _Squares.apply(residual, weight) + constant.sum()
    return _summed(residual * residual * weight + constant, events)


def _together(fn: dist.MultivariateNormal, value: Tensor, events: int) -> Tensor | None:
    value, loc = torch.broadcast_tensors(value, fn.loc)
    width, rows = loc.shape[-1], math.prod(loc.shape[-2:-1])
    tril = _shared(fn.scale_tril)
    if tril.dim() < 3 or tril.shape[-3] > 1 or rows < width:
        return None
    inverse = torch.linalg.solve_triangular(tril.squeeze(-3), torch.eye(width).to(tril), upper=False)
    chunk = max(CHUNK * rows // max(loc.numel(), 1), 1)
    pairs = zip(value.split(chunk, -2), loc.split(chunk, -2), strict=True)
    found = torch.cat([(inverse @ (x - mean).mT).square().sum(-2) for x, mean in pairs], -1)
    constant = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * width * math.log(2 * math.pi)
    return _summed(-0.5 * found - constant, events)


class _Squares(torch.autograd.Function):
    r"""$\sum_jr_{nj}^2w_j$, with one pass over r for each derivative."""

    @staticmethod
    def forward(residual: Tensor, weight: Tensor) -> Tensor:
        return (residual * residual) @ weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor | None]:
        residual, weight = ctx.saved_tensors
        common = slope if slope.requires_grad else _shared(slope)
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = (residual.square() * slope[..., None]).sum(tuple(range(slope.dim())))
        return residual * (common[..., None] * (2 * weight)), by_weight


def _summed(each: Tensor, events: int) -> Tensor:
    return each.sum(tuple(range(-events, 0))) if events else each


def _shared(x: Tensor) -> Tensor:
    """Return a tensor before it was expanded, with dims of size 1 in place of those that repeat it."""
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        x = x.narrow(dim, 0, 1) if stride == 0 and size > 1 else x
    return x
