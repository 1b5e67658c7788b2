r"""The score-function gradient."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .._registry import Traits, register
from .base import Estimator, SiteTerms, State

__all__ = ["Score", "ScoreFunction"]


class ScoreFunction(Estimator):
    r"""$\hat g=\tfrac1K\sum_k A_k\,\nabla_\phi\log q_\phi(z_k)$, with an advantage A that is f less a baseline.

    The baseline of a particle must not depend on its own draw. Higher derivatives are right as well, in
    `MonteCarloELBO.differentiable_loss`: each summand c of f is multiplied by $e^{\ell-\bar\ell}$, with $\ell$ the
    log q of the draws that reach it and $\bar\ell$ its value, held.

    Source: Foerster et al. 2018, "DiCE: the infinitely differentiable Monte Carlo estimator", eq. 7.
    """

    @abstractmethod
    def advantage(self, site: SiteTerms, signal: Tensor, rows: int, state: State) -> Tensor:
        """Return A, detached, in the shape of the signal."""

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Any]:
        term = self.advantage(site, signal, rows, state) * site.log_q
        return {"value": term, "guide": term}


@dataclass(frozen=True)
class Score(ScoreFunction):
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
    traits: ClassVar[Traits] = Traits(auto=40, objectives=("any",), higher_order=True)

    def advantage(self, site: SiteTerms, signal: Tensor, rows: int, state: State) -> Tensor:
        return signal


register(
    "estimator",
    "score",
    Score,
    aliases=("reinforce", "score_function"),
    summary="log-derivative trick",
    source="Williams 1992",
)
