r"""The contract of an estimator: how the gradient of an expectation over one site's draws is taken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .._checks import EstimatorError, fail
from .._registry import Traits

__all__ = ["Estimator", "SiteTerms", "State", "is_discrete", "is_point_mass", "misfit"]

State = dict[str, Tensor]


@dataclass(frozen=True)
class SiteTerms:
    r"""What an estimator sees of a guide site.

    Args:
        name: The site's name.
        fn: Its distribution.
        value: Its values.
        log_q: log q of the values given upstream ones, unscaled and unmasked: ``(particles?, *plates)``, nats.
        entropy: Minus log q with scale and mask, the site's own term of the ELBO; None if the objective integrates it.
    """

    name: str
    fn: Any
    value: Tensor
    log_q: Tensor
    entropy: Tensor | None
    runs: tuple = ()


class Estimator(ABC):
    r"""How one site's part of the gradient of $E_q[f]$ is estimated; pure functions over an explicit state.

    A term under ``"value"`` is differentiated through the drawn values, one under ``"guide"`` through the guide's
    parameters at fixed values; most estimators return one tensor under both. Terms are summed over plates, averaged
    over particles, and *maximised*.
    """

    traits: ClassVar[Traits]

    def init(self, site: SiteTerms, signal: Tensor | None) -> State:
        """Return the state before the first step: a dict of tensors."""
        return {}

    @abstractmethod
    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Tensor | None]:
        r"""Return the site's terms of the surrogate, by path.

        Args:
            site: The site.
            signal: The detached learning signal f, reduced to the site's plates: ``(particles?, *plates)``, nats;
                None unless ``traits.needs_signal``.
            rows: Number of particles.
            state: The state before this step.
        """

    def update(self, site: SiteTerms, signal: Tensor | None, state: State) -> State:
        """Return the state after this step; it is used from the next step on."""
        return state


def misfit(estimator: Estimator, fn: Any, num_particles: int) -> str | None:
    """Return the requirement that a site's distribution or the number of particles does not meet, or None."""
    traits = estimator.traits
    if traits.needs_rsample and not fn.has_rsample:
        return "the pathwise gradient needs a reparameterised sampler"
    if traits.splits_paths and is_point_mass(fn):
        return "a point mass has no score of mean zero that could be left out"
    if not traits.needs_rsample and is_point_mass(fn):
        return "a point mass has no log density to differentiate"
    if traits.support == "discrete" and not is_discrete(fn):
        return "it needs a discrete site"
    if traits.support == "continuous" and is_discrete(fn):
        return "it needs a continuous site"
    if traits.support == "binary" and "Bernoulli" not in type(base(fn)).__name__:
        return "it needs a Bernoulli site"
    if num_particles < traits.min_particles:
        return f"it compares particles and needs at least {traits.min_particles}"
    return None


def require_fit(name: str, estimator: Estimator, fn: Any, num_particles: int) -> None:
    """Raise `EstimatorError` if the estimator cannot be used at this site."""
    reason = misfit(estimator, fn, num_particles)
    if reason is None:
        return
    got = f"{type(base(fn)).__name__}(batch_shape={tuple(fn.batch_shape)}) with has_rsample={fn.has_rsample}"
    if num_particles < estimator.traits.min_particles:
        got, fix = (
            f"num_particles={num_particles}",
            f'Write num_particles={estimator.traits.min_particles}, or "score".',
        )
    elif is_point_mass(fn):
        fix = f"Leave {name!r} out: name the auxiliary site that it is computed from."
    elif estimator.traits.needs_rsample:
        fix = 'Use estimator="leave_one_out" or "score".'
    else:
        fix = 'Use estimator="auto".'
    fail(
        EstimatorError,
        type(estimator).__name__,
        f"differentiate site {name!r}",
        got=got,
        because=reason,
        fix=fix,
    )


def base(fn: Any) -> Any:
    """Return the distribution inside ``Independent``, ``expand`` and ``mask`` wrappers."""
    while hasattr(fn, "base_dist") and not hasattr(fn, "transforms"):
        fn = fn.base_dist
    return fn


def is_point_mass(fn: Any) -> bool:
    """Whether a distribution has a single value (Pyro's ``Delta``)."""
    return type(base(fn)).__name__ == "Delta"


def is_discrete(fn: Any) -> bool:
    """Whether a distribution's support is discrete."""
    support = getattr(fn, "support", None)
    return bool(getattr(support, "is_discrete", False))
