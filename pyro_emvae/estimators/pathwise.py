r"""The pathwise (reparameterised) gradient, and what to do with the entropy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from .._registry import Traits, register
from .base import Estimator, SiteTerms, State

__all__ = ["Full", "Pathwise", "StickTheLanding"]

TRAITS = Traits(needs_rsample=True, higher_order=True, needs_signal=False, auto=10, objectives=("any",))


class Entropy(ABC):
    """Which paths of the site's own -log q are followed."""

    splits_paths: ClassVar[bool] = False

    @abstractmethod
    def terms(self, entropy: Tensor | None) -> dict[str, Tensor | None]:
        """Return the term under each path."""


@dataclass(frozen=True)
class Full(Entropy):
    r"""Follow $-\log q_\phi(z_\phi)$ through the value and directly, as Pyro does."""

    def terms(self, entropy: Tensor | None) -> dict[str, Tensor | None]:
        return {"value": entropy, "guide": entropy}


@dataclass(frozen=True)
class StickTheLanding(Entropy):
    r"""Follow $-\log q_\phi(z_\phi)$ through the value only: the direct score has mean zero and is left out.

    The variance vanishes where q is the posterior; far from it, it can be larger than `Full`'s by orders of magnitude.
    Values are cut from their draws, so that the value of an upstream site, on which a later site's density depends,
    keeps its path (detaching the distribution's parameters instead is biased in a hierarchical guide).

    Source: Roeder, Wu and Duvenaud 2017, "Sticking the landing", eq. 6. Differs: paths are split by cutting values,
    not parameters, so the guide runs once and dropout in it stays the same.
    """

    splits_paths: ClassVar[bool] = True

    def terms(self, entropy: Tensor | None) -> dict[str, Tensor | None]:
        return {"value": entropy, "guide": None}


@dataclass(frozen=True)
class Pathwise(Estimator):
    r"""Reparameterised gradient.

    $$\hat g=\tfrac1K\sum_k\nabla_\phi\big[\log p(x,z_\phi(\epsilon_k))-\log q_\phi(z_\phi(\epsilon_k))\big].$$

    When to use: wherever the site has ``rsample`` and log p is differentiable and smooth. Unbiased. Cost: K model and
    guide runs, one backward.

    Args:
        entropy: `Full` (default) or `StickTheLanding`.

    Source: Kingma and Welling 2013, eq. 6; Rezende, Mohamed and Wierstra 2014; implicit gradients of torch's samplers:
    Figurnov, Mohamed and Mnih 2018.

    Example:
        >>> Pathwise().traits.needs_rsample
        True
    """

    entropy: Entropy = Full()

    @property
    def traits(self) -> Traits:  # type: ignore[override]
        split = self.entropy.splits_paths
        if not split:
            return TRAITS
        return replace(TRAITS, splits_paths=True, higher_order=False, auto=None, objectives=("elbo",))

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Tensor | None]:
        return self.entropy.terms(site.entropy)


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
