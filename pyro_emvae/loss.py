r"""`MonteCarloELBO`: particles x objective x estimators, as a `pyro.infer.ELBO`."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from ._checks import EmvaeError, EstimatorError, NonFiniteError, fail, nearest, positive_int
from ._pyro import get_trace
from ._registry import create
from .choosing import PROBE, accounted, begin, best, due, learn, trial
from .estimators.base import Estimator, Probed, Situation, base, is_point_mass, misfit, require_fit
from .estimators.enumerated import Enumerated
from .estimators.pathwise import Pathwise
from .estimators.policies import POLICIES, candidates, from_user
from .estimators.relaxed import relaxed_run, require_paths, score_relaxed
from .objectives import Bound, MultiSample, Objective, Term
from .particles import (
    BUDGET,
    Dependence,
    ModuleWatch,
    Particles,
    Site,
    check_match,
    check_plates,
    choose_vectorize,
    dependence,
    draw,
    generators,
    is_annotated,
    num_outcomes,
    plates_of,
    quiet,
    summable,
)
from .probing import check_relaxed, differentiates, probe
from .surrogate import Composer, States, annealed, reweighted, total

__all__ = ["Evaluation", "MonteCarloELBO", "Resolution"]

logger = logging.getLogger("pyro_emvae")

KEPT = "the least E|g|^2 times cost of its trials"
REVISITED = (2, 8, 64, 512, 4096, 32768)


@dataclass(frozen=True)
class Resolution:
    """One row of the resolved table: the site, its estimator and why it was chosen; its cost; for what kind of site.

    The cost is the number of model evaluations of one gradient: particles, times the outcomes that are summed over, or
    times one more than the further values that the estimator looks at (known after the first gradient).
    """

    site: str
    estimator: Estimator
    why: str
    kind: tuple = field(default=(), repr=False)
    cost: int = 1


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: the objective, the surrogate whose gradient is the estimate, the particles, the next state."""

    objective: Tensor
    surrogate: Tensor = field(repr=False)
    particles: Particles = field(repr=False)
    state: States = field(repr=False)


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


class MonteCarloELBO(ELBO):
    r"""The ELBO with a gradient estimator per guide site; a drop-in loss for `pyro.infer.SVI`.

    $$\text{loss}=-\tfrac1K\sum_k\big[\log p(x,z_k)-\log q(z_k)\big],\quad z_k\sim q,$$

    and a gradient that each site's estimator contributes to: see `pyro_emvae.estimators`.

    Args:
        num_particles: K, draws per evaluation.
        max_plate_nesting: Number of plate dims; guessed if infinite.
        vectorize_particles: One run under a particle plate (True; raises if particles then differ from single runs),
            a loop (False), or None: at first use two particles are run both ways; if they disagree, it loops and
            warns once.
        estimator: ``"auto"`` (unbiased, the first that fits of `estimators.auto_table()`), ``"probe"`` (begins with
            that, tries all that fit within 5 % of the evaluations, and keeps the best), ``"pyro"`` (exactly
            `Trace_ELBO`'s rule), a registered name, an instance, or a mapping from guide site to one of these (sites
            that it does not name get ``"auto"``). A mapping wins over ``infer={"estimator": ...}`` at the guide's
            site, and that over a loss-wide choice.
        objective: A registered objective or an instance: ``"elbo"``, ``"iwae"``, ``objectives.Renyi(alpha)``,
            ``"chi2"``, ...; of `objectives.MultiSample`, K particles make up one value per datum.
        annotations: Whether ``infer={"estimator": ...}`` is obeyed.
        max_iarange_nesting, strict_enumeration_warning, ignore_jit_warnings, jit_options, retain_graph,
            tail_adaptive_beta: As in `pyro.infer.ELBO`.

    `evaluations` is the number of model evaluations of one gradient: particles, and further values that estimators
    look at.

    `loss`, `differentiable_loss` and `loss_and_grads` give the same number at the same seed. State of estimators (a
    decaying average) is kept here, in `state_dict`; only `loss_and_grads` changes it.

    Raises:
        EstimatorError: Unknown estimator or site; an estimator that does not fit its site; an annotation on a model
            site.
        ModelError: Sites of model and guide do not match.
        NonFiniteError: The objective is NaN or infinite; names the first site. Nothing has been changed then.

    Source: Wingate and Weber 2013; Ranganath et al. 2014; Schulman et al. 2015 for surrogates. Differs from
    `Trace_ELBO`: auxiliary guide sites count in the learning signal.

    Example:
        >>> MonteCarloELBO(num_particles=8).num_particles
        8
    """

    _get_trace = get_trace

    def __init__(
        self,
        num_particles: int = 1,
        max_plate_nesting: float = math.inf,
        max_iarange_nesting: float | None = None,
        vectorize_particles: bool | None = None,
        strict_enumeration_warning: bool = True,
        ignore_jit_warnings: bool = False,
        jit_options: dict | None = None,
        retain_graph: bool | None = None,
        tail_adaptive_beta: float = -1.0,
        *,
        estimator: Any = "auto",
        objective: str | Objective = "elbo",
        annotations: bool = True,
    ) -> None:
        positive_int("MonteCarloELBO", "num_particles", num_particles)
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            max_iarange_nesting=max_iarange_nesting,
            vectorize_particles=bool(vectorize_particles),
            strict_enumeration_warning=strict_enumeration_warning,
            ignore_jit_warnings=ignore_jit_warnings,
            jit_options=jit_options,
            retain_graph=retain_graph,
            tail_adaptive_beta=tail_adaptive_beta,
        )
        self.vectorize_particles = vectorize_particles
        nesting = max_plate_nesting if max_iarange_nesting is None else max_iarange_nesting
        self._nesting = None if math.isinf(nesting) else int(nesting)
        self.objective: Objective = create("objective", objective)
        self.objective.check(num_particles)
        self.estimator = estimator
        self.annotations = annotations
        mapping = estimator if isinstance(estimator, Mapping) else {}
        self._by_site = {name: from_user(spec) for name, spec in mapping.items()}
        self._policy = POLICIES["auto"] if isinstance(estimator, Mapping) else from_user(estimator)
        self._table: dict[str, Resolution] = {}
        self._summable: dict[str, bool] = {}
        self._tried: dict[str, tuple[str, ...]] = {}
        self._trials: dict[tuple, MonteCarloELBO] = {}
        self._plans: dict[tuple[Callable, Callable], Plan] = {}
        self.state: States = {}
        self.evaluations = num_particles

    def fresh(self) -> MonteCarloELBO:
        """Return a loss of the same options that has seen nothing: no resolved estimators, no state."""
        loss = copy.copy(self)
        loss._table, loss._plans, loss.state, loss._summable, loss._tried, loss._trials = {}, {}, {}, {}, {}, {}
        return loss

    # The estimators -------------------------------------------------------------------------------------------

    @property
    def resolved(self) -> dict[str, Estimator]:
        """The estimator in use at each guide site seen so far; can be given back as ``estimator=``."""
        return {name: row.estimator for name, row in self._table.items()}

    @property
    def table(self) -> tuple[Resolution, ...]:
        """The resolved table: site, estimator, why, cost."""
        return tuple(self._table.values())

    def resolve(
        self,
        name: str,
        fn: Any,
        infer: Mapping[str, Any],
        plan: Plan | None = None,
        frames: Collection | None = None,
    ) -> Estimator:
        """Return the estimator of a guide site, choosing and checking it for each new kind of distribution there."""
        row, kind = self._table.get(name), (type(base(fn)), fn.has_rsample, (infer or {}).get("estimator"))
        if row is None or row.kind != kind:
            known = row is not None
            at = self._situation(name, fn, infer or {}, plan, frames)
            estimator, why = self._choose(at)
            row = Resolution(name, estimator, why if estimator.traits.unbiased else f"{why}; biased", kind)
            row = replace(row, cost=self.num_particles * _outcomes(row.estimator, fn))
            require_fit(row.estimator, at)
            self._table[name] = row
            if known:  # another guide, whose site of this name is something else
                self.state = {site: tensors for site, tensors in self.state.items() if site != name}
        return row.estimator

    def _situation(self, name: str, fn: Any, infer: Mapping, plan: Plan | None, frames: Collection | None) -> Situation:
        depends = None if plan is None else plan.depends
        nesting = None if plan is None else plan.nesting
        return Situation(
            name,
            fn,
            self._compared(frames),
            self.objective.name,
            infer,
            None if depends is None else depends.upstream(name),
            multi_sample=isinstance(self.objective, MultiSample),
            enumerable=is_annotated(infer) or self._summable.get(name, False),
            together=plan is None or plan.vectorize,
            below=nesting is not None and len(fn.batch_shape) > nesting + plan.vectorize,
        )

    def _compared(self, frames: Collection | None) -> int:
        """Return how many draws of a guide's site are compared: those of one group, or one of each group."""
        size = getattr(self.objective, "num_local_particles", None)
        if size is None or frames is None:
            return self.num_particles
        return self.num_particles // size if self.objective.is_above(frames) else size

    def _spec(self, name: str, infer: Mapping[str, Any]) -> tuple[Any, str]:
        """Return what was asked for at a site: an estimator or a policy; and where."""
        if name in self._by_site:
            return self._by_site[name], "named for this site"
        if self.annotations and "estimator" in infer:
            return from_user(infer["estimator"]), "annotated in the guide"
        return self._policy, "named for the whole loss"

    def _choose(self, at: Situation) -> tuple[Estimator, str]:
        spec, why = self._spec(at.name, at.infer)
        if spec is POLICIES["probe"]:
            self._tried[at.name] = candidates(at)
            kept = best(self.state[PROBE], at.name, self._tried[at.name]) if PROBE in self.state else None
            if kept is not None:
                return create("estimator", kept), KEPT
        if spec is self._policy and isinstance(spec, Estimator) and is_point_mass(at.fn):
            return Pathwise(), "deterministic"
        return (spec, why) if isinstance(spec, Estimator) else spec(at)

    def _treat(self, plan: Plan) -> Callable[[dict], str]:
        keep = "cut" if plan.splits else "attach"

        def treat(msg: dict) -> str:
            site = (msg["name"], msg["fn"], msg["infer"] or {}, plan, plates_of(msg))
            estimator = self.resolve(*site)
            plan.relaxed.pop(msg["name"], None)
            if estimator.traits.draws == "relaxed":
                plan.relaxed[msg["name"]] = (self._situation(*site), estimator)
            return keep if estimator.traits.needs_rsample or msg["name"] in plan.relaxed else "detach"

        return treat

    def _sampler(self, plan: Plan, weights: dict[str, Tensor]) -> Callable[[dict], Tensor | None]:
        """Return what draws in place of a distribution, for estimators that do; it fills in the weights."""

        def sampler(msg: dict) -> Tensor | None:
            estimator = self.resolve(msg["name"], msg["fn"], msg["infer"], plan, plates_of(msg))
            above = isinstance(self.objective, MultiSample) and self.objective.is_above(plates_of(msg))
            if above and self.num_particles > 1:
                return self._draw_above(plan, msg, estimator)
            if estimator.traits.draws in ("independent", "enumerated"):
                return None
            if self.num_particles > 1 and not plan.vectorize and estimator.traits.draws != "relaxed":
                self._refuse_loop(msg["name"], f"{estimator} draws all of them at once")
            drawn = estimator.draw(msg["fn"], self.num_particles)
            if drawn is not None and drawn.weight is not None:
                weights[msg["name"]] = self.num_particles * drawn.weight
            return None if drawn is None else drawn.value

        return sampler

    def _uniform(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Draw the numbers in (0, 1) that an estimator of site `name` asks for."""
        tiny = torch.finfo(like.dtype).eps / 2
        return torch.rand(shape, dtype=like.dtype, device=like.device).clamp(tiny, 1 - tiny)

    def _enumerates(self, plan: Plan) -> Callable[[dict], bool]:
        """Return which sites of the guide are summed over; it refuses draws downstream that are not pathwise."""

        def enumerates(msg: dict) -> bool:
            estimator = self.resolve(msg["name"], msg["fn"], msg["infer"], plan, plates_of(msg))
            if estimator.traits.draws == "enumerated":
                return True
            if len(msg["fn"].batch_shape) > plan.nesting + plan.vectorize and not _follows(estimator):
                fail(
                    EstimatorError,
                    "MonteCarloELBO",
                    f"draw site {msg['name']!r} once per outcome",
                    got=f"{estimator} downstream of an enumerated site",
                    because="only pathwise draws are averaged over the outcomes before them",
                    fix=f'Use estimator={{"{msg["name"]}": "enumerated"}}, or "leave_one_out" at all discrete sites.',
                )
            return False

        return enumerates

    def _draw_above(self, plan: Plan, msg: dict, estimator: Estimator) -> Tensor:
        """Draw a global latent once for each group of local particles."""
        if not plan.vectorize:
            self._refuse_loop(msg["name"], f"{self.objective} shares them among local particles")
        if estimator.traits.draws != "independent":
            fail(
                EstimatorError,
                "MonteCarloELBO",
                f"draw site {msg['name']!r} once per group of local particles",
                got=str(estimator),
                because="it draws its particles in its own way",
                fix=f'Use estimator={{"{msg["name"]}": "score"}}, or "pathwise" where it fits.',
            )
        value = msg["fn"](*msg["args"], **msg["kwargs"])
        groups = value.reshape(-1, self.objective.num_local_particles, *value.shape[1:])
        return groups[:, :1].expand_as(groups).reshape(value.shape)

    def _refuse_loop(self, name: str, because: str) -> None:
        fail(
            EstimatorError,
            "MonteCarloELBO",
            f"draw the particles of site {name!r} together",
            got="particles that are run one by one",
            because=because,
            fix='Let model and guide be vectorized (vectorize_particles=True says why not), or use "leave_one_out".',
        )

    # The plan for a pair of model and guide -------------------------------------------------------------------

    def _plan(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Plan:
        plan = self._plans.get((model, guide))
        if plan is None:
            plan = self._make_plan(model, guide, args, kwargs)
            remember(self._plans, (model, guide), plan)
        return plan

    def _make_plan(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Plan:
        pair = (model, guide, args, kwargs)
        chosen = choose_vectorize(
            "MonteCarloELBO", self.vectorize_particles, self.num_particles, self._nesting, pair, stacklevel=5
        )
        return Plan(*chosen, splits=False, depends=dependence(*pair) if self.num_particles > 1 else None)

    def revisit(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Look again, after 2, 8, 64, ... uses, at which draws reach which terms: a model may have changed since."""
        if self.is_probing:
            self._probe(model, guide, args, kwargs)
        plan = self._plans.get((model, guide))
        if plan is None or plan.depends is None:
            return
        plan.uses += 1
        if plan.uses in REVISITED:
            for name, reached in dependence(model, guide, args, kwargs).items():
                plan.depends[name] = plan.depends.get(name, frozenset()) | reached

    @property
    def is_probing(self) -> bool:
        """Whether estimators are chosen by trials, at a site or in the whole loss."""
        return bool(self._tried) or PROBE in self.state or POLICIES["probe"] in (self._policy, *self._by_site.values())

    def _probe(self, *pair: Any) -> None:
        """Try the estimator whose turn it is, if the share of evaluations allows, and keep the best of each site."""
        if pair[:2] not in self._plans:
            self.prepare(*pair)
        plan, sites = self._plans[pair[:2]], {name: tried for name, tried in self._tried.items() if len(tried) > 1}
        record = begin(sites) | self.state.get(PROBE, {})
        turn = due(record, sites, self.num_particles)
        if turn is not None:
            site, name = turn
            other = self._trial(plan, pair[:2], site, name)
            known = {n: t for n, t in self.state.items() if n not in (site, PROBE)}
            own = {k.split("|state|")[1]: v for k, v in record.items() if k.startswith(f"{site}|{name}|state|")}
            found = trial(other, pair, known | ({site: own} if own else {}))
            record = learn(record, site, name, None if found is None else found[0], other.evaluations)
            new = {} if found is None else found[1].get(site, {})
            record |= {f"{site}|{name}|state|{k}": v for k, v in new.items()}
        self.state = {**self.state, PROBE: record}
        for site, names in sites.items():
            self._keep(plan, site, best(record, site, names))

    def _trial(self, plan: Plan, key: tuple, site: str, name: str) -> MonteCarloELBO:
        """Return a loss that has another estimator at one site."""
        chosen = {**self.resolved, site: create("estimator", name)}
        other = self._trials.get((site, name, *key))
        if other is None or other._by_site != chosen:
            other = self.fresh()
            other._by_site, other._policy = chosen, POLICIES["auto"]
            other._summable = dict.fromkeys(chosen, False)
            other._plans = {key: Plan(plan.vectorize, plan.nesting, splits=False, depends=plan.depends)}
            remember(self._trials, (site, name, *key), other, limit=64)
        return other

    def _keep(self, plan: Plan, site: str, name: str | None) -> None:
        """Let a site have the estimator that was found best, with the state of its trials."""
        estimator, row = None if name is None else create("estimator", name), self._table.get(site)
        if row is not None and estimator is None and row.why == KEPT:  # an earlier state was loaded
            del self._table[site]
            plan.sites = ()
        if row is None or estimator is None:
            return
        if row.estimator == estimator:
            self._table[site] = replace(row, why=KEPT)
            return
        self._table[site] = replace(row, estimator=estimator, why=KEPT, cost=self.num_particles)
        record = self.state[PROBE]
        own = {k.split("|state|")[1]: v for k, v in record.items() if k.startswith(f"{site}|{name}|state|")}
        self.state = {n: t for n, t in self.state.items() if n != site} | ({site: own} if own else {})
        plan.sites, plan.splits = (), False
        logger.info("site %r: %s (%s)", site, estimator, KEPT)

    def _draw(
        self, plan: Plan, model: Callable, guide: Callable, args: tuple, kwargs: Mapping, **dictated: Any
    ) -> Particles:
        weights: dict[str, Tensor] = {}
        options = {
            "num_particles": self.num_particles,
            "vectorize": plan.vectorize,
            "max_plate_nesting": plan.nesting,
            "treat": self._treat(plan),
            "sampler": self._sampler(plan, weights),
            "score": score_relaxed(plan.relaxed),
            "enumerate_site": self._enumerates(plan),
            "same_batch": isinstance(self.objective, MultiSample),  # weights are compared datum by datum
        }
        with relaxed_run(plan.relaxed, plan.followed, lambda: dependence(model, guide, args, kwargs)):
            particles = draw(model, guide, args, kwargs, **options | dictated)
        return replace(particles, weights=weights) if weights else particles

    def particles(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Particles:
        """Draw particles as an evaluation does, with values attached, detached or cut as the estimators need."""
        plan = self._plan(model, guide, args, kwargs)
        if plan.sites:
            particles = self._draw(plan, model, guide, args, kwargs)
        else:
            particles = self._first_draw(plan, model, guide, args, kwargs)
        sites = tuple((n, s.is_observed) for side in (particles.guide, particles.model) for n, s in side.items())
        if sites != plan.sites:
            self._check(particles)
            plan.sites = sites
            if self._completed(plan, particles, model, guide, args, kwargs):  # a site that earlier runs did not have
                particles = self._draw(plan, model, guide, args, kwargs)
        return particles

    def _completed(self, plan: Plan, particles: Particles, *pair: Any) -> bool:
        """Find out what the estimators of the sites need to know; return whether the particles have to be drawn anew.

        To look at what depends on what restores buffers, which the graph of the present draws may hold.
        """
        traits = [self._table[name].estimator.traits for name in particles.guide if name in self._table]
        splits = (self.objective.splits_paths or any(t.splits_paths for t in traits)) and not plan.splits
        sought = self._seek_sums(plan, particles, pair)
        summed = sought or (plan.nesting is None and self._sums(particles, traits))
        if summed:
            plan.nesting = particles.max_plate_nesting
        several = isinstance(self.objective, MultiSample)
        unknown = plan.depends is None and (several or any(t.needs_signal for t in traits))
        plan.splits = plan.splits or splits
        if unknown:
            plan.depends = dependence(*pair)
        rows = [(site, self._table[name].estimator) for name, site in particles.guide.items() if name in self._table]
        halfway = [row for row in rows if differentiates(row[1]) and row[0].name not in plan.halfway]
        for site, estimator in halfway:
            check_relaxed(pair, self.objective, plan, particles, site, estimator)
            plan.halfway.add(site.name)
        relaxed = set(plan.relaxed) - plan.followed
        if relaxed:
            self._follow(plan, *pair)
            plan.followed |= relaxed
        return splits or unknown or summed or bool(halfway) or bool(relaxed)

    def _follow(self, plan: Plan, model: Callable, guide: Callable, args: tuple, kwargs: Mapping) -> None:
        """Raise if the model drops the path of a relaxed value."""
        reached = dependence(model, guide, args, kwargs, direct=True)
        with quiet(), torch.enable_grad():
            particles = self._draw(plan, model, guide, args, kwargs)
            require_paths(particles, self.objective.terms(particles), reached, plan.relaxed)

    def _seek_sums(self, plan: Plan, particles: Particles, pair: tuple) -> bool:
        """Find sites at which ``"auto"`` may sum and not draw; return whether there are any new ones."""
        rows = [self._table[name] for name in particles.guide if name in self._table]
        counts = {}
        for row in rows if self.objective.name in Enumerated.traits.objectives else ():
            site = particles.guide[row.site]
            asked = self._spec(row.site, site.infer)[0] in (POLICIES["auto"], POLICIES["probe"])
            if asked and row.site not in self._summable and misfit(Enumerated(), self._plain(site)) is None:
                counts[row.site] = num_outcomes(site.fn)
        counts = {n: c for n, c in counts.items() if c <= BUDGET and n not in particles.enumerated}
        if not counts:
            return False
        plan.depends = plan.depends or dependence(*pair)
        follow = [row.site for row in rows if _follows(row.estimator)]
        names = summable(pair, particles.max_plate_nesting, counts, plan.depends, follow)
        self._summable |= {name: name in names for name in counts}
        for name in names:  # to be chosen anew
            self._table[name] = replace(self._table[name], kind=())
        return bool(names)

    def _plain(self, site: Site) -> Situation:
        return Situation(site.name, site.fn, self.num_particles, self.objective.name, site.infer)

    def _sums(self, particles: Particles, traits: list) -> bool:
        """Whether a site is enumerated, for which the number of plate dims has to be known beforehand."""
        latents = any("summed_out" in site.infer for site in particles.model.values())
        return latents or any(t.draws == "enumerated" for t in traits)

    def _first_draw(self, plan: Plan, model: Callable, guide: Callable, args: tuple, kwargs: Mapping) -> Particles:
        """Draw; if it turns out that paths have to be split or more has to be known, draw the same again."""
        rewind = generators()
        with ModuleWatch() as watch:
            particles = self._draw(plan, model, guide, args, kwargs)
        try:
            again = self._completed(plan, particles, model, guide, args, kwargs)
        except BaseException:
            watch.restore()
            rewind()
            raise
        if again:
            watch.restore()
            rewind()
            particles = self._draw(plan, model, guide, args, kwargs)
        return particles

    def _check(self, particles: Particles) -> None:
        check_match(particles)
        check_plates(particles)
        for row in self._table.values():
            wanted = row.estimator.traits.draws == "enumerated"
            if wanted and row.site in particles.guide and row.site not in particles.enumerated:
                fail(
                    EstimatorError,
                    "enumerated",
                    f"sum over site {row.site!r}",
                    got="a value that was drawn or given by another handler",
                    because="the guide has to be a function of pyro.sample statements, and no effect handler",
                    fix=f'Use estimator={{"{row.site}": "leave_one_out"}}.',
                )
        for name, site in particles.guide.items():
            if site.is_observed and not site.fn.has_rsample:  # a factor of draws that are no pyro.sample
                self.resolve(name, site.fn, site.infer, None, site.frames)
        for name in self._by_site:
            if name not in particles.guide and name not in particles.model:
                fail(
                    EstimatorError,
                    "MonteCarloELBO",
                    f"set the estimator of site {name!r}",
                    got="no such site in the guide",
                    because="estimators belong to the guide's sites",
                    fix=nearest(name, particles.guide),
                )
        for name in particles.ignored if self.annotations else ():
            fail(
                EstimatorError,
                "MonteCarloELBO",
                f"obey the estimator annotation at site {name!r}",
                got='infer={"estimator": ...} in the model',
                because="draws are made by the guide, whose site has no such annotation",
                fix=f'Move it to the guide\'s pyro.sample({name!r}, ...), or write estimator={{"{name}": ...}}.',
            )
        rows = "\n".join(f"  {row.site}: {row.estimator} ({row.why}; cost {row.cost})" for row in self._table.values())
        logger.info("estimators per guide site:\n%s", rows)

    # Evaluation -----------------------------------------------------------------------------------------------

    def evaluate(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        state: States | None = None,
        beta: Tensor | None = None,
        order: int = 1,
    ) -> Evaluation:
        r"""Evaluate objective and surrogate as a pure function of the parameters, the data and the estimators' state.

        Args:
            beta: A factor of the latents' terms, log p and log q alike, in the surrogate: what is climbed is annealed,
                and the objective is not.
            order: With 2, second derivatives of the surrogate are right too, if all estimators have the trait
                ``higher_order``; the state then stays.

        Returns:
            The objective (scalar, nats), the surrogate to be *maximised* (its value is of no meaning), the particles,
            and the estimators' next state. Nothing is checked for finiteness; nothing of the loss is changed.
        """
        particles = self.particles(model, guide, args, kwargs)
        plan = self._plans[(model, guide)]
        rows = [(site, self._table[name].estimator) for name, site in particles.guide.items() if name in self._table]
        objective, terms, bound = self._objective(plan, particles, rows, beta)
        self.evaluations = self.num_particles * particles.num_outcomes
        plain = all(_is_plain(e) for _, e in rows)
        if plain and not self.objective.splits_paths:
            climbed = objective if beta is None else total(terms) / self.num_particles
            before = self.state if state is None else state
            return Evaluation(objective, climbed, particles, accounted(before, state or {}, self.evaluations))

        def further(site: Site, values: Tensor, estimator: Estimator, signal: Tensor) -> Probed:
            pair = (model, guide, args, kwargs)
            return probe(pair, self.objective, plan, particles, site, values, estimator, signal.shape, beta)

        composer = Composer(particles, terms, bound, plan.depends or Dependence(), further, self._uniform)
        state = self.state if state is None else state
        if order == 2 and not self.objective.splits_paths and all(e.traits.higher_order for _, e in rows):
            return Evaluation(objective.detach(), composer.dice(rows, state), particles, state)
        surrogate, following = composer.compose(rows, state)
        self.evaluations *= 1 + sum(composer.probes.values())
        for name, count in composer.probes.items():
            self._table[name] = replace(self._table[name], cost=self.num_particles * (1 + count))
        following = accounted(state, following, self.evaluations)
        return Evaluation(objective.detach(), surrogate, particles, following)

    def _objective(
        self, plan: Plan, particles: Particles, rows: list, beta: Tensor | None = None
    ) -> tuple[Tensor, list[Term], Bound | None]:
        """Return the objective, its summands (annealed), and the objective of several particles, if it is one."""
        depends = plan.depends or Dependence()
        analytic = [site.name for site, estimator in rows if estimator.integrates]
        terms = self.objective.terms(particles, analytic)
        _check_integrated(analytic, terms, particles)
        terms = reweighted(terms, particles, depends)
        bound = self.objective.bound(particles, terms, depends.moves)
        if bound is None:
            objective = total(terms) / self.num_particles
            return objective, terms if beta is None else annealed(terms, particles, beta), None
        if beta is not None:
            fail(
                EmvaeError,
                "MonteCarloELBO",
                "anneal",
                got=f"objective={self.objective.name!r}",
                because="the factor multiplies a sum of terms, and this objective is none",
                fix='Write objective="elbo".',
            )
        return bound.total, terms, bound

    def _finite(self, evaluation: Evaluation) -> float:
        value = -float(evaluation.objective.detach())
        if not math.isfinite(value):
            raise_non_finite("MonteCarloELBO", value, evaluation.particles)
        return value

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return minus the objective, in nats."""
        particles = self.particles(model, guide, args, kwargs)
        rows = [(site, self._table[name].estimator) for name, site in particles.guide.items() if name in self._table]
        objective, _, _ = self._objective(self._plans[(model, guide)], particles, rows)
        return self._finite(Evaluation(objective, objective, particles, {}))

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Return minus the objective as a tensor whose gradient is the estimate.

        If all estimators have the trait ``higher_order``, so are its second derivatives (``create_graph=True``).
        """
        evaluation = self.evaluate(model, guide, args, kwargs, order=2)
        self._finite(evaluation)
        if evaluation.surrogate is evaluation.objective:
            return -evaluation.objective
        surrogate = evaluation.surrogate
        return -(evaluation.objective.detach() + (surrogate - surrogate.detach()))

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return minus the objective and add the gradient estimate to ``.grad`` of the parameters."""
        self.revisit(model, guide, args, kwargs)
        evaluation = self.evaluate(model, guide, args, kwargs)
        value = self._finite(evaluation)
        if evaluation.surrogate.requires_grad:
            (-evaluation.surrogate).backward(retain_graph=self.retain_graph)
        self.state = evaluation.state
        return value

    def state_dict(self) -> dict[str, Any]:
        """Return the estimators' state: tensors by site and name."""
        return {"state": {site: dict(tensors) for site, tensors in self.state.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set the estimators' state."""
        self.state = {site: dict(tensors) for site, tensors in state_dict["state"].items()}
        if self.is_probing:  # the choice is in the state
            self._table, self._plans, self._trials = {}, {}, {}

    def prepare(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Resolve estimators and make their state, leaving generators and buffers as they were."""
        with quiet(), torch.no_grad():
            self.particles(model, guide, args, kwargs)


def _outcomes(estimator: Estimator, fn: Any) -> int:
    return (num_outcomes(fn) or 1) if estimator.traits.draws == "enumerated" else 1


def _follows(estimator: Estimator) -> bool:
    """Whether a site can be downstream of one that is summed over."""
    return estimator == Pathwise() or estimator.traits.draws == "enumerated"


def _is_plain(estimator: Estimator) -> bool:
    """Whether the objective, differentiated as it stands, is what the estimator estimates."""
    pathwise = type(estimator) is Pathwise and not estimator.traits.splits_paths
    return pathwise or estimator.traits.draws == "enumerated"


def _check_integrated(wanted: list[str], terms: list[Term], particles: Particles) -> None:
    integrated = {term.site for term in terms if term.kind == "kl"}
    for name in wanted:
        if name not in integrated:
            prior = particles.model[name].fn if name in particles.model else None
            fail(
                EstimatorError,
                "MonteCarloELBO",
                f"integrate the KL of site {name!r}",
                got=f"{type(base(particles.guide[name].fn)).__name__} in the guide and "
                f"{'no such site' if prior is None else type(base(prior)).__name__} in the model",
                because="torch.distributions.kl_divergence knows no closed form of that pair",
                fix=f'Use estimator={{"{name}": "pathwise"}}.',
            )


def remember(cache: dict, key: Any, value: Any, limit: int = 16) -> None:
    """Add to a cache and let go of the oldest: callables that are wrapped anew in each step must not pile up."""
    while len(cache) >= limit:
        cache.pop(next(iter(cache)))
    cache[key] = value


def raise_non_finite(obj: str, value: float, particles: Particles, cause: BaseException | None = None) -> None:
    """Raise `NonFiniteError` naming the first site that is not finite."""
    where = particles.first_non_finite() or "finite sites whose sum is not"
    fail(
        NonFiniteError,
        obj,
        "use an objective that is not finite",
        got=f"loss {value} with {where}",
        because="every log density has to be finite",
        fix="Check the data and the support and scale at that site; lower the learning rate if it came late.",
        cause=cause,
    )
