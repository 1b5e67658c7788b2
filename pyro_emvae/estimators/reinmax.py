r"""ReinMax: outcomes forward, a trapezoidal rule backward; biased, and exact to second order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.distributions import Bernoulli

from .._registry import Traits, register
from .base import base
from .relaxed import RELAXED, Relaxed, attached, bounded

__all__ = ["ReinMax"]


@dataclass(frozen=True)
class ReinMax(Relaxed):
    r"""**Biased** gradient of a discrete site, exact for integrands that are quadratic in its value.

    $$\hat g=\tfrac1K\sum_k\Big(2J\big(\tfrac{\pi+z_k}2\big)-\tfrac12J(\pi)\Big)
      \frac{\partial\log p(x,z_k)}{\partial z_k}\,\frac{\partial\theta}{\partial\phi}+\nabla_\phi H(q_\phi),\qquad
      J(\pi)=\mathrm{diag}(\pi)-\pi\pi^\top,$$

    with logits $\theta$. The difference between two outcomes is taken as the mean of the slopes at both (a trapezoidal
    rule), where `StraightThrough` takes a slope at one; of a bit, $\hat g=|z_k-\pi|f'(z_k)/2$. Draws, the reported ELBO
    and the entropy's gradient are the true ones. When to use: as `StraightThrough`, which it costs as much as; never
    chosen by ``"auto"``.

    Raises:
        EstimatorError: As `StraightThrough`.

    Source: Liu, Dong, Liu, Yu and Gao 2023, "Bridging discrete and backpropagation: straight-through and beyond",
    eq. 6. Differs: temperature 1, at which it is of second order; the entropy is exact.

    Example:
        >>> ReinMax().traits.unbiased
        False
    """

    traits: ClassVar[Traits] = RELAXED

    def relax(self, fn: Any, outcome: Tensor) -> Tensor:
        logits, mean = bounded(base(fn).logits), base(fn).mean.detach()
        if isinstance(base(fn), Bernoulli):
            return attached(outcome, 0.5 * (outcome - mean).abs() * logits)
        middle = (mean + outcome) / 2
        return attached(outcome, 2 * _along(middle, logits) - _along(mean, logits) / 2)


def _along(probs: Tensor, logits: Tensor) -> Tensor:
    """Return the derivative of the softmax at held probabilities, times logits."""
    return probs * (logits - (probs * logits).sum(-1, keepdim=True))


register(
    "estimator",
    "reinmax",
    ReinMax,
    summary="biased: true outcomes, differentiated by a trapezoidal rule",
    source="Liu et al. 2023",
)
