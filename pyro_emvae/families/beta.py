r"""Independent Beta distributions."""

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

__all__ = ["Beta"]

LOW, HIGH = 0.1, 1e6


@dataclass(frozen=True)
class Beta(Family):
    r"""Independent Beta distributions, for sites in the unit interval.

    $$q(z\mid c)=\prod_i\mathrm{Beta}\big(z_i\mid \alpha_i,\beta_i\big),\qquad 0.1<\alpha_i,\beta_i<10^6.$$

    The context holds log $\alpha$, then log $\beta$ less their initial values, each in the order of the flattened
    value; at context zero both are `init_concentration`, 1: uniform.

    When to use: probabilities; it is the exact posterior of a conjugate one. Reparameterised, implicitly.

    Numerics: draws are kept off 0 and 1 by the spacing of floating point; with $\beta<0.5$ in float32 many draws lie
    nearer to 1 than its last number below.

    Args:
        init_concentration: Both concentrations at context zero.

    Shape: context ``(*batch, 2 n)`` -> batch shape ``batch``, event shape of n entries.

    Source: Figurnov, Mohamed and Mnih 2018, section 4.

    Example:
        >>> fn = Beta().distribution(torch.zeros(6), torch.Size([3]))
        >>> fn.mean, fn.log_prob(torch.rand(3)).abs()
        (tensor([0.5000, 0.5000, 0.5000]), tensor(0.))
    """

    init_concentration: float = 1.0
    traits: ClassVar[Traits] = Traits(support="unit_interval")

    def __post_init__(self) -> None:
        check_setting(self, "init_concentration", LOW, HIGH)

    def num_features(self, event_shape: torch.Size) -> int:
        return 2 * math.prod(event_shape)

    def distribution(self, context: Tensor, event_shape: torch.Size) -> Any:
        one, zero = parts(between(context, LOW, HIGH, self.init_concentration), event_shape, 2)
        return dist.Beta(one, zero).to_event(len(event_shape))

    def start(self, value: Tensor, event_shape: torch.Size) -> Tensor:
        mean = flat(value, event_shape)
        both = 2 * self.init_concentration * torch.cat([mean, 1 - mean], -1)
        return raw_of(both.clamp(min=1.1 * LOW), LOW, HIGH, self.init_concentration)

    def chart(self, context: Tensor, event_shape: torch.Size) -> Chart:
        r"""Return the chart with $t=(\log z,\ \log(1-z))$."""
        eta = torch.stack(between(context.detach(), LOW, HIGH, self.init_concentration).chunk(2, -1), -1) - 1

        def statistics(value: Tensor) -> Tensor:
            z = flat(value, event_shape)
            return torch.stack([z.log(), torch.log1p(-z)], -1)

        def back(eta: Tensor) -> Tensor:
            return raw_of(torch.cat((eta + 1).unbind(-1), -1), LOW, HIGH, self.init_concentration)

        return Chart(eta, back, statistics)

    def cdf(self, fn: Any, value: Tensor) -> Tensor:
        fn = base_of(fn)
        return special("betainc", fn.concentration1, fn.concentration0, value)


register(
    "family",
    "beta",
    Beta,
    summary="independent Beta distributions, for sites in the unit interval",
    source="Figurnov, Mohamed & Mnih 2018",
)
