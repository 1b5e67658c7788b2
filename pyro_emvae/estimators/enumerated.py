r"""The exact sum over a discrete site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .._registry import Traits, register
from ..particles import MAX_OUTCOMES, num_outcomes
from .base import Estimator, SiteTerms, Situation, State

__all__ = ["Enumerated"]


@dataclass(frozen=True)
class Enumerated(Estimator):
    r"""The exact sum over a discrete site of the guide, in place of draws.

    $$L=E_{q(z_{-s})}\Big[\sum_{z_s}q(z_s|z_{<s})\,\big(\log p(x,z)-\log q(z)\big)\Big].$$

    Every summand of the objective is evaluated at all outcomes of the enumerated sites that it depends on, in tensor
    dims left of the plates, and averaged under q there, plate element by plate element. A sum has no noise: with all
    sites enumerated the variance is zero; with others drawn, it is that of the conditional expectation. Sites that are
    drawn downstream get one draw for each outcome, and have to be pathwise; others may stand upstream and beside.

    When to use: few outcomes. Unbiased, and the objective itself is exact in the site. Cost: K times the number of
    outcomes that meet in one density, in one run; a chain costs its neighbours' table, not the product of all.

    A latent that only the model has, with ``infer={"enumerate": "parallel"}``, is summed out of the model whatever the
    estimators are: log p of the rest takes its place.

    Raises:
        EstimatorError: The support is not finite, or too large (it says how large); something that depends on the site
            lies outside one of its plates; a site downstream is drawn and not pathwise.

    Source: Titsias and Lazaro-Gredilla 2015, "Local expectation gradients", for the idea; Pyro's `TraceEnum_ELBO`.
    Differs: choice by site, mixing with any estimator upstream.

    Example:
        >>> Enumerated().traits.draws
        'enumerated'
    """

    traits: ClassVar[Traits] = Traits(
        support="discrete", draws="enumerated", needs_signal=False, higher_order=True, auto=5
    )

    def fits(self, at: Situation) -> str | None:
        count = num_outcomes(at.fn)
        if count is None:
            return "a sum needs a finite support, the same everywhere"
        if not at.fn.has_enumerate_support:
            return f"an event of several elements has {count:.3g} outcomes; a plate's elements are summed one by one"
        if count > MAX_OUTCOMES:
            return f"it has {count:,} outcomes, and the model is evaluated at each of at most {MAX_OUTCOMES:,}"
        return None

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Any]:
        return {"value": site.entropy, "guide": site.entropy}


register(
    "estimator",
    "enumerated",
    Enumerated,
    aliases=("enum",),
    summary="exact sum over the outcomes",
    source="Pyro's TraceEnum_ELBO",
)
