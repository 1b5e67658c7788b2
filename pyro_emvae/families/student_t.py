r"""Independent Student-t distributions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from .._registry import Traits, register
from ._maps import between, check_setting, flat, parts, scale
from ._quantiles import special
from ._supports import base_of
from .base import Family

__all__ = ["StudentT"]

LOW, HIGH = 1.0, 200.0


@dataclass(frozen=True)
class StudentT(Family):
    r"""Independent Student-t distributions: normals with heavier tails, as heavy as the posterior's.

    $$q(z\mid c)=\prod_i t_{\nu_i}\big(z_i\mid a_i, s_i\big),\qquad 1<\nu_i<200.$$

    The context holds the locations a, the scales s as in `Normal`, and the degrees of freedom, each in the order of the
    flattened value. The scale is not the standard deviation, which is infinite for two degrees of freedom or fewer.

    When to use: as a proposal of importance sampling (IWAE, log evidence), whose weights a normal's light tails ruin.
    Reparameterised, implicitly for the degrees of freedom.

    Args:
        init_scale: The scale at context zero.
        init_df: The degrees of freedom at context zero, between 1 and 200.

    Shape: context ``(*batch, 3 n)`` -> batch shape ``batch``, event shape of n entries.

    Source: Figurnov, Mohamed and Mnih 2018, "Implicit reparameterization gradients", section 4.

    Example:
        >>> fn = StudentT(init_df=3.0).distribution(torch.zeros(3), torch.Size([]))
        >>> round(fn.df.item(), 4), round(fn.variance.item(), 4)
        (3.0, 3.0)
    """

    init_scale: float = 1.0
    init_df: float = 5.0
    traits: ClassVar[Traits] = Traits(support="continuous")

    def __post_init__(self) -> None:
        check_setting(self, "init_scale")
        check_setting(self, "init_df", LOW, HIGH)

    def num_features(self, event_shape: torch.Size) -> int:
        return 3 * math.prod(event_shape)

    def distribution(self, context: Tensor, event_shape: torch.Size) -> Any:
        loc, raw, tail = parts(context, event_shape, 3)
        df = between(tail, LOW, HIGH, self.init_df)
        return dist.StudentT(df, loc, scale(raw, self.init_scale)).to_event(len(event_shape))

    def start(self, value: Tensor, event_shape: torch.Size) -> Tensor:
        loc = flat(value, event_shape)
        return torch.cat([loc, torch.zeros_like(loc), torch.zeros_like(loc)], -1)

    def cdf(self, fn: Any, value: Tensor) -> Tensor:
        fn = base_of(fn)
        return special("stdtr", fn.df, (value - fn.loc) / fn.scale)


register(
    "family",
    "student_t",
    StudentT,
    aliases=("t", "studentt"),
    summary="independent Student-t distributions, tails fitted",
    source="Figurnov, Mohamed & Mnih 2018",
)
