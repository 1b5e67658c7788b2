r"""The pathwise (reparameterised) gradient, and what to do with the entropy."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor
from torch.distributions import kl_divergence

from .._checks import EstimatorError, fail
from .._registry import Traits, register
from .base import Control, Draw, Estimator, SiteTerms, Situation, State
from .draws import Antithetic, Draws, Independent, Sobol

__all__ = ["AdaptiveSticking", "Analytic", "Full", "Pathwise", "StickTheLanding"]

TRAITS = Traits(needs_rsample=True, higher_order=True, needs_signal=False, auto=10, objectives=("any",))


class Entropy(ABC):
    """Which paths of the site's own -log q are followed."""

    traits: ClassVar[dict[str, Any]] = {}
    integrates: ClassVar[bool] = False

    @abstractmethod
    def terms(self, site: SiteTerms) -> dict[str, Any]:
        """Return the term under each path."""


@dataclass(frozen=True)
class Full(Entropy):
    r"""Follow $-\log q_\phi(z_\phi)$ through the value and directly, as Pyro does."""

    def terms(self, site: SiteTerms) -> dict[str, Any]:
        return {"value": site.entropy, "guide": site.entropy}


@dataclass(frozen=True)
class StickTheLanding(Entropy):
    r"""Follow $-\log q_\phi(z_\phi)$ through the value only: the direct score has mean zero and is left out.

    The variance vanishes where q is the posterior; far from it, it can be larger than `Full`'s by orders of magnitude.
    Where a site has draws upstream, values are cut from their draws, so that an upstream value, on which the site's
    density depends, keeps its path (detaching the distribution's parameters instead leaves out the score by it too, and
    the variance is then not zero at the posterior); else the direct score is taken off by log q at the detached value.

    Source: Roeder, Wu and Duvenaud 2017, "Sticking the landing", eq. 6. Differs: no parameter is detached, so the guide
    runs once and dropout in it stays the same.
    """

    traits: ClassVar[dict[str, Any]] = {"splits_paths": True, "higher_order": False, "objectives": ("elbo",)}

    def terms(self, site: SiteTerms) -> dict[str, Any]:
        if site.direct is None or site.entropy is None:
            return {"value": site.entropy, "guide": None}
        return {"guide": site.entropy - site.direct()}


@dataclass(frozen=True)
class AdaptiveSticking(Entropy):
    r"""Leave out as much of the direct score as pays: between `Full` (a = 0) and `StickTheLanding` (a = 1), and beyond.

    $$\hat g=\hat g_\mathrm{full}+a\,\nabla_\phi\log q_\phi(z),$$

    with $a\ge0$ by lagged running covariances, so that the gradient stays unbiased; 0 in the first 16 steps. Where q is
    the posterior it ties `StickTheLanding`, whose variance is zero, and far from it it is no worse than `Full` but for
    the noise of a.

    Where no draw is upstream and the distribution is one of ``sticking.ARGUMENTS``, there is one a per argument $\eta$
    (``loc``, ``scale``), and the control is $a\,\nabla_\eta\log q(z;\eta)$, which goes on to the parameters together
    with the rest: it costs no second pass through the guide. Elsewhere there is one a per parameter tensor, for one
    more backward pass; see `Control`.

    Args:
        decay: Of the running covariances.

    Second derivatives of ``differentiable_loss`` are right at the former sites, where the control is left out of it.

    Source: Geffner and Domke 2018, "Using large ensembles of control variates for variational inference", for the
    coefficient; Roeder et al. 2017 for the control. Differs: coefficients of arguments, not of parameters.
    """

    decay: float = 0.98
    traits: ClassVar[dict[str, Any]] = {
        "splits_paths": True,
        "higher_order": False,
        "objectives": ("elbo",),
        "controls": True,
        "stateful": True,
    }

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            fail(
                EstimatorError,
                "AdaptiveSticking",
                "average covariances",
                got=f"decay={self.decay}",
                because="the decay lies in [0, 1)",
                fix="Write decay=0.98.",
            )

    def terms(self, site: SiteTerms) -> dict[str, Any]:
        paths = {"value": site.entropy, "guide": site.entropy}
        if site.entropy is None:
            return paths
        score = -(site.entropy if site.direct is None else site.direct())
        return paths | {"controls": {"score": Control(score, 0.0, decay=self.decay)}}


@dataclass(frozen=True)
class Analytic(Entropy):
    r"""Integrate $-\mathrm{KL}(q\|p)$ of the site, given upstream draws, in closed form; see `objectives.ELBO`.

    It is the gradient's: the value that is reported stays what ``objective=`` says. The variance is mostly smaller than
    `Full`'s; it is larger where the prior's noise would cancel the likelihood's, as near the posterior.

    Raises:
        EmvaeError: If the latents of model and guide come in different orders, or their scales or masks differ.
        EstimatorError: If torch has no closed form of guide and prior. At a site that was left to ``"auto"`` none of
            these is raised, and the KL is drawn.

    Source: Kingma and Welling 2013, eq. 7 (SGVB B).
    """

    traits: ClassVar[dict[str, Any]] = {"objectives": ("elbo",)}
    integrates: ClassVar[bool] = True

    def terms(self, site: SiteTerms) -> dict[str, Any]:
        return {"value": site.entropy, "guide": site.entropy}  # None where the KL is integrated, and not drawn


@dataclass(frozen=True)
class Pathwise(Estimator):
    r"""Reparameterised gradient.

    $$\hat g=\tfrac1K\sum_k\nabla_\phi\big[\log p(x,z_\phi(\epsilon_k))-\log q_\phi(z_\phi(\epsilon_k))\big].$$

    When to use: wherever the site has ``rsample`` and log p is differentiable and smooth. Unbiased, if the
    sampler's own path is (Pyro's ``MixtureOfDiagNormals`` and ``MixtureOfDiagNormalsSharedCovariance`` have a wrong one
    by the component logits, unless the smallest scale is 1 in every dim). Cost: K model and guide runs, one backward.

    Args:
        entropy: `Full` (default), `StickTheLanding`, `AdaptiveSticking` or `Analytic`.
        draws: `Independent` (default), `Antithetic` or `Sobol`.

    Source: Kingma and Welling 2013, eq. 6; Rezende, Mohamed and Wierstra 2014; implicit gradients of torch's samplers:
    Figurnov, Mohamed and Mnih 2018.

    Example:
        >>> Pathwise().traits.needs_rsample
        True
    """

    entropy: Entropy = Full()
    draws: Draws = field(default_factory=Independent)

    @functools.cached_property
    def traits(self) -> Traits:  # type: ignore[override]
        draws: dict[str, Any] = {"draws": self.draws.kind, "min_particles": self.draws.min_particles}
        if self.draws != Independent():  # several particles of one noise have another objective than independent ones
            draws["objectives"] = ("elbo",)
        plain = self.entropy == Full() and self.draws == Independent()
        return replace(TRAITS, auto=TRAITS.auto if plain else None, **(draws | self.entropy.traits))

    @property
    def integrates(self) -> bool:  # type: ignore[override]
        return self.entropy.integrates

    @property
    def sticks(self) -> float | None:  # type: ignore[override]
        return self.entropy.decay if isinstance(self.entropy, AdaptiveSticking) else None

    def fits(self, at: Situation) -> str | None:
        if self.integrates and at.prior is not None and not _has_kl(at.fn, at.prior):
            return "torch.distributions.kl_divergence knows no closed form of guide and prior"
        return self.draws.fits(at.fn)

    def draw(self, fn: Any, num_particles: int) -> Draw | None:
        return self.draws(fn, num_particles)

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Any]:
        return self.entropy.terms(site)


def _has_kl(one: Any, two: Any) -> bool:
    try:
        kl_divergence(one, two)
    except NotImplementedError:
        return False
    return True


register(
    "estimator",
    "pathwise",
    Pathwise,
    TRAITS,
    aliases=("reparam", "reparameterized", "reparameterised"),
    summary="reparameterised gradient",
    source="Kingma & Welling 2013",
)
register(
    "estimator",
    "sticking_the_landing",
    lambda: Pathwise(entropy=StickTheLanding()),
    Pathwise(entropy=StickTheLanding()).traits,
    aliases=("stl",),
    summary="reparameterised gradient without the direct score of log q",
    source="Roeder et al. 2017",
)
register(
    "estimator",
    "adaptive_sticking",
    lambda: Pathwise(entropy=AdaptiveSticking()),
    Pathwise(entropy=AdaptiveSticking()).traits,
    summary="reparameterised gradient without as much of the direct score as pays",
    source="Geffner & Domke 2018",
)
register(
    "estimator",
    "analytic_kl",
    lambda: Pathwise(entropy=Analytic()),
    Pathwise(entropy=Analytic()).traits,
    summary="reparameterised gradient, the site's KL in closed form",
    source="Kingma & Welling 2013, eq. 7",
)
register(
    "estimator",
    "antithetic",
    lambda: Pathwise(draws=Antithetic()),
    Pathwise(draws=Antithetic()).traits,
    summary="reparameterised gradient with mirrored pairs of particles",
    source="Wu et al. 2019",
)
register(
    "estimator",
    "quasi_monte_carlo",
    lambda: Pathwise(draws=Sobol()),
    Pathwise(draws=Sobol()).traits,
    aliases=("qmc", "sobol"),
    summary="reparameterised gradient with particles that fill the space evenly",
    source="Buchholz et al. 2018",
)
