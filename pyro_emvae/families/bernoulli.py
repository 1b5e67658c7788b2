r"""Independent Bernoulli distributions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from .._registry import Traits, register
from ._charts import Chart, discrete_chart
from ._maps import check_setting, parts
from .base import Family

__all__ = ["Bernoulli"]


@dataclass(frozen=True)
class Bernoulli(Family):
    r"""Independent Bernoulli distributions, for binary sites.

    $$q(z\mid c)=\prod_i p_i^{z_i}(1-p_i)^{1-z_i},\qquad \mathrm{logit}\,p_i=c_i+\mathrm{logit}\,p_0.$$

    When to use: binary latents. Not reparameterised: estimators by score, or enumerated with
    ``infer={"enumerate": "parallel"}``.

    Args:
        init_prob: $p_0$, the probability of 1 at context zero.

    Shape: context ``(*batch, n)`` -> batch shape ``batch``, event shape of n entries.

    Source: Mnih and Gregor 2014, "Neural variational inference and learning in belief networks".

    Example:
        >>> Bernoulli(init_prob=0.2).distribution(torch.zeros(1), torch.Size([1])).mean
        tensor([0.2000])
    """

    init_prob: float = 0.5
    traits: ClassVar[Traits] = Traits(support="binary")

    def __post_init__(self) -> None:
        check_setting(self, "init_prob", 0.0, 1.0)

    def num_features(self, event_shape: torch.Size) -> int:
        return math.prod(event_shape)

    def distribution(self, context: Tensor, event_shape: torch.Size) -> Any:
        (logits,) = parts(context + self._offset, event_shape, 1)
        return dist.Bernoulli(logits=logits).to_event(len(event_shape))

    @property
    def _offset(self) -> float:
        return math.log(self.init_prob / (1 - self.init_prob))

    def chart(self, context: Tensor, event_shape: torch.Size) -> Chart:
        logits = torch.stack([torch.zeros_like(context), context + self._offset], -1)
        outcomes = torch.arange(2, dtype=context.dtype, device=context.device)
        return discrete_chart(logits, outcomes, lambda eta: eta[..., 1] - eta[..., 0] - self._offset)


register(
    "family",
    "bernoulli",
    Bernoulli,
    summary="independent Bernoulli distributions, for binary sites",
    source="Mnih & Gregor 2014",
)
