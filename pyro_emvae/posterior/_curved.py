r"""Log densities whose own form automatic differentiation cannot take twice at a point."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from pyro.ops.special import log_binomial
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["curved"]


def curved(fn: Any, value: Tensor) -> Tensor | None:
    r"""Return the log density of a `Binomial`, with or without ``to_event``; None for others.

    $$\log p(k)=k\,\eta+n\log\sigma(-\eta)+\log\tbinom nk,\qquad\eta=\operatorname{logit}p.$$

    That is ``fn.log_prob(value)``, validated like it. Its own form has |eta|, so that at eta = 0 its second derivative
    comes out as 0 in place of -n/4, and a mode there would have the curvature of its prior alone.

    Example:
        >>> import torch
        >>> eta = torch.zeros((), requires_grad=True)
        >>> for log_prob in (lambda fn, k: fn.log_prob(k), curved):
        ...     log_p = log_prob(dist.Binomial(10, logits=eta), torch.tensor(5.0))
        ...     (slope,) = torch.autograd.grad(log_p, eta, create_graph=True)
        ...     print(f"{torch.autograd.grad(slope, eta)[0].abs():.1f}")
        0.0
        2.5
    """
    events = 0
    while type(fn) is dist.Independent:
        events += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    if type(fn) is not dist.Binomial:
        return None
    if fn._validate_args:
        fn._validate_sample(value)
    count, logits = fn.total_count, fn.logits
    log_p = value * logits + count * logsigmoid(-logits) + log_binomial(count, value, tol=fn.approx_log_prob_tol)
    return log_p.sum(tuple(range(-events, 0))) if events else log_p
