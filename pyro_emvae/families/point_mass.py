r"""Point masses."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform, biject_to

from .._registry import Traits, register
from ._maps import flat
from ._supports import support_of
from .base import Family

__all__ = ["PointMass"]


@dataclass(frozen=True)
class PointMass(Family):
    r"""Point masses, for any continuous site.

    $$q(z\mid c)=\delta_{T(c)}(z),$$

    with T the bijection from the reals to the site's support. Its density counts as 1, as in Pyro's `AutoDelta`: the
    fit is the maximum of the posterior density *of the site's value*, not of the unconstrained one, and the ELBO
    is no bound. At context zero it is at T(0).

    When to use: maximum a posteriori estimates of some sites beside distributions of others.

    Args:
        transform: T; the guide takes it from the site of the model. None: the identity.

    Shape: context ``(*batch, n)``, n entries of an unconstrained value -> batch shape ``batch``, event shape of the
    site.

    Source: Pyro's `AutoDelta`.

    Example:
        >>> family = PointMass().for_site("p", dist.Dirichlet(torch.ones(3)))
        >>> family.num_features(torch.Size([3])), family.distribution(torch.zeros(2), torch.Size([3])).mean
        (2, tensor([0.3333, 0.3333, 0.3333]))
    """

    transform: Transform | None = field(default=None, hash=False)
    traits: ClassVar[Traits] = Traits(support="continuous")

    @property
    def direct(self) -> bool:
        return True

    def for_site(self, name: str, fn: Any, support: Any = None) -> PointMass:
        super().for_site(name, fn, support)
        return dataclasses.replace(self, transform=biject_to(support_of(fn, support)))

    def num_features(self, event_shape: torch.Size) -> int:
        return math.prod(self._free_shape(event_shape))

    def distribution(self, context: Tensor, event_shape: torch.Size) -> Any:
        free = context.reshape(context.shape[:-1] + self._free_shape(event_shape))
        return dist.Delta(free if self.transform is None else self.transform(free), event_dim=len(event_shape))

    def start(self, value: Tensor, event_shape: torch.Size) -> Tensor:
        return flat(value if self.transform is None else self.transform.inv(value), self._free_shape(event_shape))

    def quantile(self, fn: Any, level: Tensor) -> Tensor:
        """Return the point itself at every level."""
        return fn.v.expand(torch.broadcast_shapes(level.shape, fn.v.shape))

    def _free_shape(self, event_shape: torch.Size) -> torch.Size:
        return event_shape if self.transform is None else torch.Size(self.transform.inverse_shape(event_shape))


register(
    "family",
    "point_mass",
    PointMass,
    aliases=("delta",),
    summary="point masses: the maximum a posteriori",
    source="Pyro's AutoDelta",
)
