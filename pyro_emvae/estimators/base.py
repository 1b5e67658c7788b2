r"""The contract of an estimator: how the gradient of an expectation over one site's draws is taken."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

from .._checks import EstimatorError, fail
from .._distributions import base_of as base
from .._registry import Traits, entries, lookup
from ..objectives import Bound
from ..particles import Particles

__all__ = [
    "Control",
    "Draw",
    "Estimator",
    "Probed",
    "SiteTerms",
    "Situation",
    "State",
    "base",
    "exponential",
    "is_discrete",
    "is_point_mass",
    "misfit",
    "require_fit",
    "suggest",
]

State = dict[str, Tensor]


@dataclass(frozen=True)
class Situation:
    r"""Where an estimator would stand; what policies and checks decide by.

    Args:
        name: The guide's site.
        fn: Its distribution, expanded by the plates; with several particles its batch shape starts with them.
        num_particles: How many draws of the site there are that can be compared: K, or fewer for an objective with
            ``num_local_particles``.
        objective: The objective's name.
        infer: The site's annotations.
        upstream: The guide's other sites whose draws may move this site's distribution; None if not known.
        prior: The model's distribution at the site; None if not known.
        multi_sample: Whether the objective is one of several particles, no sum of terms.
        enumerable: Whether a sum over the site is asked for by its annotation, or was found to be right and cheap.
        integrable: Whether its KL was found to have a closed form, in place of what is drawn.
        sticks: Whether the direct score of its log q was found to be had by the arguments of its distribution.
        below: Whether its distribution depends on a site that is summed over.
        together: Whether all particles are drawn in one run, as estimators need that draw them together.
    """

    name: str
    fn: Any
    num_particles: int = 1
    objective: str = "elbo"
    infer: Mapping[str, Any] = field(default_factory=dict, repr=False)
    upstream: tuple[str, ...] | None = ()
    prior: Any = None
    multi_sample: bool = False
    enumerable: bool = False
    integrable: bool = False
    sticks: bool = False
    below: bool = False
    together: bool = True

    @property
    def objectives(self) -> set[str]:
        """The names by which the trait ``objectives`` may allow this objective."""
        return {self.objective, "any"} | ({"multi_sample"} if self.multi_sample else set())


@dataclass(frozen=True)
class Draw:
    r"""What an estimator drew in place of the distribution.

    Args:
        value: As ``fn.sample()`` would be; particles first. Each of them alone is distributed as `fn`, unless weighted.
        weight: Weights that sum to one over particles, ``(particles, *plates)``: a weighted mean over particles then
            estimates the expectation.
    """

    value: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class Probed:
    r"""What the guide downstream and the model said at further values of the site.

    Args:
        signal: The learning signal there, detached: ``(probes, particles?, *plates)``, nats.
        gradient: With the trait ``probes="differentiable"``, the derivative by the probed values of all terms of the
            signals, each counted once. With ``"twice"``, signal and gradient are not detached from `values`. With
            ``"draws"``, that by the drawn values, in their shape; `signal` and `values` are None.
        values: The probed values, as the leaf that these derivatives are by.
        inside: Whether all terms lie in the site's plates, so that an element's signal moves with its own value alone.
    """

    signal: Tensor | None = None
    gradient: Tensor | None = None
    values: Tensor | None = None
    inside: bool = False


@dataclass(frozen=True)
class Control:
    r"""A term whose gradient at fixed values has mean zero; its coefficient, per parameter, is learned.

    The coefficient is minus the lagged running covariance of the control's gradient with the rest's over its own
    second moment, for each parameter tensor, and so independent of the step's draws.

    Args:
        term: The term; summed, averaged over particles.
        low, high: Between which the coefficient stays.
        decay: Of the running moments, in [0, 1).

    Source: Geffner and Domke 2018, "Using large ensembles of control variates for variational inference", eq. 5, with
    one control and lagged moments.
    """

    term: Tensor
    low: float = -math.inf
    high: float = math.inf
    decay: float = 0.95


@dataclass(frozen=True)
class SiteTerms:
    r"""What an estimator sees of a guide site.

    Args:
        name: The site's name.
        fn: Its distribution.
        value: Its values.
        log_q: log q of the values given upstream ones, unscaled and unmasked: ``(particles?, *plates)``, nats.
        entropy: Minus log q with scale and mask, the site's own term of the ELBO; None if the objective integrates it.
        direct: Returns `entropy` at detached values, so that only the direct path is left; None where drawn values are
            cut from their paths, and `entropy` itself stands under both.
        runs: The same site of each run, if particles were run one by one.
        bound: The multi-sample objective per datum; None for a sum of terms such as the ELBO.
        weight: K times the weights of the particles, where an estimator drew weighted ones.
        probed: What was found at the estimator's `probes`; `probes` are those values.
        prior: The model's distribution at the site, None for an auxiliary site.
        particles: All sites of guide and model.
        noise: Uniform numbers in (0, 1), where an estimator asked for them.
    """

    name: str
    fn: Any
    value: Tensor
    log_q: Tensor
    entropy: Tensor | None
    direct: Callable[[], Tensor] | None = None
    runs: tuple = ()
    bound: Bound | None = None
    weight: Tensor | None = None
    probes: Tensor | None = None
    probed: Probed | None = None
    prior: Any = None
    particles: Particles | None = field(default=None, repr=False)
    noise: Tensor | None = None
    found: dict[str, tuple[Any, Any]] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: str, state: Any, make: Callable[[], Any]) -> Any:
        """Return ``make()``, which is called once for this evaluation and this state."""
        if key not in self.found or self.found[key][0] is not state:
            self.found[key] = (state, make())
        return self.found[key][1]


class Estimator(ABC):
    r"""How one site's part of the gradient of $E_q[f]$ is estimated; pure functions over an explicit state.

    A term under ``"value"`` is differentiated through the drawn values, one under ``"guide"`` through the guide's
    parameters at fixed values; most estimators return one tensor under both. Terms are summed over plates, averaged
    over particles, and *maximised*. A list of `Control` under ``"controls"`` is added with learned coefficients.
    """

    traits: ClassVar[Traits]
    reach: ClassVar[str] = "downstream"
    """Which terms the signal holds: those that the draw reaches (``"downstream"``); those, and what upstream draws
    reach (``"related"``), with which a baseline is exact at the posterior; or ``"all"``."""

    integrates: ClassVar[bool] = False
    """Whether the surrogate has the site's KL in closed form."""

    sticks: ClassVar[float | None] = None
    """The decay of the coefficients by which the direct score of log q is left out, in part; None if it is not."""

    def fits(self, at: Situation) -> str | None:
        """Return what stands against this estimator at a site, beyond its traits, as a clause; or None."""
        return None

    def draw(self, fn: Any, num_particles: int) -> Draw | None:
        """Draw all particles of the site together, where the trait ``draws`` is not ``"independent"``."""
        return None

    def weigh(self, fn: Any, value: Tensor) -> Tensor | None:
        """Return the weights that `draw` gives to these values, ``(particles, *plates)``; None if it gives none."""
        return None

    def joint(self, fn: Any, value: Tensor) -> Tensor | None:
        """Return the log probability that `draw` gives these rows of a finite site, by plate element, for proofs.

        None stands for independent rows.
        """
        return None

    def noise(self, site: SiteTerms) -> tuple[int, ...] | None:
        """Return the shape of the uniform numbers that `probes` and `surrogate` find in ``site.noise``, or None."""
        return None

    def probes(self, site: SiteTerms, rows: int, state: State) -> Tensor | None:
        """Return further values of the site, ``(probes, *value.shape)``, at which the model is run, or None."""
        return None

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


def misfit(estimator: Estimator, at: Situation) -> str | None:
    """Return the requirement that a site does not meet, as a clause, or None."""
    traits, fn = estimator.traits, at.fn
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
    if traits.support == "binary" and not isinstance(base(fn), Bernoulli):
        return "it needs a Bernoulli site"
    if traits.support == "categorical" and not isinstance(base(fn), Categorical | OneHotCategorical):
        return "it needs a Categorical or OneHotCategorical site"
    if at.num_particles < traits.min_particles:
        return f"it compares particles and needs at least {traits.min_particles}"
    if not at.objectives & set(traits.objectives):
        return f"it is made for the objective {' or '.join(map(repr, traits.objectives))}"
    if traits.draws in ("coupled", "weighted") and at.upstream:
        return f"particles drawn together need one distribution, and this one depends on the draw of {at.upstream[0]!r}"
    return estimator.fits(at)


def require_fit(estimator: Estimator, at: Situation) -> None:
    """Raise `EstimatorError` if the estimator cannot be used at this site; name one that can."""
    reason = misfit(estimator, at)
    if reason is None:
        return
    fn, traits = at.fn, estimator.traits
    got = f"{type(base(fn)).__name__}(batch_shape={tuple(fn.batch_shape)}) with has_rsample={fn.has_rsample}"
    if at.num_particles < traits.min_particles:
        got, fix = f"num_particles={at.num_particles}", f'Write num_particles={traits.min_particles}, or "score".'
    elif is_point_mass(fn):
        fix = f"Leave {at.name!r} out: name the auxiliary site that it is computed from."
    else:
        if not at.objectives & set(traits.objectives):
            got = f"objective={at.objective!r}"
        fix = suggest(at)
    fail(EstimatorError, type(estimator).__name__, f"differentiate site {at.name!r}", got=got, because=reason, fix=fix)


def suggest(at: Situation) -> str:
    """Name registered, unbiased estimators that fit the site, as a sentence."""
    names = [e.name for e in entries("estimator") if e.traits.unbiased and not e.traits.arguments]
    good = [n for n in names if n in _PREFERRED and misfit(_make(n), at) is None]
    return f"Use estimator={' or '.join(map(repr, sorted(good, key=_PREFERRED.index)[:2]))}.".replace("'", '"')


_PREFERRED = ("pathwise", "multi_sample_score", "vimco", "leave_one_out", "disarm", "score")


def _make(name: str) -> Estimator:
    return lookup("estimator", name).factory()


def exponential(like: Tensor) -> Tensor:
    """Draw standard exponential numbers of the shape of a tensor, none of them zero."""
    return -torch.log1p(-torch.rand_like(like)).clamp(max=-torch.finfo(like.dtype).tiny)


def is_point_mass(fn: Any) -> bool:
    """Whether a distribution has a single value (Pyro's ``Delta``)."""
    return type(base(fn)).__name__ == "Delta"


def is_discrete(fn: Any) -> bool:
    """Whether a distribution's support is discrete."""
    support = getattr(fn, "support", None)
    return bool(getattr(support, "is_discrete", False))
