r"""Independent log-normals."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from .._registry import Traits, register
from ._charts import Chart, normal_chart
from ._maps import between, check_setting, flat, limited, parts, raw_of, unlimited
from ._supports import base_of
from .base import Family

__all__ = ["LogNormal"]

LOCATION = 40.0
LOW, HIGH = 1e-6, 8.0


@dataclass(frozen=True)
class LogNormal(Family):
    r"""Independent log-normals, for positive sites.

    $$\log z_i\sim N(a_i,s_i^2),\qquad |a_i|<40,\quad 10^{-6}<s_i<8.$$

    The context holds the locations, then the scales, each in the order of the flattened value; at context zero
    a = 0, the median 1.

    When to use: positive sites; `Normal` there is the same under the name of an auxiliary unconstrained site.
    Reparameterised.

    Numerics: within the bounds, values are finite and above zero in float32.

    Args:
        init_scale: The standard deviation of log z at context zero.

    Shape: context ``(*batch, 2 n)`` -> batch shape ``batch``, event shape of n entries.

    Source: Kucukelbir et al. 2017, section 2.3.

    Example:
        >>> fn = LogNormal().distribution(torch.tensor([1.0, 0.0]), torch.Size([]))
        >>> fn.log_prob(torch.tensor(2.0))
        tensor(-1.6591)
    """

    init_scale: float = 1.0
    traits: ClassVar[Traits] = Traits(support="positive")

    def __post_init__(self) -> None:
        check_setting(self, "init_scale", LOW, HIGH)

    def num_features(self, event_shape: torch.Size) -> int:
        return 2 * math.prod(event_shape)

    def distribution(self, context: Tensor, event_shape: torch.Size) -> Any:
        loc, raw = parts(context, event_shape, 2)
        scale = between(raw, LOW, HIGH, self.init_scale)
        return dist.LogNormal(limited(loc, LOCATION), scale).to_event(len(event_shape))

    def start(self, value: Tensor, event_shape: torch.Size) -> Tensor:
        loc = unlimited(flat(value, event_shape).log(), LOCATION)
        return torch.cat([loc, torch.zeros_like(loc)], -1)

    def chart(self, context: Tensor, event_shape: torch.Size) -> Chart:
        loc, raw = context.chunk(2, -1)

        def back(loc: Tensor, std: Tensor) -> Tensor:
            return torch.cat([unlimited(loc, LOCATION), raw_of(std, LOW, HIGH, self.init_scale)], -1)

        loc, std = limited(loc, LOCATION), between(raw, LOW, HIGH, self.init_scale)
        chart = normal_chart(loc, std, back, lambda value: flat(value, event_shape).log())
        return dataclasses.replace(chart, log_base=lambda value: -flat(value, event_shape).log())

    def cdf(self, fn: Any, value: Tensor) -> Tensor:
        return base_of(fn).cdf(value)


register(
    "family",
    "log_normal",
    LogNormal,
    aliases=("lognormal",),
    summary="independent log-normals, for positive sites",
    source="Kucukelbir et al. 2017",
)
