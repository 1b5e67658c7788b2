r"""Which estimator each site of a guide gets, and why; what was found out about a pair of model and guide."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ._registry import create
from .choosing import PROBE, best
from .estimators.base import Estimator, Situation, base, is_point_mass, require_fit
from .estimators.draws import Independent
from .estimators.pathwise import Analytic, Full, Pathwise
from .estimators.policies import POLICIES, candidates, from_user
from .objectives import MultiSample, Objective
from .particles import Dependence, Particles, Site, is_annotated, num_outcomes
from .probing import price
from .sticking import arguments_of
from .surrogate import States

__all__ = ["KEPT", "Plan", "Resolution", "Resolver", "follows", "remember"]

Frames = Collection | Callable[[], Collection] | None

KEPT = "the least E|g|^2 times cost of its trials"


@dataclass(frozen=True)
class Resolution:
    """One row of the resolved table: the site, its estimator and why it was chosen; its cost; for what kind of site.

    The cost is the number of model evaluations of one gradient: particles, times the outcomes that are summed over, or
    times one more than the further values that the estimator looks at (`probing.price`).
    """

    site: str
    estimator: Estimator
    why: str
    kind: tuple = field(default=(), repr=False)
    cost: int = 1


@dataclass
class Plan:
    """What was found out about one pair of model and guide."""

    vectorize: bool
    nesting: int | None
    splits: bool
    sites: tuple = ()
    depends: Dependence | None = None
    uses: int = 0
    probes: tuple[bool, int] | None = None
    relaxed: dict[str, tuple[Situation, Estimator]] = field(default_factory=dict)
    followed: set[str] = field(default_factory=set)
    halfway: set[str] = field(default_factory=set)
    alone: set[str] = field(default_factory=set)
    shortcut: dict[str, bool] = field(default_factory=dict)
    arguments: set[str] = field(default_factory=set)
    undecided: bool = False
    seen: set[tuple[str, bool]] = field(default_factory=set)

    def look_again(self, reached: Dependence) -> bool:
        """Add what draws were found to reach now; return whether there is anything new."""
        new = {name: found for name, found in reached.items() if not found <= self.depends.get(name, frozenset())}
        self.depends.update({name: self.depends.get(name, frozenset()) | found for name, found in new.items()})
        return bool(new)


class Resolver:
    """The estimator of each guide site, by what was asked for: for a site, in the guide, or for the whole loss.

    Args:
        estimator: A name, an instance, a policy, or a mapping from site to one of these.
        annotations: Whether ``infer={"estimator": ...}`` is obeyed.
        num_particles: K.
        objective: The objective.
    """

    def __init__(self, estimator: Any, annotations: bool, num_particles: int, objective: Objective) -> None:
        mapping = estimator if isinstance(estimator, Mapping) else {}
        self.by_site = {name: from_user(given) for name, given in mapping.items()}
        self.policy = POLICIES["auto"] if isinstance(estimator, Mapping) else from_user(estimator)
        self.annotations, self.num_particles, self.objective = annotations, num_particles, objective
        self.forget()

    def forget(self) -> None:
        """Know nothing of any model."""
        self.table: dict[str, Resolution] = {}
        self.summable: dict[str, bool] = {}
        self.integrable: dict[str, bool] = {}
        self.sticks: dict[str, bool] = {}
        self.looks: dict[str, int] = {}
        self.tried: dict[str, tuple[str, ...]] = {}

    def fresh(self) -> Resolver:
        """Return one that was asked for the same and knows nothing."""
        new = copy.copy(self)
        new.forget()
        return new

    def rows(self, particles: Particles) -> list[tuple[Site, Estimator]]:
        """Return the sites of a run that have an estimator, with it; a value that was given has no path."""
        found = [(site, self.table[name].estimator) for name, site in particles.guide.items() if name in self.table]
        return [
            (site, estimator) for site, estimator in found if not (site.is_observed and estimator.traits.needs_rsample)
        ]

    def account(self, rows: list[tuple[Site, Estimator]], counts: Mapping[str, int]) -> int:
        """Note what further values cost each site; return by how many times they make an evaluation dearer."""
        prices = {site.name: counts[site.name] * price(e) for site, e in rows if site.name in counts}
        for name, further in prices.items():
            self.table[name] = replace(self.table[name], cost=self.num_particles * (1 + further))
        return 1 + sum(prices.values())

    def resolve(
        self, name: str, fn: Any, infer: Mapping[str, Any], plan: Plan | None, frames: Frames, state: States
    ) -> tuple[Estimator, States]:
        """Return the estimator of a guide site, chosen and checked for each new kind of distribution, and the state.

        Plates may be a function that returns them, since they are looked at only then.

        Another guide may have something else at a site of this name, which then starts without a state.
        """
        row = self.table.get(name)
        kind = (type(base(fn)), fn.has_rsample, (infer or {}).get("estimator"), _is_below(fn, plan))
        if row is None or row.kind != kind:
            at = self.situation(name, fn, infer or {}, plan, frames)
            estimator, why = self._choose(at, state)
            new = Resolution(name, estimator, why if estimator.traits.unbiased else f"{why}; biased", kind)
            new = replace(new, cost=self.num_particles * _outcomes(new.estimator, fn))
            require_fit(new.estimator, at)
            self.table[name] = new
            if row is not None and row.kind:  # else it is chosen anew, or its state was loaded
                state = {site: tensors for site, tensors in state.items() if site != name}
            row = new
        return row.estimator, state

    def situation(self, name: str, fn: Any, infer: Mapping, plan: Plan | None, frames: Frames) -> Situation:
        frames = frames() if callable(frames) else frames
        depends = None if plan is None else plan.depends
        return Situation(
            name,
            fn,
            self._compared(frames),
            self.objective.name,
            infer,
            None if depends is None else depends.upstream(name),
            multi_sample=isinstance(self.objective, MultiSample),
            enumerable=is_annotated(infer) or self.summable.get(name, False),
            integrable=self.integrable.get(name, False),
            sticks=self.sticks.get(name, False) and bool(arguments_of(fn)) and not _is_below(fn, plan),
            together=plan is None or plan.vectorize,
            below=_is_below(fn, plan),
        )

    def _compared(self, frames: Collection | None) -> int:
        """Return how many draws of a guide's site are compared: those of one group, or one of each group."""
        size = getattr(self.objective, "num_local_particles", None)
        if size is None or frames is None:
            return self.num_particles
        return self.num_particles // size if self.objective.is_above(frames) else size

    def spec(self, name: str, infer: Mapping[str, Any]) -> tuple[Any, str]:
        """Return what was asked for at a site: an estimator or a policy; and where."""
        if name in self.by_site:
            return self.by_site[name], "named for this site"
        if self.annotations and "estimator" in infer:
            return from_user(infer["estimator"]), "annotated in the guide"
        return self.policy, "named for the whole loss"

    def is_chosen(self, site: Site) -> bool:
        """Whether the estimator of a guide's site was left to ``"auto"`` or ``"probe"``."""
        return self.spec(site.name, site.infer)[0] in (POLICIES["auto"], POLICIES["probe"])

    def _choose(self, at: Situation, state: States) -> tuple[Estimator, str]:
        spec, why = self.spec(at.name, at.infer)
        if spec is POLICIES["probe"]:
            self.tried[at.name] = candidates(at)
            kept = best(state[PROBE], at.name, self.tried[at.name]) if PROBE in state else None
            if kept is not None:
                return create("estimator", kept), KEPT
        if spec is self.policy and isinstance(spec, Estimator) and is_point_mass(at.fn):
            return Pathwise(), "deterministic"
        return (spec, why) if isinstance(spec, Estimator) else spec(at)


def _outcomes(estimator: Estimator, fn: Any) -> int:
    return (num_outcomes(fn) or 1) if estimator.traits.draws == "enumerated" else 1


def _is_below(fn: Any, plan: Plan | None) -> bool:
    """Whether a distribution depends on a site that is summed over: it has a batch dim left of the plates."""
    return plan is not None and plan.nesting is not None and len(fn.batch_shape) > plan.nesting + plan.vectorize


def follows(estimator: Estimator) -> bool:
    """Whether a site can be downstream of one that is summed over."""
    plain = type(estimator) is Pathwise and estimator.draws == Independent()
    return (plain and isinstance(estimator.entropy, Full | Analytic)) or estimator.traits.draws == "enumerated"


def remember(cache: dict, key: Any, value: Any, limit: int = 16) -> None:
    """Add to a cache and let go of the oldest: callables that are wrapped anew in each step must not pile up."""
    while len(cache) >= limit:
        cache.pop(next(iter(cache)))
    cache[key] = value
