r"""Gumbel-softmax (the concrete relaxation): values between outcomes while training; biased."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from .._registry import Traits, register
from .relaxed import RELAXED, Relaxed, check_temperature, perturbed, squashed, uniform_like

__all__ = ["GumbelSoftmax"]


@dataclass(frozen=True)
class GumbelSoftmax(Relaxed):
    r"""**Biased** gradient of a discrete site, whose values are relaxed to a continuous distribution while training.

    $$z_k=\mathrm{softmax}\big((\theta+G_k)/\tau\big),\qquad
      \hat g=\tfrac1K\sum_k\nabla_\phi\log p(x,z_k)+\nabla_\phi H(q_\phi),$$

    G Gumbel noise; of a bit, the sigmoid of the logit plus logistic noise over $\tau$. This is the gradient of
    **another objective**: the model is run at values between outcomes, and what `loss` returns is the objective there,
    which bounds nothing; `elbo` and `log_evidence` use true draws. The gradient by the model's parameters is of that
    objective too. As $\tau\to0$ it tends to the ELBO and the variance to infinity. Entropy: the discrete
    guide's, exact. The prior is taken as linear in the value; with ``objective="elbo_analytic_kl"`` the KL is exact as
    well. When to use: a model that makes sense between outcomes; never chosen by ``"auto"``. Cost: K model and guide
    runs, one backward.

    Args:
        temperature: $\tau$.

    Raises:
        EstimatorError: As `StraightThrough`; or the model raises an error at values between outcomes.

    Source: Jang, Gu and Poole 2017, "Categorical reparameterization with Gumbel-softmax", eq. 2; Maddison, Mnih and
    Teh 2017, "The concrete distribution". Differs: the entropy is exact, as in Jang et al.'s KL, not the relaxed
    density's; noise is drawn given a true outcome.

    Example:
        >>> GumbelSoftmax(temperature=0.5).traits.unbiased
        False
    """

    temperature: float = 0.5
    traits: ClassVar[Traits] = replace(RELAXED, noisy=True)

    def __post_init__(self) -> None:
        check_temperature("GumbelSoftmax", self.temperature)

    def relax(self, fn: Any, outcome: Tensor) -> Tensor:
        return squashed(fn, perturbed(fn, outcome, uniform_like(outcome)), self.temperature)


register(
    "estimator",
    "gumbel_softmax",
    GumbelSoftmax,
    aliases=("concrete",),
    summary="biased: relaxed values, another objective while training",
    source="Jang et al. 2017; Maddison et al. 2017",
)
