r"""The doubly reparameterised gradient of objectives of several particles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._pyro import scale_and_mask
from .._registry import Traits, register
from .base import Estimator, SiteTerms, State
from .vimco import direct

__all__ = ["DReG"]


@dataclass(frozen=True)
class DReG(Estimator):
    r"""Doubly reparameterised gradient: other weights through the values, and no direct score of log q.

    $$\hat g_\phi=\sum_k(\partial_kh-\partial_k^2h)\,\nabla_z\ell_k\,\nabla_\phi z_k,\qquad
      \hat g_\theta=\sum_k\partial_kh\,\nabla_\theta\log p_\theta(x,z_k).$$

    For IWAE, with normalised weights v, the first factor is $v_k^2$ and the second $v_k$; for `Renyi` the first is
    $\alpha v_k+(1-\alpha)v_k^2$, for `Chi2` $v_k-2v_k^2$. Weights follow paths, not owners: theta, the direct
    dependence of log p, has the plain ones.

    When to use: near the posterior, where it vanishes, and for many particles: its signal-to-noise ratio grows with
    $\sqrt K$, that of the plain gradient falls. Far from the posterior it can be the noisier one, as
    `StickTheLanding`, which it is for K = 1. Unbiased. Cost: as `Pathwise`.

    Sites may differ: each is carried back with the factors of its own estimator, through whatever is downstream of it.
    A site with a score-function gradient has to be upstream. A global latent above ``num_local_particles`` enters
    through a mean over its draws; there it is `StickTheLanding`, and its local sites are doubly reparameterised given
    it.

    The factors stand for a direct score $-\partial_kh\,\nabla_\phi\log q$. A scale s of the user's, or a mask, leaves
    only a part s of that in the weights (0 where masked), and $(1-s)\,\partial_kh\,\nabla_\phi\log q$ is added.

    Raises:
        EstimatorError: A site that is differentiated by its score depends on this one.

    Source: Tucker, Lawson, Gu and Maddison 2019, "Doubly reparameterized gradient estimators"; the general
    h is derived as they do. Differs: paths are split by cutting values, so that the guide runs once.

    Example:
        >>> DReG().traits.objectives
        ('multi_sample',)
    """

    traits: ClassVar[Traits] = Traits(
        needs_rsample=True, needs_signal=False, doubly=True, splits_paths=True, objectives=("multi_sample",)
    )

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Any]:
        within = None if site.name in site.bound.above else _within(site)
        missing = None if within is None else (1 - within) * direct(site.bound) * site.log_q
        return {"value": site.entropy, "guide": missing}


def _within(site: SiteTerms) -> Tensor | None:
    """Return by what log q is multiplied in the log weights, in the shape of log q; None if by one."""
    own = site.particles.guide[site.name]
    plates = math.prod((frame.full_size or frame.size) / frame.size for frame in own.frames)
    if (
        isinstance(own.scale, float | int)
        and math.isclose(own.scale, plates)
        and (own.mask is None or own.mask is True)
    ):
        return None
    return scale_and_mask(torch.ones_like(site.log_q), own.scale, own.mask) / plates


register(
    "estimator",
    "dreg",
    DReG,
    aliases=("doubly_reparameterised", "doubly_reparameterized"),
    summary="several particles: doubly reparameterised gradient",
    source="Tucker et al. 2019",
)
