r"""The augment-REINFORCE-merge gradient of Bernoulli sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._registry import Traits, register
from .arms import Disarm, in_pairs, odd
from .base import Draw, Estimator, SiteTerms, Situation, State
from .bernoulli import element_logits, lift

__all__ = ["Arm"]


@dataclass(frozen=True)
class Arm(Estimator):
    r"""Antithetic pairs of Bernoulli draws, weighed by the uniform number that they were made from (ARM).

    $$\hat g=\big(f(\tilde b)-f(b)\big)\,(u-\tfrac12),\qquad b=1[u<p],\ \tilde b=1[1-u<p],$$

    by the logit of each element, averaged over K/2 pairs of particles. Its expectation given the draws is `Disarm`,
    which is therefore never worse: this one is for teaching. The uniform number is drawn given the pair.

    When to use: to see what integrating u out buys. Unbiased. Cost: K model and guide runs, one backward.

    Raises:
        EstimatorError: As `Disarm`.

    Source: Yin and Zhou 2019, "ARM: augment-REINFORCE-merge gradient for stochastic binary networks", theorem 1.

    Example:
        >>> Arm().traits.draws
        'coupled'
    """

    traits: ClassVar[Traits] = Traits(support="binary", draws="coupled", min_particles=2)

    def fits(self, at: Situation) -> str | None:
        return odd(at)

    def draw(self, fn: Any, num_particles: int) -> Draw | None:
        return Disarm().draw(fn, num_particles)

    def joint(self, fn: Any, value: Tensor) -> Tensor | None:
        return Disarm().joint(fn, value)

    def noise(self, site: SiteTerms) -> tuple[int, ...] | None:
        return tuple(in_pairs(site.value)[0].shape)

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Tensor | None]:
        logits = in_pairs(element_logits(site))[0]
        p, (b, other) = logits.detach().sigmoid(), in_pairs(site.value.detach() > 0)
        low = torch.maximum(torch.where(b, 0.0, p), torch.where(other, 1 - p, 0.0))
        high = torch.minimum(torch.where(b, p, 1.0), torch.where(other, 1.0, 1 - p))
        centred = low + site.noise * (high - low) - 0.5
        f, f_other = in_pairs(signal)
        term = 2 * lift(f_other - f, site.fn) * centred * logits
        return {"value": term, "guide": term}


register(
    "estimator",
    "arm",
    Arm,
    summary="antithetic Bernoulli pairs weighed by their uniform number",
    source="Yin & Zhou 2019",
)
