r"""The evidence lower bound."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions import is_validation_enabled
from torch import Tensor
from torch.distributions import kl_divergence

from .._checks import EmvaeError, fail
from .._pyro import scale_and_mask
from .._registry import register
from .base import Objective, Term, summands

__all__ = ["ELBO"]


@dataclass(frozen=True)
class ELBO(Objective):
    r"""The evidence lower bound

    $$L=E_q[\log p(x,z)-\log q(z)]\le\log p(x).$$

    Args:
        kl: ``"sampled"`` uses the draws for all terms. ``"analytic"`` replaces log p - log q of a latent by
            $-\mathrm{KL}(q\|p)$, given upstream draws, wherever torch has the pair registered; the other latents
            stay sampled.

    Raises:
        EmvaeError: With ``kl="analytic"`` if the latents of model and guide come in different orders (the KL given
            upstream draws is then not the conditional expectation), or their scales or masks differ.

    Source: Jordan et al. 1999; analytic KL: Kingma and Welling 2013, eq. 7 (SGVB B). Differs from Pyro's
    `TraceMeanField_ELBO`: sites without a registered pair or without ``rsample`` are allowed.

    Example:
        >>> ELBO().bounds
        'lower'
    """

    kl: str = "sampled"
    name: ClassVar[str] = "elbo"
    bounds: ClassVar[str] = "lower"

    def __post_init__(self) -> None:
        if self.kl not in ("sampled", "analytic"):
            fail(
                EmvaeError,
                "ELBO",
                "take the KL",
                got=f"kl={self.kl!r}",
                because="the KL is sampled or analytic",
                fix='Write kl="analytic".',
            )

    def terms(self, particles: Any, analytic: Collection[str] = ()) -> list[Term]:
        wanted = None if self.kl == "analytic" else analytic
        integrated = self._analytic(particles, wanted) if wanted is None or wanted else {}
        return summands(particles, integrated)

    def _analytic(self, particles: Any, wanted: Collection[str] | None) -> dict[str, Tensor]:
        shared = [name for name in particles.guide if name in particles.latents]
        order = [name for name in particles.latents if name in shared]
        if shared != order:
            fail(
                EmvaeError,
                "ELBO",
                "integrate the KL of each site",
                got=f"the order {shared} in the guide and {order} in the model",
                because="a KL given upstream draws needs the same order in both",
                fix='Reorder the guide, or write objective="elbo".',
            )
        result = {}
        for name in shared if wanted is None else [name for name in shared if name in wanted]:
            q, p = particles.guide[name], particles.model[name]
            if "summed_out" in p.infer:  # its prior is a mixture
                continue
            try:
                kl = _kl(q, p)
            except NotImplementedError:
                continue
            if not (_equal(q.scale, p.scale) and _equal(q.mask, p.mask)):
                fail(
                    EmvaeError,
                    "ELBO",
                    f"integrate the KL of site {name!r}",
                    got="a scale or mask that differs between model and guide",
                    because="the KL has one scale and one mask",
                    fix="Enter poutine.scale or the mask around the site in both.",
                )
            result[name] = _guarded(_guarded(scale_and_mask(kl, p.scale, p.mask), q.scale, p.scale), q.mask, p.mask)
        return result


def _kl(q: Any, p: Any) -> Tensor:
    if not q.runs:
        kl = kl_divergence(q.fn, p.fn)
        return kl if q.average is None else q.average(kl)
    priors = {id(one): two for one, two in zip(q.runs, p.runs, strict=True)}
    return q.each(lambda run: _kl(run, priors[id(run)]))


def _equal(one: Any, two: Any) -> bool:
    """Whether scales or masks are equal; without validation, as in a recording, see `_guarded` for tensors."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and (
            _is_same(one, two) or not is_validation_enabled() or bool((one == two).all())
        )
    return one is two or (not isinstance(one, Tensor) and not isinstance(two, Tensor) and one == two)


def _guarded(kl: Tensor, one: Any, two: Any) -> Tensor:
    """Return a KL that is NaN where scales or masks differ that were not compared."""
    if not (isinstance(one, Tensor) and isinstance(two, Tensor)) or is_validation_enabled() or _is_same(one, two):
        return kl
    return torch.where(one == two, kl, torch.nan)


def _is_same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are one memory in one layout, which tells without a look at the values."""
    return one is two or (one.data_ptr(), one.stride(), one.dtype) == (two.data_ptr(), two.stride(), two.dtype)


register("objective", "elbo", ELBO, summary="evidence lower bound", source="Jordan et al. 1999")
register(
    "objective",
    "elbo_analytic_kl",
    lambda: ELBO(kl="analytic"),
    summary="the ELBO with KL(q||p) in closed form where registered",
    source="Kingma & Welling 2013, eq. 7",
)
