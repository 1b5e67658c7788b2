r"""Log densities of normals whose derivatives are cheap: few passes over the data, forth and twice back."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
from torch import Tensor

__all__ = ["squares"]


def squares(fn: Any, value: Tensor) -> Tensor | None:
    r"""Return the log density of a `Normal`, with or without ``to_event``, at a value; None for what is none.

    $$\sum_j\log N(x_{nj};\mu_{nj},\sigma_j)=\sum_j(x_{nj}-\mu_{nj})^2\,w_j+c,\qquad
      w_j=-\tfrac1{2\sigma_j^2},\quad c=-\sum_j\log(\sqrt{2\pi}\,\sigma_j).$$

    A scale that all data share enters as it was before it was expanded, and the sum over j is one product of a matrix
    and a vector. That is ``fn.log_prob(value)`` up to rounding, and validated like it.

    Example:
        >>> import torch
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
    if type(fn) is not dist.Normal:
        return None
    if fn._validate_args:
        fn._validate_sample(value)
    scale = _shared(fn.scale)
    residual = fn.loc - value if fn.loc.requires_grad else value - fn.loc  # the one whose derivative has no sign
    weight, constant = -0.5 / scale.square(), -(scale.log() + 0.5 * math.log(2 * math.pi))
    if events == 1 and residual.dim() > 1 and math.prod(scale.shape[:-1]) == 1:
        width = residual.shape[-1]
        weight, constant = (x.reshape(-1).expand(width).to(residual.dtype) for x in (weight, constant))
        return (residual * residual) @ weight + constant.sum()
    each = residual * residual * weight + constant
    return each.sum(tuple(range(-events, 0))) if events else each


def _shared(x: Tensor) -> Tensor:
    """Return a tensor before it was expanded, with dims of size 1 in place of those that repeat it."""
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        x = x.narrow(dim, 0, 1) if stride == 0 and size > 1 else x
    return x
