r"""Leave-one-out with control variates from the derivative of the model, on the signal and on the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .._registry import Traits, register
from .base import Control, Estimator, SiteTerms, State
from .bernoulli import by_element, element_logits, summed

__all__ = ["DoubleControlVariate"]


@dataclass(frozen=True)
class DoubleControlVariate(Estimator):
    r"""Leave-one-out score function whose signal and baseline both carry a linear control variate.

    $$\hat g=\tfrac1K\sum_k\Big[\big(f_k+a\,b_k(z_k)\big)-\tfrac1{K-1}\sum_{j\ne k}\big(f_j+a\,b_k(z_j)\big)\Big]
      \nabla_\phi\log q(z_k)-a\,\nabla_\phi\,d_k^\top\mu_\phi,\quad b_k(z)=d_k^\top(z-\mu_k),\;
      d_k=\tfrac1{K-1}\sum_{j\ne k}f'(z_j),$$

    with $\mu$ the probabilities and f' the derivative of the signal by the drawn values. $b_k$ is independent of $z_k$,
    so $E[b_k(z)\nabla\log q(z)]=\nabla d_k^\top\mu$ and the gradient is unbiased for any a, which is learned per
    parameter from earlier steps (about -1 where f is nearly linear).

    When to use: Bernoulli sites with many elements and a model that is differentiable in them. Cost: 2K model and
    guide runs (the model is run at the draws once more, to be differentiated there), two backwards, and one for a.

    Raises:
        EstimatorError: Fewer than two particles; a model that cannot be differentiated by the values.

    Source: Titsias and Shi 2022, "Double control variates for gradient estimation in discrete latent variable
    models". Differs: the same vector $d_k$ in a particle's signal and in its baseline, which K = 2 allows too; a by
    lagged moments.

    Example:
        >>> DoubleControlVariate().traits.controls
        True
    """

    reach: ClassVar[str] = "related"
    traits: ClassVar[Traits] = Traits(
        support="binary", min_particles=2, probes="differentiable", controls=True, stateful=True
    )

    def probes(self, site: SiteTerms, rows: int, state: State) -> Tensor | None:
        return site.value.detach()[None]

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Any]:
        logits = element_logits(site)
        slope = site.probed.gradient[0]
        slope = (slope.sum(0, keepdim=True) - slope) / (rows - 1)
        mean, value = logits.sigmoid(), site.value.detach()
        own = summed(slope * (value - mean.detach()), site.fn)
        others = summed(slope * ((value - mean.detach()).sum(0) - (value - mean.detach())), site.fn) / (rows - 1)
        log_q = summed(by_element(site, logits), site.fn)
        control = (own - others) * log_q - summed(slope * mean, site.fn)
        term = (signal - signal.mean(0, keepdim=True)) * (rows / (rows - 1)) * log_q
        return {"value": term, "guide": term, "controls": {"slope": Control(control, low=-2.0, high=2.0)}}


register(
    "estimator",
    "double_control_variate",
    DoubleControlVariate,
    summary="leave-one-out with linear control variates on signal and baseline",
    source="Titsias & Shi 2022",
)
