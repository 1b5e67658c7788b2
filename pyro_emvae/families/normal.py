r"""Independent normals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from .._checks import EmvaeError, fail
from .._registry import Traits, register
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
    for $b\ll0$ it is $e^{b+c}$ to full relative precision, and underflows to 0 below about -103 in float32 (-745 in
    float64). Nothing is clamped, so gradients vanish nowhere by fiat.

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
        if not 0 < self.init_scale < math.inf:
            fail(
                EmvaeError,
                "Normal",
                "start at its initial scale",
                got=f"init_scale={self.init_scale!r}",
                because="a standard deviation is positive and finite",
                fix="Write init_scale=1.0, or smaller.",
            )

    def num_features(self, event_shape: torch.Size) -> int:
        return 2 * math.prod(event_shape)

    def distribution(self, context: Tensor, event_shape: torch.Size) -> Any:
        loc, raw = (half.reshape(half.shape[:-1] + event_shape) for half in context.chunk(2, -1))
        return dist.Normal(loc, softplus(raw + self._offset)).to_event(len(event_shape))

    def quantile(self, fn: Any, level: Tensor) -> Tensor:
        return getattr(fn, "base_dist", fn).icdf(level)

    @property
    def _offset(self) -> float:
        """The inverse of softplus at the initial scale."""
        return self.init_scale + math.log(-math.expm1(-self.init_scale))


register(
    "family",
    "normal",
    Normal,
    aliases=("gaussian", "diagonal_normal", "mean_field_normal"),
    summary="independent normals",
    source="Kingma & Welling 2013",
)
