r"""Normals with any correlations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from .._registry import Traits, register
from ._charts import Chart, vector_chart
from ._maps import check_setting, raw_scale, scale, unlimited
from ._normals import VectorNormal, loading, reshaped

__all__ = ["FullRankNormal"]


@dataclass(frozen=True)
class FullRankNormal(VectorNormal):
    r"""Normals with any covariance.

    $$q(z\mid c)=N\big(z\mid a,\ LL^\top\big),\qquad
    L_{i\cdot}=s_i\,\frac{(w_{i1},\dots,w_{i,i-1},1,0,\dots)}{\sqrt{1+\sum_{j<i}w_{ij}^2}},$$

    so that the $s_i$ are the marginal standard deviations, and w is about the correlations alone. The context holds a,
    then s as in `Normal`, then w by rows. At context zero: independent, with the initial scale.

    When to use: few dimensions, correlated. Cost: n (n + 3) / 2 numbers of context, and a triangular solve.

    Numerics: L is a Cholesky factor by construction, so that nothing is decomposed. Entries of w stay below 54 in
    float32 and 8192 in float64, that is, correlations of two coordinates below 1 - 2e-4 and 1 - 7e-9.

    Args:
        init_scale: The standard deviations at context zero.

    Shape: context ``(*batch, n (n + 3) / 2)`` -> batch shape ``batch``, event shape of n entries.

    Source: Kucukelbir et al. 2017, "Automatic differentiation variational inference", section 2.4. Differs: rows of L
    are scaled to marginal standard deviations.

    Example:
        >>> context = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.75])
        >>> fn = FullRankNormal().distribution(context, torch.Size([2]))
        >>> [[round(v, 4) for v in row] for row in fn.covariance_matrix.tolist()]
        [[1.0, 0.6], [0.6, 1.0]]
    """

    init_scale: float = 1.0
    traits: ClassVar[Traits] = Traits(support="continuous")

    def __post_init__(self) -> None:
        check_setting(self, "init_scale")

    def num_features(self, event_shape: torch.Size) -> int:
        n = math.prod(event_shape)
        return n * (n + 3) // 2

    def distribution(self, context: Tensor, event_shape: torch.Size) -> Any:
        loc, tril = self._moments(context, math.prod(event_shape))
        return reshaped(dist.MultivariateNormal(loc, scale_tril=tril), event_shape)

    def _moments(self, context: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Return the mean ``(*batch, n)`` and the Cholesky factor of the covariance."""
        loc, raw, below = context.split([n, n, n * (n - 1) // 2], -1)
        rows = _unit_lower(loading(below), n)
        length = rows.square().sum(-1, keepdim=True).sqrt()
        return loc, scale(raw, self.init_scale).unsqueeze(-1) * rows / length

    def chart(self, context: Tensor, event_shape: torch.Size) -> Chart:
        n = math.prod(event_shape)
        i, j = torch.tril_indices(n, n, -1, device=context.device)

        def back(loc: Tensor, tril: Tensor) -> Tensor:
            std, ratio = tril.square().sum(-1).sqrt(), tril / tril.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
            below = unlimited(ratio[..., i, j], torch.finfo(tril.dtype).eps ** -0.25)
            return torch.cat([loc, raw_scale(std, self.init_scale), below], -1)

        return vector_chart(*self._moments(context, n), event_shape, back)


def _unit_lower(below: Tensor, n: int) -> Tensor:
    """Return lower triangular matrices with a unit diagonal and the given entries below it, by rows."""
    i, j = (torch.arange(n, device=below.device).reshape(shape) for shape in ((n, 1), (1, n)))
    last = below.shape[-1]
    place = torch.where(j < i, i * (i - 1) // 2 + j, torch.where(j == i, last + 1, last))
    zero, one = (below.new_full((*below.shape[:-1], 1), value) for value in (0.0, 1.0))
    return torch.cat([below, zero, one], -1)[..., place]


register(
    "family",
    "full_rank_normal",
    FullRankNormal,
    aliases=("full_rank", "multivariate_normal"),
    summary="normals with any covariance",
    source="Kucukelbir et al. 2017",
)
