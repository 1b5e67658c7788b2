r"""Straight-through: outcomes forward, the mean's path backward; biased."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .._registry import Traits, register
from .relaxed import RELAXED, Relaxed, attached

__all__ = ["StraightThrough"]


@dataclass(frozen=True)
class StraightThrough(Relaxed):
    r"""**Biased** gradient of a discrete site: draws are true outcomes, their derivative is that of the mean.

    $$\hat g=\tfrac1K\sum_k\Big(\frac{\partial\pi}{\partial\phi}\Big)^{\!\top}
      \frac{\partial\log p(x,z_k)}{\partial z_k}+\nabla_\phi H(q_\phi),\qquad z_k\sim q_\phi.$$

    Exact if log p is linear in the value of each site given the others (a product of different sites is); else wrong
    by an amount that no number of particles removes. The ELBO reported is the true one, of true draws, and
    the gradients of the entropy and by the model's parameters are exact. When to use: many bits, a model
    that is nearly linear in each, and when a low variance matters more than the right direction; never chosen by
    ``"auto"``. Cost: K model and guide runs, one backward.

    Raises:
        EstimatorError: The site is no Bernoulli or OneHotCategorical; or the model uses its value as an index, an
            integer or in a comparison, or has another distribution there.

    Source: Bengio, Léonard and Courville 2013, "Estimating or propagating gradients through stochastic neurons",
    section 4. Differs: the path is that of the mean, not the identity; the entropy is exact. With a relaxation's path
    (straight-through Gumbel-softmax) it is ``GumbelRao(num_samples=1)``.

    Example:
        >>> StraightThrough().traits.unbiased
        False
    """

    traits: ClassVar[Traits] = RELAXED

    def relax(self, fn: Any, outcome: Tensor) -> Tensor:
        return attached(outcome, fn.mean)


register(
    "estimator",
    "straight_through",
    StraightThrough,
    aliases=("st",),
    summary="biased: true outcomes, differentiated as their mean",
    source="Bengio et al. 2013",
)
