r"""The score-function gradient with the other particles' mean as its baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .._registry import Traits, register
from .base import Estimator, SiteTerms, State

__all__ = ["LeaveOneOut"]


@dataclass(frozen=True)
class LeaveOneOut(Estimator):
    r"""Score-function gradient with a leave-one-out baseline (RLOO; the gradient of VarGrad).

    $$\hat g=\tfrac1K\sum_k (f_k-\bar f_{-k})\,\nabla_\phi\log q_\phi(z_k)
             =\tfrac1{K-1}\sum_k (f_k-\bar f)\,\nabla_\phi\log q_\phi(z_k).$$

    When to use: discrete or non-reparameterised sites. Unbiased. Cost: K model and guide runs, one backward.
    The baseline is taken per plate element. What upstream draws reach stays in f, so that the gradient is zero where q
    is the posterior.

    Raises:
        EstimatorError: If fewer than two particles are given.

    Source: Kool, van Hoof and Welling 2019, "Buy 4 REINFORCE samples", eq. 8; Richter et al. 2020 (VarGrad).
    Differs: plates are summed last.

    Example:
        >>> LeaveOneOut().traits.min_particles
        2
    """

    reach: ClassVar[str] = "related"
    traits: ClassVar[Traits] = Traits(min_particles=2, auto=20)

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Tensor | None]:
        centred = (signal - signal.mean(0, keepdim=True)) * (rows / (rows - 1))
        term = centred * site.log_q
        return {"value": term, "guide": term}


register(
    "estimator",
    "leave_one_out",
    LeaveOneOut,
    aliases=("rloo", "vargrad"),
    summary="score function minus the mean of the other particles",
    source="Kool et al. 2019",
)
