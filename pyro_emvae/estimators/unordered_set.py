r"""Categorical draws without replacement, averaged over their order."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._registry import Traits, register
from .base import Draw, Estimator, SiteTerms, Situation, State, base
from .top_k import index_of, joined, log_probs, perturbed, value_of

__all__ = ["UnorderedSet"]

MOST = 10  # particles: the sets to sum over are 2 to this


@dataclass(frozen=True)
class UnorderedSet(Estimator):
    r"""Sampling without replacement, its weights and its baseline averaged over the order of the draws.

    $$\hat g=\sum_{s\in S}w_s\,\Big(f(s)-\sum_{s'\in S}v_{ss'}f(s')\Big)\nabla\log q(s),\qquad
      w_s=q(s)\frac{A(s)}{A(\emptyset)},\quad v_{ss'}=q(s')\frac{A(s,s')}{A(s)},$$

    with S the set of K different values and A(R) the probability that, R being gone, the next draws without
    replacement are those of S that are not in R. $w_s$ is the probability that s came first given S, so the weights sum
    to one; $v_s$ estimates E[f] from what was drawn after s ($v_{ss}=q(s)$), and so is a baseline. The objective and
    all other gradients use the same weighted rows.

    When to use: Categorical and OneHotCategorical sites with a few particles and many values; no value is looked at
    twice. Unbiased; exact if K is the number of values. Cost: K model and guide runs, one backward, and sums over
    2^K sets.

    Raises:
        EstimatorError: Fewer than two particles, more than the number of values or than ten; and as
            `RaoBlackwellTopK`.

    Source: Kool, van Hoof and Welling 2020, "Estimating gradients for discrete random variables by sampling without
    replacement". Differs: A by a recursion over subsets in logarithms, for all s at once.

    Example:
        >>> UnorderedSet().traits.min_particles
        2
    """

    traits: ClassVar[Traits] = Traits(support="categorical", draws="weighted", min_particles=2)

    def fits(self, at: Situation) -> str | None:
        values = base(at.fn).logits.shape[-1]
        if at.num_particles > values:
            return f"its {at.num_particles} particles have different values, and there are {values}"
        if at.num_particles > MOST:
            return f"it sums over all subsets of its {at.num_particles} particles, and can for {MOST}"
        return joined(at)

    def draw(self, fn: Any, num_particles: int) -> Draw | None:
        index = perturbed(log_probs(fn)[0]).topk(num_particles, -1).indices.movedim(-1, 0)
        value = value_of(index, fn)
        return Draw(value, self.weigh(fn, value))

    def weigh(self, fn: Any, value: Tensor) -> Tensor | None:
        log_q, left = _given(fn, value)
        return (log_q + _without(_sets(log_q, left), log_q)[0]).exp()

    def joint(self, fn: Any, value: Tensor) -> Tensor | None:
        log_q, left = _given(fn, value)
        index = index_of(value, fn)
        rows = log_q.unbind()
        steps = [log_q[k] - _mass(rows, left, range(k, len(log_q))) for k in range(len(log_q))]
        repeated = [index[i] == index[j] for i, j in combinations(range(len(index)), 2)]
        return torch.where(torch.stack(repeated).any(0), -torch.inf, torch.stack(steps).sum(0))

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Tensor | None]:
        log_q, left = _given(site.fn, site.value.detach())
        one, two = _without(_sets(log_q, left), log_q)
        baselines = ((two - one - one[:, None]).exp() * signal).sum(1)
        term = (signal - site.weight * baselines / rows) * site.log_q
        return {"value": term, "guide": term}


def _given(fn: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log probabilities of the rows' values, ``(particles, *plates)``, and of all other values together."""
    log_q, index = log_probs(fn), index_of(value, fn)[..., None]
    others = log_q[0].scatter(-1, index[..., 0].movedim(0, -1), -torch.inf)
    return log_q.gather(-1, index).squeeze(-1), others.logsumexp(-1)


def _mass(log_q: Sequence[Tensor], left: Tensor, rows: Iterable[int]) -> Tensor:
    """Return the log probability of some rows' values or any value that no row has."""
    return functools.reduce(torch.logaddexp, [log_q[k] for k in rows], left)


def _sets(log_q: Tensor, left: Tensor) -> dict[frozenset[int], Tensor]:
    r"""Return log A by the set R of rows that are gone: $A(R)=\sum_{s\notin R}q(s)A(R\cup s)/(1-q(R))$, A(all)=1."""
    rows, log_q = range(len(log_q)), log_q.unbind()
    found = {frozenset(rows): torch.zeros_like(left)}
    for size in reversed(rows):
        for gone in map(frozenset, combinations(rows, size)):
            here = [k for k in rows if k not in gone]
            ways = functools.reduce(torch.logaddexp, [log_q[k] + found[gone | {k}] for k in here])
            found[gone] = ways - _mass(log_q, left, here) if gone else ways  # all values together have mass 1
    return found


def _without(sets: Mapping[frozenset[int], Tensor], log_q: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return $\log A(s)/A(\emptyset)$ by row, and $\log A(s,s')/A(\emptyset)$ by both."""
    rows = range(len(log_q))
    one = torch.stack([sets[frozenset([k])] for k in rows]) - sets[frozenset()]
    two = torch.stack([sets[frozenset([k, j])] for k in rows for j in rows]) - sets[frozenset()]
    return one, two.reshape(len(log_q), *one.shape)


register(
    "estimator",
    "unordered_set",
    UnorderedSet,
    summary="sampling without replacement, averaged over the order",
    source="Kool et al. 2020",
)
