r"""The contract of a family: a context, one row per value, becomes a distribution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import EmvaeError, fail
from .._registry import Traits

__all__ = ["Family"]


class Family(ABC):
    r"""How a site of the guide is distributed, given a context.

    A context of zeros stands for the family's initial distribution, so that encoders and free parameters that start
    near zero start there. Families hold settings only and are never changed by use.

    Traits: ``support`` says which sites it can serve, ``needs_rsample`` is of no meaning here.
    """

    traits: ClassVar[Traits]

    @abstractmethod
    def num_features(self, event_shape: torch.Size) -> int:
        """Return the number of context entries that one value of shape `event_shape` needs."""

    @abstractmethod
    def distribution(self, context: Tensor, event_shape: torch.Size) -> Any:
        r"""Return the distribution of unconstrained values.

        Args:
            context: ``(*batch, num_features)``.
            event_shape: Shape of one value.

        Returns:
            A Pyro distribution with batch shape ``batch`` and event shape `event_shape`, on the context's device and
            in its dtype.
        """

    def quantile(self, fn: Any, level: Tensor) -> Tensor:
        r"""Return the marginal quantiles of each coordinate.

        Args:
            fn: What `distribution` returned.
            level: Probabilities that broadcast against ``(*batch, *event)``.
        """
        fail(
            EmvaeError,
            type(self).__name__,
            "give medians and quantiles",
            got="a family without marginal quantiles",
            because="they need the inverse distribution function of each coordinate",
            fix="Draw from the guide with pyro.infer.Predictive and take empirical quantiles.",
        )
