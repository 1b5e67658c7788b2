r"""Independent Gamma distributions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from .._registry import Traits, register
from ._charts import Chart
from ._maps import between, check_setting, flat, limited, parts, raw_of, unlimited
from ._supports import base_of
from .base import Family

__all__ = ["Gamma"]

LOG_MEAN = 35.0
LOW, HIGH = 0.05, 1e6


@dataclass(frozen=True)
class Gamma(Family):
    r"""Independent Gamma distributions, for positive sites.

    $$q(z\mid c)=\prod_i\mathrm{Gamma}\big(z_i\mid k_i,\ k_i/m_i\big),$$

    with mean m and concentration k, which are orthogonal parameters: $1/\sqrt k$ is the ratio of standard deviation and
    mean. The context holds log m, then log k less their initial values, each in the order of the flattened value.

    When to use: rates, precisions, intensities; it is the exact posterior of a conjugate one. Reparameterised,
    implicitly.

    Numerics: k is between 0.05 and 1e6, log m between -35 and 35; within, draws and densities are finite. Below k of
    about 0.3 float32 has no numbers for the smallest draws.

    Args:
        init_mean: The mean at context zero.
        init_concentration: The concentration at context zero.

    Shape: context ``(*batch, 2 n)`` -> batch shape ``batch``, event shape of n entries.

    Source: Figurnov, Mohamed and Mnih 2018, section 4.

    Example:
        >>> fn = Gamma(init_mean=3.0, init_concentration=9.0).distribution(torch.zeros(2), torch.Size([]))
        >>> round(fn.mean.item(), 4), round(fn.variance.item(), 4)
        (3.0, 1.0)
    """

    init_mean: float = 1.0
    init_concentration: float = 2.0
    traits: ClassVar[Traits] = Traits(support="positive")

    def __post_init__(self) -> None:
        check_setting(self, "init_mean")
        check_setting(self, "init_concentration", LOW, HIGH)

    def num_features(self, event_shape: torch.Size) -> int:
        return 2 * math.prod(event_shape)

    def distribution(self, context: Tensor, event_shape: torch.Size) -> Any:
        log_mean, raw = parts(context, event_shape, 2)
        concentration = between(raw, LOW, HIGH, self.init_concentration)
        mean = self.init_mean * limited(log_mean, LOG_MEAN).exp()
        return dist.Gamma(concentration, concentration / mean).to_event(len(event_shape))

    def start(self, value: Tensor, event_shape: torch.Size) -> Tensor:
        log_mean = unlimited((flat(value, event_shape) / self.init_mean).log(), LOG_MEAN)
        return torch.cat([log_mean, torch.zeros_like(log_mean)], -1)

    def chart(self, context: Tensor, event_shape: torch.Size) -> Chart:
        r"""Return the chart with $t=(\log y,\ y-1-\log y)$ and $y=z/m$."""
        log_mean, raw = context.detach().chunk(2, -1)
        log_mean, k = limited(log_mean, LOG_MEAN), between(raw, LOW, HIGH, self.init_concentration)
        mean = self.init_mean * log_mean.exp()

        def statistics(value: Tensor) -> Tensor:
            y = flat(value, event_shape) / mean
            return torch.stack([y.log(), y - 1 - y.log()], -1)

        def back(eta: Tensor) -> Tensor:
            k, rate = eta[..., 0] - eta[..., 1] + 1, -eta[..., 1]
            shift = log_mean + (k / rate).log()
            return torch.cat([unlimited(shift, LOG_MEAN), raw_of(k, LOW, HIGH, self.init_concentration)], -1)

        return Chart(torch.stack([torch.full_like(k, -1.0), -k], -1), back, statistics)

    def cdf(self, fn: Any, value: Tensor) -> Tensor:
        return base_of(fn).cdf(value)


register(
    "family",
    "gamma",
    Gamma,
    summary="independent Gamma distributions, for positive sites",
    source="Figurnov, Mohamed & Mnih 2018",
)
