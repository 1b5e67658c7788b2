r"""Leave-one-out with control variates from the derivative of the model, on the signal and on the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .._registry import Traits, register
from .base import Control, Estimator, SiteTerms, State
from .bernoulli import element_logits, lift, summed

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

    When to use: Bernoulli sites with many elements and a model that is differentiable in them. Cost: 2K model
    evaluations: K model and guide runs that are differentiated twice, by the parameters and by the draws. Backwards:
    these two, and one for a.

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
    traits: ClassVar[Traits] = Traits(support="binary", min_particles=2, probes="draws", controls=True, stateful=True)

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Any]:
        logits, slope, share = element_logits(site), site.probed.gradient, 1 / (rows - 1)
        mean = logits.detach().sigmoid()
        score = site.value.detach() - mean  # the derivative of log q by the logits
        slope = (slope.sum(0, keepdim=True) - slope) * share
        apart = score * (rows * share) - score.sum(0, keepdim=True) * share  # from the mean of the others' scores
        baseline = lift(summed(slope * apart, site.fn), site.fn)
        advantage = lift((signal - signal.mean(0, keepdim=True)) * (rows * share), site.fn)
        term = advantage * score * logits
        control = Control((baseline * score - slope * mean * (1 - mean)) * logits, low=-2.0, high=2.0)
        return {"value": term, "guide": term, "controls": {"slope": control}}


register(
    "estimator",
    "double_control_variate",
    DoubleControlVariate,
    summary="leave-one-out with linear control variates on signal and baseline",
    source="Titsias & Shi 2022",
)
