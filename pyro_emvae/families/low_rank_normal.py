r"""Normals whose correlations come from a few common factors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from .._checks import positive_int
from .._registry import Traits, register
from ._maps import check_setting, scale
from ._normals import VectorNormal, loading, reshaped

__all__ = ["LowRankNormal"]

START = 0.1


@dataclass(frozen=True)
class LowRankNormal(VectorNormal):
    r"""Normals with a diagonal and a few common factors.

    $$q(z\mid c)=N\big(z\mid a,\ S R S\big),\qquad R=\frac{I+WW^\top}{\text{its diagonal}},\qquad
    S=\mathrm{diag}(s),$$

    so that the $s_i$ are the marginal standard deviations, and W, n by rank, is about the correlations alone. The
    context holds a, then s as in `Normal`, then W by rows. At context zero W has entries of 0.1 at most, orthogonal
    columns of cosines: at W = 0 itself the gradient by W is zero, whatever the posterior.

    When to use: correlations in many dimensions; `FullRankNormal` has all of them, with n (n - 1) / 2 numbers. Cost:
    n rank numbers, and a Cholesky decomposition of a matrix of rank by rank.

    Numerics: entries of W stay below 54 in float32 and 8192 in float64, that is, correlations below 1 - 3e-4 and
    1 - 1e-8. So the Cholesky decomposition cannot fail up to n rank of about 1000, wherever the context goes.

    Args:
        rank: The number of factors, at most n of which are used.
        init_scale: The standard deviations at context zero.

    Shape: context ``(*batch, n (2 + rank))`` -> batch shape ``batch``, event shape of n entries.

    Source: Ong, Nott and Smith 2018, "Gaussian variational approximation with a factor covariance structure", section
    3. Differs: scaled to marginal standard deviations.

    Example:
        >>> family = LowRankNormal(rank=1)
        >>> fn = family.distribution(torch.zeros(5, 9), torch.Size([3]))
        >>> fn.batch_shape, fn.event_shape, [round(v, 6) for v in fn.variance[0].tolist()]
        (torch.Size([5]), torch.Size([3]), [1.0, 1.0, 1.0])
    """

    rank: int = 2
    init_scale: float = 1.0
    traits: ClassVar[Traits] = Traits(support="continuous")

    def __post_init__(self) -> None:
        positive_int("LowRankNormal", "rank", self.rank)
        check_setting(self, "init_scale")

    def num_features(self, event_shape: torch.Size) -> int:
        n = math.prod(event_shape)
        return n * (2 + min(self.rank, n))

    def distribution(self, context: Tensor, event_shape: torch.Size) -> Any:
        n = math.prod(event_shape)
        rank = min(self.rank, n)
        loc, raw, factor = context.split([n, n, n * rank], -1)
        factor = factor.reshape(*factor.shape[:-1], n, rank) + _cosines(n, rank, context)
        factor = loading(factor)
        own = 1 / (1 + factor.square().sum(-1))
        std = scale(raw, self.init_scale)
        factor = factor * (std * own.sqrt()).unsqueeze(-1)
        return reshaped(dist.LowRankMultivariateNormal(loc, factor, std.square() * own), event_shape)


def _cosines(n: int, rank: int, like: Tensor) -> Tensor:
    """Return orthogonal columns of cosines, of frequencies 0 to rank - 1."""
    rows, columns = (torch.arange(count, dtype=like.dtype, device=like.device) for count in (n, rank))
    return START * (math.pi / n * (rows.unsqueeze(-1) + 0.5) * columns).cos()


register(
    "family",
    "low_rank_normal",
    LowRankNormal,
    aliases=("low_rank", "lowrank_multivariate_normal"),
    summary="normals correlated by a few factors",
    source="Ong, Nott & Smith 2018",
)
