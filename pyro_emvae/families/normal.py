r"""Independent normals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from .._registry import Traits, register
from ._charts import Chart, normal_chart
from ._maps import check_setting, flat, parts, raw_scale, scale
from ._supports import base_of
from .base import Family

__all__ = ["Normal"]


@dataclass(frozen=True)
class Normal(Family):
    r"""Independent normals, the mean-field family.

    $$q(z\mid a,b)=\prod_i N\big(z_i\mid a_i,\ s_i^2\big),\qquad s_i=\log\big(1+e^{b_i+c}\big),$$

    with $c$ such that $b=0$ means the initial scale. The context holds all $a$, then all $b$, each in the order of the
    flattened value.

    When to use: the default; it cannot express correlations within a datum.

    Numerics: for $b\gg0$ the scale grows linearly, so that an encoder's wild output cannot overflow as $e^b$ would;
    for $b\ll0$ it is $e^{b+c}$, down to 3e-8 of the initial scale in float32 and 2e-62 in float64, so that the density
    of values far away still has finite gradients. Nothing is clamped, so gradients vanish nowhere by fiat.

    Args:
        init_scale: The scale at context zero. With 1, an encoder that starts near zero starts at the standard normal,
            the usual prior.

    Shape: context ``(*batch, 2 n)`` -> batch shape ``batch``, event shape of n entries.

    Raises:
        EmvaeError: If the initial scale is not positive and finite.

    Source: Kingma and Welling 2013, appendix C.2. Differs: softplus in place of exp.

    Example:
        >>> fn = Normal().distribution(torch.zeros(5, 4), torch.Size([2]))
        >>> fn.batch_shape, fn.event_shape, round(fn.stddev.mean().item(), 5)
        (torch.Size([5]), torch.Size([2]), 1.0)
    """

    init_scale: float = 1.0
    traits: ClassVar[Traits] = Traits(support="continuous")

    def __post_init__(self) -> None:
        check_setting(self, "init_scale")

    def num_features(self, event_shape: torch.Size) -> int:
        return 2 * math.prod(event_shape)

    def distribution(self, context: Tensor, event_shape: torch.Size) -> Any:
        loc, raw = parts(context, event_shape, 2)
        return dist.Normal(loc, scale(raw, self.init_scale)).to_event(len(event_shape))

    def start(self, value: Tensor, event_shape: torch.Size) -> Tensor:
        loc = flat(value, event_shape)
        return torch.cat([loc, torch.zeros_like(loc)], -1)

    def chart(self, context: Tensor, event_shape: torch.Size) -> Chart:
        loc, raw = context.chunk(2, -1)

        def back(loc: Tensor, std: Tensor) -> Tensor:
            return torch.cat([loc, raw_scale(std, self.init_scale)], -1)

        return normal_chart(loc, scale(raw, self.init_scale), back, lambda value: flat(value, event_shape))

    def cdf(self, fn: Any, value: Tensor) -> Tensor:
        return base_of(fn).cdf(value)


register(
    "family",
    "normal",
    Normal,
    aliases=("gaussian", "diagonal_normal", "mean_field_normal"),
    summary="independent normals",
    source="Kingma & Welling 2013",
)
