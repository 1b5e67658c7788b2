r"""Dirichlet distributions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from .._registry import Traits, register
from ._charts import Chart
from ._maps import between, check_setting, flat, parts, raw_of
from ._quantiles import special
from ._supports import base_of
from .base import Family

__all__ = ["Dirichlet"]

LOW, HIGH = 0.1, 1e6


@dataclass(frozen=True)
class Dirichlet(Family):
    r"""Dirichlet distributions, for sites on the simplex.

    $$q(z\mid c)=\mathrm{Dirichlet}(z\mid\alpha),\qquad 0.1<\alpha_k<10^6.$$

    The context holds log $\alpha$ less its initial value, one per entry of the site's value; at context zero all are
    `init_concentration`, 1: uniform on the simplex. Several vectors (a site with ``.to_event``) are independent.

    When to use: proportions; it is the exact posterior of conjugate ones. Reparameterised, implicitly.

    Args:
        init_concentration: Each concentration at context zero.

    Shape: context ``(*batch, n)`` -> batch shape ``batch``, event shape of n entries, the last dim a simplex.

    Source: Figurnov, Mohamed and Mnih 2018, section 4.

    Example:
        >>> Dirichlet().distribution(torch.zeros(3), torch.Size([3])).mean
        tensor([0.3333, 0.3333, 0.3333])
    """

    init_concentration: float = 1.0
    traits: ClassVar[Traits] = Traits(support="simplex")

    def __post_init__(self) -> None:
        check_setting(self, "init_concentration", LOW, HIGH)

    def num_features(self, event_shape: torch.Size) -> int:
        return math.prod(event_shape)

    def distribution(self, context: Tensor, event_shape: torch.Size) -> Any:
        (concentration,) = parts(between(context, LOW, HIGH, self.init_concentration), event_shape, 1)
        return dist.Dirichlet(concentration).to_event(len(event_shape) - 1)

    def start(self, value: Tensor, event_shape: torch.Size) -> Tensor:
        concentration = flat(value * event_shape[-1] * self.init_concentration, event_shape)
        return raw_of(concentration.clamp(min=1.1 * LOW), LOW, HIGH, self.init_concentration)

    def chart(self, context: Tensor, event_shape: torch.Size) -> Chart:
        r"""Return the chart with $t_k=\log z_k$."""
        concentration = between(context.detach(), LOW, HIGH, self.init_concentration)
        shape = (math.prod(event_shape[:-1]), event_shape[-1])

        def statistics(value: Tensor) -> Tensor:
            return flat(value, event_shape).unflatten(-1, shape).log()

        def back(eta: Tensor) -> Tensor:
            return raw_of((eta + 1).flatten(-2), LOW, HIGH, self.init_concentration)

        return Chart(concentration.unflatten(-1, shape) - 1, back, statistics)

    def cdf(self, fn: Any, value: Tensor) -> Tensor:
        return special("betainc", *_marginals(fn), value)


def _marginals(fn: Any) -> tuple[Tensor, Tensor]:
    """Return the concentrations of each entry against the others."""
    one = base_of(fn).concentration
    return one, one.sum(-1, keepdim=True) - one


register(
    "family",
    "dirichlet",
    Dirichlet,
    summary="Dirichlet distributions, for sites on the simplex",
    source="Figurnov, Mohamed & Mnih 2018",
)
