r"""Distributions that are reparameterised in part, by their own `score_parts`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from .._registry import Traits, register
from .base import Estimator, SiteTerms, State, base

__all__ = ["PartialPathwise", "has_score_parts"]


def has_score_parts(fn: Any) -> bool:
    """Whether the distribution overrides Pyro's `score_parts`, as its ``Rejector`` does."""
    method = getattr(type(base(fn)), "score_parts", None)
    return method is not None and method is not TorchDistributionMixin.score_parts


@dataclass(frozen=True)
class PartialPathwise(Estimator):
    r"""Pathwise gradient plus the score of what the sampler's path leaves out.

    $$\hat g=\tfrac1K\sum_k\nabla_\phi f(z_\phi)+f_k\,\nabla_\phi s_\phi(z_k),$$

    with $s_\phi$ the distribution's ``score_function`` part. When to use: rejection samplers. Unbiased. Cost: as
    pathwise.

    Args:
        reach: ``"downstream"``, or ``"all"``: terms that the draw does not reach stay in f, as in `Trace_ELBO`.

    Source: Naesseth et al. 2017, "Reparameterization gradients through acceptance-rejection sampling algorithms",
    eq. 7; Pyro's ``ScoreParts``.
    """

    reach: str = "downstream"  # type: ignore[misc]
    traits: ClassVar[Traits] = Traits(needs_rsample=True, objectives=("any",))

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Tensor | None]:
        parts = [base(run.fn).score_parts(run.value).score_function for run in site.runs or (site,)]
        if not isinstance(parts[0], Tensor):  # reparameterised in full
            return {"value": site.entropy, "guide": site.entropy}
        score = torch.stack(parts) if site.runs else parts[0]
        score = score if score.shape == site.log_q.shape else score.reshape(*site.log_q.shape, -1).sum(-1)
        term = signal * score
        term = term if site.entropy is None else term + site.entropy
        return {"value": term, "guide": term}


register(
    "estimator",
    "partial_pathwise",
    PartialPathwise,
    summary="pathwise with the score of a rejection sampler's residual",
    source="Naesseth et al. 2017",
)
