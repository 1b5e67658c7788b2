r"""Independent categorical distributions."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from .._checks import EmvaeError, fail, positive_int
from .._registry import Traits, register
from ._charts import Chart, discrete_chart
from ._supports import cardinality
from .base import Family

__all__ = ["Categorical"]


@dataclass(frozen=True)
class Categorical(Family):
    r"""Independent categorical distributions, for sites with values 0 to K - 1.

    $$q(z\mid c)=\prod_i \frac{e^{c_{i,z_i}}}{\sum_k e^{c_{ik}}}.$$

    The context holds the K logits of the first entry of the value, then those of the second, and so on; at context zero
    all values are equally likely.

    When to use: discrete latents. Not reparameterised: estimators by score, or enumerated with
    ``infer={"enumerate": "parallel"}``.

    Args:
        num_categories: K; the guide takes it from the site of the model.

    Shape: context ``(*batch, n K)`` -> batch shape ``batch``, event shape of n entries.

    Raises:
        EmvaeError: If K is not known when it is needed.

    Source: Mnih and Gregor 2014.

    Example:
        >>> family = Categorical().for_site("k", dist.Categorical(torch.ones(4)))
        >>> family, family.num_features(torch.Size([2]))
        (Categorical(num_categories=4), 8)
        >>> family.distribution(torch.zeros(8), torch.Size([2])).event_shape
        torch.Size([2])
    """

    num_categories: int | None = None
    traits: ClassVar[Traits] = Traits(support="categorical")

    def __post_init__(self) -> None:
        if self.num_categories is not None:
            positive_int("Categorical", "num_categories", self.num_categories)

    def for_site(self, name: str, fn: Any, support: Any = None) -> Categorical:
        super().for_site(name, fn, support)
        found = cardinality(fn, support)
        if self.num_categories not in (None, found):
            fail(
                EmvaeError,
                "Categorical",
                f"serve site {name!r}",
                got=f"num_categories={self.num_categories}",
                because=f"the site has {found} categories",
                fix='Write family="categorical", which counts them.',
            )
        return dataclasses.replace(self, num_categories=found)

    def num_features(self, event_shape: torch.Size) -> int:
        if self.num_categories is None:
            fail(
                EmvaeError,
                "Categorical",
                "say how many features it has",
                got="num_categories=None",
                because="there is one for each category",
                fix='Call family = family.for_site("k", fn) first, or write Categorical(num_categories=3).',
            )
        return math.prod(event_shape) * self.num_categories

    def distribution(self, context: Tensor, event_shape: torch.Size) -> Any:
        logits = context.reshape(context.shape[:-1] + event_shape + (self.num_categories,))
        return dist.Categorical(logits=logits).to_event(len(event_shape))

    def chart(self, context: Tensor, event_shape: torch.Size) -> Chart:
        logits = context.unflatten(-1, (math.prod(event_shape), self.num_categories))
        outcomes = torch.arange(self.num_categories, device=context.device)
        return discrete_chart(logits, outcomes, lambda eta: eta.log_softmax(-1).flatten(-2))


register(
    "family",
    "categorical",
    Categorical,
    summary="independent categorical distributions, for sites with values 0 to K - 1",
    source="Mnih & Gregor 2014",
)
