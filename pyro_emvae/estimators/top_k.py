r"""The most probable values of a categorical site summed exactly, the rest sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import EstimatorError, fail
from .._registry import Traits, register
from .base import Control, Draw, Estimator, SiteTerms, Situation, State, base, exponential

__all__ = ["RaoBlackwellTopK", "index_of", "joined", "log_probs", "perturbed", "value_of"]


@dataclass(frozen=True)
class RaoBlackwellTopK(Estimator):
    r"""Exact sum over the most probable values of a categorical site, plus draws from the rest.

    $$\hat g=\sum_{c\in T}q(c)\,f(c)\,\nabla\log q(c)+\frac{1-q(T)}{m}\sum_{j=1}^m f(c_j)\,\nabla\log q(c_j)
      -(1+a)\,b\sum_k w_k\nabla\log q(c_k),\quad c_j\sim q(\cdot\mid c\notin T),$$

    with T the K - m most probable values of each plate element, w the weights of the K rows, and a baseline: with
    m = 1 the mean of f over T, with m > 1 for each draw the mean over the others and for T that over all. Its
    coefficient, 1 at first, is learned per parameter from earlier steps, since whether a baseline helps differs from
    problem to problem. The objective and all other gradients use the same weighted rows.

    When to use: Categorical and OneHotCategorical sites, more so the more peaked q is. Unbiased; exact if K is at least
    the number of values. Cost: K model and guide runs, one backward, and one for the coefficient.

    Args:
        rest: m, the number of rows that are drawn from the rest.

    Raises:
        EstimatorError: Fewer particles than m + 1; a site whose distribution depends on another draw; several weighted
            sites in one guide; a term outside the site's plates that its draw reaches; particles run one by one.

    Source: Liu et al. 2019, "Rao-Blackwellized stochastic gradients for discrete distributions". Differs: the
    baseline and its learned coefficient.

    Example:
        >>> RaoBlackwellTopK(rest=2).traits.draws
        'weighted'
    """

    rest: int = 1
    traits: ClassVar[Traits] = Traits(
        support="categorical", draws="weighted", min_particles=2, controls=True, stateful=True
    )

    def __post_init__(self) -> None:
        if not isinstance(self.rest, int) or self.rest < 1:
            fail(
                EstimatorError,
                "RaoBlackwellTopK",
                "draw from the rest",
                got=f"rest={self.rest!r}",
                because="what is not summed has to be drawn, at least once",
                fix="Write rest=1.",
            )

    def fits(self, at: Situation) -> str | None:
        if at.num_particles <= self.rest:
            return f"{self.rest} of the {at.num_particles} particles are drawn from the rest, and none is left to sum"
        return joined(at)

    def draw(self, fn: Any, num_particles: int) -> Draw | None:
        log_q = log_probs(fn)[0]
        log_top, top = log_q.topk(self._count(log_q, num_particles), -1)
        left, rest = log_q.scatter(-1, top, -math.inf), num_particles - top.shape[-1]
        drawn = perturbed(left.expand(rest, *left.shape)).argmax(-1)
        index = torch.cat([top.movedim(-1, 0), drawn])
        share = (left.logsumexp(-1).exp() / rest).expand(drawn.shape)
        return Draw(value_of(index, fn), torch.cat([log_top.exp().movedim(-1, 0), share]))

    def weigh(self, fn: Any, value: Tensor) -> Tensor | None:
        log_q, rows = log_probs(fn), len(value)
        count = self._count(log_q, rows)
        top = log_q.gather(-1, index_of(value, fn)[..., None])[:count, ..., 0].exp()
        left = self._outside(log_q[0], rows) / (rows - count)
        return torch.cat([top, left.expand(rows - count, *left.shape)])

    def joint(self, fn: Any, value: Tensor) -> Tensor | None:
        log_q, rows, index = log_probs(fn), len(value), index_of(value, fn)
        top = self._top(log_q[0], rows)
        count = top.shape[-1]
        as_top = (index[:count].movedim(0, -1) == top).all(-1)
        left = log_q[0].scatter(-1, top, -math.inf).log_softmax(-1)
        drawn = left.expand(log_q[count:].shape).gather(-1, index[count:, ..., None]).squeeze(-1).sum(0)
        return torch.where(as_top, drawn, -math.inf)

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Any]:
        count = self._count(log_probs(site.fn), rows)
        top, drawn = signal[:count], signal[count:]
        if len(drawn) == 1:
            baseline = top.sum(0) / site.weight[:count].sum(0)
        else:
            f = drawn / site.weight[count:].clamp(min=torch.finfo(signal.dtype).tiny)
            others = (f.sum(0) - f) / (len(drawn) - 1)
            baseline = torch.cat([f.mean(0).expand(top.shape), others])
        control = -baseline * site.weight * site.log_q
        term = signal * site.log_q + control
        return {"value": term, "guide": term, "controls": {"baseline": Control(control, low=-2.0, high=1.0)}}

    def _count(self, log_q: Tensor, rows: int) -> int:
        return min(rows - self.rest, log_q.shape[-1] - 1)

    def _top(self, log_q: Tensor, rows: int) -> Tensor:
        return log_q.topk(self._count(log_q, rows), -1).indices

    def _outside(self, log_q: Tensor, rows: int) -> Tensor:
        return log_q.scatter(-1, self._top(log_q, rows), -math.inf).logsumexp(-1).exp()


def joined(at: Situation) -> str | None:
    """Return what stands against weights per plate element, as a clause, or None."""
    if at.fn.event_dim > len(base(at.fn).event_shape):
        return "its weights are per draw, and an event of this site holds several"
    return None


def log_probs(fn: Any) -> Tensor:
    """Return the log probabilities of a categorical distribution: ``(particles, *plates, values)``, detached."""
    logits = base(fn).logits.detach()
    return logits.expand(*fn.batch_shape, logits.shape[-1])


def perturbed(log_q: Tensor) -> Tensor:
    """Add standard Gumbel noise, whose largest is a draw and whose k largest are draws without replacement."""
    return log_q - exponential(log_q).log()


def index_of(value: Tensor, fn: Any) -> Tensor:
    """Return the index of each value: ``(particles, *plates)``."""
    return value.argmax(-1) if fn.event_dim else value.long()


def value_of(index: Tensor, fn: Any) -> Tensor:
    """Return the values of these indices, as the distribution would draw them."""
    if not fn.event_dim:
        return index
    log_q = log_probs(fn)
    return torch.nn.functional.one_hot(index, log_q.shape[-1]).to(log_q.dtype)


register(
    "estimator",
    "rao_blackwell_topk",
    RaoBlackwellTopK,
    summary="the most probable values summed, the rest sampled",
    source="Liu et al. 2019",
)
