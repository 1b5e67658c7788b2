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
from .closed_forms import has_closed_form, loses_derivatives

__all__ = ["ELBO", "alike", "integrable"]


@dataclass(frozen=True)
class ELBO(Objective):
    r"""The evidence lower bound

    $$L=E_q[\log p(x,z)-\log q(z)]\le\log p(x).$$

    Args:
        kl: ``"sampled"`` uses the draws for all terms. ``"analytic"`` replaces log p - log q of a latent by
            $-\mathrm{KL}(q\|p)$, given upstream draws, wherever torch has the pair registered; the other latents
            stay sampled. Left out are pairs whose derivatives torch drops: Wishart, and transforms that are equal now
            and have parameters of their own.

    The objective says what value is reported. The gradient is its estimators' affair: `estimators.Analytic` at a site
    integrates the KL there in the gradient, and the value stays sampled.

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

    def terms(self, particles: Any) -> list[Term]:
        return summands(particles, self._analytic(particles, None) if self.kl == "analytic" else {})

    def integrated(self, terms: list[Term], particles: Any, names: Collection[str]) -> list[Term]:
        if self.kl == "analytic":
            return terms
        divergences = self._analytic(particles, names)
        new = [Term(name, "kl", particles.guide[name].frames, -kl) for name, kl in divergences.items()]
        return new + [term for term in terms if term.site not in divergences]

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


def integrable(particles: Any) -> set[str]:
    r"""Return the guide's sites whose $\mathrm{KL}(q\|p)$ can be had in closed form and is right.

    They are latents of guide and model, in the same order in both, of one shape; torch has the pair, which is one of
    those that are finite and that it has right (`has_closed_form`); and scales and masks are numbers, which `alike`
    compares in each evaluation, or one tensor in both. No value of a tensor is looked at and nothing computed, so that
    the answer is the same at all parameters, in a run that is resumed, and in a recording.
    """
    return set(alike(particles, particles.guide, numbers=True))


def alike(particles: Any, names: Collection[str], numbers: bool = False) -> list[str]:
    """Return the sites among `names` whose KL stands, in these particles, for what is sampled.

    Args:
        particles: The particles.
        names: Names of guide sites.
        numbers: Whether scales and masks that are numbers may differ: a model may change them from step to step.
    """
    latents = particles.latents
    shared = [name for name in particles.guide if name in latents]
    summed = particles.enumerated or any("summed_out" in site.infer for site in particles.model.values())
    if summed or particles.weights or shared != [name for name in latents if name in particles.guide]:
        return []
    sites = [(name, particles.guide[name], latents[name]) for name in shared if name in names]
    return [name for name, q, p in sites if not q.is_observed and _stands(q, p, numbers)]


def _stands(q: Any, p: Any, numbers: bool) -> bool:
    """Whether the KL of one site stands for what is sampled."""
    if not (_matches(q.scale, p.scale, numbers) and _matches(q.mask, p.mask, numbers)):
        return False
    priors = {id(one): two for one, two in zip(q.runs, p.runs, strict=True)}
    pairs = [(run, priors[id(run)].fn) for run in q.runs] or [(q, p.fn)]
    return all(
        run.log_prob.shape == run.fn.batch_shape == prior.batch_shape
        and run.fn.event_shape == prior.event_shape
        and has_closed_form(run.fn, prior)
        for run, prior in pairs
    )


def _matches(one: Any, two: Any, numbers: bool) -> bool:
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        return isinstance(one, Tensor) and isinstance(two, Tensor) and one.shape == two.shape and _is_same(one, two)
    return numbers or one is two or one == two


def _kl(q: Any, p: Any) -> Tensor:
    if not q.runs:
        if loses_derivatives(q.fn, p.fn):
            raise NotImplementedError
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
