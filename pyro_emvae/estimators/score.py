r"""The score-function gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .._registry import Traits, register
from .base import Estimator, SiteTerms, State

__all__ = ["Score"]


@dataclass(frozen=True)
class Score(Estimator):
    r"""Score-function gradient (log-derivative trick, REINFORCE).

    $$\hat g=\tfrac1K\sum_k f_k\,\nabla_\phi\log q_\phi(z_k),\qquad f=\log p-\log q.$$

    When to use: as the reference that needs nothing but log q; a baseline is better wherever f is far from zero.
    Rao-Blackwellized: f holds only the terms that the draw reaches, in the site's own plates. Unbiased. Cost: K model
    and guide runs, one backward.

    Args:
        reach: ``"downstream"``, or ``"all"``: terms that the draw does not reach stay in f, as in `Trace_ELBO`.

    Source: Williams 1992; Ranganath, Gerrish and Blei 2014, "Black box variational inference", eq. 2.

    Example:
        >>> Score().traits.unbiased
        True
    """

    reach: str = "downstream"  # type: ignore[misc]
    traits: ClassVar[Traits] = Traits(auto=40, objectives=("any",))

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Tensor | None]:
        term = signal * site.log_q
        return {"value": term, "guide": term}


register(
    "estimator",
    "score",
    Score,
    aliases=("reinforce", "score_function"),
    summary="log-derivative trick",
    source="Williams 1992",
)
