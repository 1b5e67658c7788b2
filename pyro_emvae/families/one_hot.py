r"""Independent one-hot categorical distributions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from .._registry import Traits, register
from ._charts import Chart, discrete_chart
from ._maps import parts
from .base import Family

__all__ = ["OneHot"]


@dataclass(frozen=True)
class OneHot(Family):
    r"""Independent one-hot categorical distributions, for sites whose last dim is a one-hot vector.

    $$q(z\mid c)=\prod_i\frac{e^{c_i\cdot z_i}}{\sum_k e^{c_{ik}}}.$$

    The context holds one logit per entry of the site's value; at context zero all vectors are equally likely.

    When to use: ``OneHotCategorical`` sites. Not reparameterised: estimators by score, or enumerated with
    ``infer={"enumerate": "parallel"}``. One-hot vectors have no order, and so no quantiles.

    Shape: context ``(*batch, n)`` -> batch shape ``batch``, event shape of n entries, the last dim one-hot.

    Source: Mnih and Gregor 2014.

    Example:
        >>> OneHot().distribution(torch.zeros(4), torch.Size([4])).mean
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    traits: ClassVar[Traits] = Traits(support="one_hot")

    def num_features(self, event_shape: torch.Size) -> int:
        return math.prod(event_shape)

    def distribution(self, context: Tensor, event_shape: torch.Size) -> Any:
        (logits,) = parts(context, event_shape, 1)
        return RecordableOneHot(logits=logits).to_event(len(event_shape) - 1)

    def chart(self, context: Tensor, event_shape: torch.Size) -> Chart:
        logits = context.unflatten(-1, (math.prod(event_shape[:-1]), event_shape[-1]))
        outcomes = torch.eye(event_shape[-1], dtype=context.dtype, device=context.device)
        return discrete_chart(logits, outcomes, lambda eta: eta.log_softmax(-1).flatten(-2))


class RecordableOneHot(dist.OneHotCategorical):
    """Pyro's one-hot categorical; its draws are torch's, without the check of their range that no graph can hold."""

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        with torch.no_grad():
            index = dist.Categorical(logits=self.logits).sample(torch.Size(sample_shape))
            numbers = torch.arange(self.event_shape[-1], device=index.device)
            return (index.unsqueeze(-1) == numbers).to(self.logits.dtype)


register(
    "family",
    "one_hot",
    OneHot,
    aliases=("one_hot_categorical", "onehot"),
    summary="independent one-hot categorical distributions",
    source="Mnih & Gregor 2014",
)
