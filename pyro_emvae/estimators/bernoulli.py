r"""Bernoulli draws, element by element: logits, densities, and copulas that make particles disagree."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import SiteTerms, base, exponential

__all__ = [
    "by_element",
    "dirichlet",
    "disagreement",
    "element_logits",
    "lift",
    "logits_of",
    "minority",
    "subset_log_prob",
    "summed",
]


def logits_of(fn: Any) -> Tensor:
    """Return the logits of a Bernoulli distribution, in the shape of its values."""
    return base(fn).logits.expand(fn.shape())


def element_logits(site: SiteTerms) -> Tensor:
    """Return the logits of a site in the shape of its values, of all its runs."""
    if not site.runs:
        return logits_of(site.fn)
    return torch.stack([logits_of(run.fn).reshape(site.value.shape[1:]) for run in site.runs])


def by_element(site: SiteTerms, logits: Tensor) -> Tensor:
    r"""Return log q of each element, $b\varphi-\log(1+e^\varphi)$, in the shape of the values."""
    return site.value.detach() * logits + logsigmoid(-logits)


def lift(signal: Tensor, fn: Any) -> Tensor:
    """Give a tensor over particles and plates the event dims of the site, of size one."""
    return signal.reshape((*signal.shape, *(1,) * fn.event_dim))


def minority(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log probability of the rarer outcome, and whether that is one."""
    return logsigmoid(-logits.abs()), logits <= 0


def dirichlet(logits: Tensor) -> Tensor:
    r"""Draw rows along the first dim, each Bernoulli, any two as opposed as a Dirichlet copula makes them.

    $d\sim\mathrm{Dir}(1_K)$; row k has the rarer outcome if $(1-d_k)^{K-1}<m$ with m its probability, for large d
    exclude each other.
    """
    rows = len(logits)
    share = exponential(logits)
    share = share / share.sum(0)
    log_m, is_one = minority(logits)
    rare = (rows - 1) * torch.log1p(-share) < log_m
    return (rare == is_one).to(logits.dtype)


def _log_both(log_m: Tensor, rows: int, count: float = 2.0) -> Tensor:
    r"""Return the log probability that `count` given rows have the rarer outcome: $(1-c(1-m^{1/(K-1)}))_+^{K-1}$."""
    left = 1 + count * torch.expm1(log_m / (rows - 1))
    return torch.where(left > 0, (rows - 1) * left.clamp(min=torch.finfo(left.dtype).tiny).log(), -math.inf)


def disagreement(logits: Tensor, rows: int) -> Tensor:
    r"""Return $p(1-p)/P(b_1=1,b_2=0)=1/(1-\mathrm{corr})$ of two of the rows that `dirichlet` draws."""
    log_m, _ = minority(logits)
    both = _log_both(log_m, rows)
    return -torch.expm1(log_m) / -torch.expm1(both - log_m)


def subset_log_prob(logits: Tensor, value: Tensor) -> Tensor:
    r"""Return the log probability of all rows together under `dirichlet`, by element: inclusion and exclusion."""
    rows = len(value)
    log_m, is_one = minority(logits[0])
    rare = ((value > 0) == is_one).sum(0)
    total = torch.zeros_like(log_m)
    for others in range(rows + 1):
        count = (rare + others).to(log_m.dtype)
        part = torch.where(count > 0, _log_both(log_m, rows, count).exp(), 1.0)
        choose = log_m.new_tensor([math.comb(rows - j, others) for j in range(rows + 1)])
        total = total + (-1) ** others * choose[rare] * part
    return total.clamp(min=0).log()


def summed(log_prob: Tensor, fn: Any) -> Tensor:
    """Sum over the event dims."""
    return log_prob.reshape(*log_prob.shape[: log_prob.dim() - fn.event_dim], -1).sum(-1)
