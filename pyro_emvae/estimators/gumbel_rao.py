r"""Straight-through Gumbel-softmax, averaged over the noise that leads to the same outcome; biased."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Bernoulli

from .._checks import positive_int
from .._registry import Traits, register
from .base import base
from .relaxed import RELAXED, Relaxed, attached, bounded, check_temperature, held, perturbed, squashed, uniform_like

__all__ = ["GumbelRao"]


@dataclass(frozen=True)
class GumbelRao(Relaxed):
    r"""**Biased** gradient of a discrete site: true outcomes forward, backward the mean path of the relaxed values.

    $$\hat g=\tfrac1K\sum_k\Big(\tfrac1M\sum_m\frac{\partial}{\partial\phi}
      \mathrm{softmax}\big((\theta_\phi+G_{km})/\tau\big)\Big)^{\!\top}\frac{\partial\log p(x,z_k)}{\partial z_k}
      +\nabla_\phi H(q_\phi),\qquad G_{km}\sim G\mid z_k,$$

    with $G\mid z_k$ the Gumbel noise that leads to the outcome $z_k$. With M = 1 it is the straight-through
    Gumbel-softmax; more inner samples leave the mean and lower the variance, without a run of the model. The bias
    falls with $\tau$, of a bit to that of `ReinMax`, whose trapezoidal rule is the limit. Draws, the reported ELBO
    and the entropy's gradient are the true ones. When to use: as `StraightThrough`; never chosen by ``"auto"``. Cost: K
    model and guide runs, M evaluations of the relaxation.

    Args:
        temperature: $\tau$.
        num_samples: M, inner samples of the noise.

    Raises:
        EstimatorError: As `StraightThrough`.

    Source: Paulus, Maddison and Krause 2021, "Rao-Blackwellizing the straight-through Gumbel-softmax gradient
    estimator", eq. 8. Differs: a bit has one logistic number in place of two Gumbel ones, and its inner samples are
    stratified: one quantile in each M-th part of (0, 1), all by one shift; the entropy is exact.

    Example:
        >>> GumbelRao(temperature=0.5, num_samples=10).traits.unbiased
        False
    """

    temperature: float = 0.5
    num_samples: int = 10
    traits: ClassVar[Traits] = replace(RELAXED, noisy=True)

    def __post_init__(self) -> None:
        check_temperature("GumbelRao", self.temperature)
        positive_int("GumbelRao", "num_samples", self.num_samples)

    def relax(self, fn: Any, outcome: Tensor) -> Tensor:
        if not isinstance(base(fn), Bernoulli):
            noise = perturbed(fn, outcome, uniform_like(outcome, self.num_samples))
            return attached(outcome, squashed(fn, noise, self.temperature).mean(0))
        first = torch.arange(self.num_samples, dtype=outcome.dtype, device=outcome.device)
        uniform = (first.reshape(-1, *(1,) * outcome.dim()) + uniform_like(outcome)) / self.num_samples
        soft = squashed(fn, held(fn, outcome, uniform), self.temperature)
        slope = (soft - soft * soft).mean(0) / self.temperature
        return attached(outcome, slope * bounded(base(fn).logits))


register(
    "estimator",
    "gumbel_rao",
    GumbelRao,
    summary="biased: true outcomes, differentiated as the mean relaxed value",
    source="Paulus et al. 2021",
)
