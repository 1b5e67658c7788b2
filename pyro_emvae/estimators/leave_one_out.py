r"""The score-function gradient with the other particles' mean as its baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .._checks import EstimatorError, fail
from .._registry import Traits, register
from .base import Control, SiteTerms, State
from .score import ScoreFunction

__all__ = ["LeaveOneOut"]

WHOLE = Traits(min_particles=2, auto=20, higher_order=True)
LEARNED = Traits(min_particles=2, stateful=True, controls=True)


@dataclass(frozen=True)
class LeaveOneOut(ScoreFunction):
    r"""Score-function gradient with a leave-one-out baseline (RLOO; the gradient of VarGrad).

    $$\hat g=\tfrac1K\sum_k (f_k-\bar f_{-k})\,\nabla_\phi\log q_\phi(z_k)
             =\tfrac1{K-1}\sum_k (f_k-\bar f)\,\nabla_\phi\log q_\phi(z_k).$$

    When to use: discrete or non-reparameterised sites. Unbiased. Cost: K model and guide runs, one backward.
    The baseline is taken per plate element. What upstream draws reach stays in f, so that the gradient is zero where q
    is the posterior.

    Args:
        coefficient: ``"one"``, or ``"learned"``: of the baseline, per parameter tensor, from earlier steps; for two or
            three particles, whose mean is noisy.

    Raises:
        EstimatorError: If fewer than two particles are given.

    Source: Kool, van Hoof and Welling 2019, "Buy 4 REINFORCE samples", eq. 8; Richter et al. 2020 (VarGrad).
    Differs: plates are summed last.

    Example:
        >>> LeaveOneOut().traits.min_particles
        2
    """

    coefficient: str = "one"
    reach: ClassVar[str] = "related"

    def __post_init__(self) -> None:
        if self.coefficient not in ("one", "learned"):
            fail(
                EstimatorError,
                "LeaveOneOut",
                "weigh its baseline",
                got=f"coefficient={self.coefficient!r}",
                because="the baseline is subtracted whole, or by a learned part",
                fix='Write coefficient="learned".',
            )

    @property
    def traits(self) -> Traits:  # type: ignore[override]
        return LEARNED if self.coefficient == "learned" else WHOLE

    def advantage(self, site: SiteTerms, signal: Tensor, rows: int, state: State) -> Tensor:
        return (signal - signal.mean(0, keepdim=True)) * (rows / (rows - 1))

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Any]:
        if self.coefficient == "one":
            return super().surrogate(site, signal, rows, state)
        others = (signal.sum(0, keepdim=True) - signal) / (rows - 1)
        term = signal * site.log_q
        return {"value": term, "guide": term, "controls": {"others": Control(-others * site.log_q)}}


register(
    "estimator",
    "leave_one_out",
    LeaveOneOut,
    WHOLE,
    aliases=("rloo", "vargrad"),
    summary="score function minus the mean of the other particles",
    source="Kool et al. 2019",
)
