r"""`MonteCarloELBO`: particles x objective x estimators, as a `pyro.infer.ELBO`."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from ._checks import EmvaeError, EstimatorError, NonFiniteError, fail, positive_int
from ._pyro import get_trace
from ._registry import create
from .choosing import PROBE, accounted
from .controls import Known
from .drawing import enumerates, sampler, treat
from .estimators.base import Estimator, Probed, base
from .estimators.pathwise import Pathwise
from .estimators.policies import POLICIES
from .estimators.relaxed import relaxed_run, score_relaxed
from .evaluation import Evaluation
from .objectives import Bound, MultiSample, Objective, Term
from .objectives.elbo import alike
from .particles import Dependence, ModuleWatch, Particles, Site, dependence, draw, generators, quiet
from .probing import probe
from .resolving import Frames, Plan, Resolution, Resolver, remember
from .settling import announce, check, complete, make_plan
from .sticking import Sticking, arguments_of
from .surrogate import Composer, States, annealed, reweighted, total
from .trials import probe as probe_candidates

__all__ = ["Evaluation", "MonteCarloELBO", "Resolution"]

REVISITED = (2, 8, 64, 512, 4096, 32768)


class MonteCarloELBO(ELBO):
    r"""The ELBO with a gradient estimator per guide site; a drop-in loss for `pyro.infer.SVI`.

    $$\text{loss}=-\tfrac1K\sum_k\big[\log p(x,z_k)-\log q(z_k)\big],\quad z_k\sim q,$$

    and a gradient that each site's estimator contributes to: see `pyro_emvae.estimators`. An estimator is about the
    gradient; what value is reported, `objective` says. That of ``"elbo"`` is `Trace_ELBO`'s number for number, and the
    gradient is with ``estimator="pyro"``.

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

    `evaluations` is the number of model evaluations of one gradient; None until model and guide have been run for the
    first time (`prepare`, `loss`, a gradient). An evaluation is a run of guide and model, and its derivative, for one
    particle. Outcomes that are summed over count as particles, and so do further values that an estimator looks at;
    twice, if it needs second derivatives there.

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
        self.resolver = Resolver(estimator, annotations, num_particles, self.objective)
        self.trials: dict[tuple, MonteCarloELBO] = {}
        self.plans: dict[tuple[Callable, Callable], Plan] = {}
        self.state: States = {}
        self.evaluations: int | None = None
        self.announced, self.is_trial = "", False

    def fresh(self) -> MonteCarloELBO:
        """Return a loss of the same options that has seen nothing: no resolved estimators, no state."""
        loss = copy.copy(self)
        loss.resolver, loss.plans, loss.trials = self.resolver.fresh(), {}, {}
        loss.state, loss.evaluations, loss.announced = {}, None, ""
        return loss

    # The estimators -------------------------------------------------------------------------------------------

    @property
    def resolved(self) -> dict[str, Estimator]:
        """The estimator in use at each guide site seen so far; can be given back as ``estimator=``."""
        return {name: row.estimator for name, row in self.resolver.table.items()}

    @property
    def table(self) -> tuple[Resolution, ...]:
        """The resolved table: site, estimator, why, cost."""
        return tuple(self.resolver.table.values())

    def resolve(
        self,
        name: str,
        fn: Any,
        infer: Mapping[str, Any],
        plan: Plan | None = None,
        frames: Frames = None,
    ) -> Estimator:
        """Return the estimator of a guide site, choosing and checking it for each new kind of distribution there."""
        estimator, self.state = self.resolver.resolve(name, fn, infer, plan, frames, self.state)
        return estimator

    def _uniform(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Draw the numbers in (0, 1) that an estimator of site `name` asks for."""
        tiny = torch.finfo(like.dtype).eps / 2
        return torch.rand(shape, dtype=like.dtype, device=like.device).clamp(tiny, 1 - tiny)

    # The plan for a pair of model and guide -------------------------------------------------------------------

    def _plan(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Plan:
        plan = self.plans.get((model, guide))
        if plan is None:
            plan = make_plan(self, model, guide, args, kwargs)
            remember(self.plans, (model, guide), plan)
        return plan

    def revisit(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Look again, after 2, 8, 64, ... uses, at which draws reach which terms: a model may have changed since."""
        if self.is_probing:
            probe_candidates(self, model, guide, args, kwargs)
        plan = self.plans.get((model, guide))
        if plan is None or plan.depends is None:
            return
        plan.uses += 1
        if plan.uses in REVISITED and plan.look_again(dependence(model, guide, args, kwargs)):
            plan.sites = ()  # to look again at what follows from that

    @property
    def is_probing(self) -> bool:
        """Whether estimators are chosen by trials, at a site or in the whole loss."""
        asked = (self.resolver.policy, *self.resolver.by_site.values())
        return bool(self.resolver.tried) or PROBE in self.state or POLICIES["probe"] in asked

    def _draw(
        self, plan: Plan, model: Callable, guide: Callable, args: tuple, kwargs: Mapping, **dictated: Any
    ) -> Particles:
        weights: dict[str, Tensor] = {}
        found: dict[str, Estimator] = {}
        options = {
            "num_particles": self.num_particles,
            "vectorize": plan.vectorize,
            "max_plate_nesting": plan.nesting,
            "treat": treat(self, plan, found),
            "sampler": sampler(self, plan, weights, found),
            "score": score_relaxed(plan.relaxed),
            "enumerate_site": enumerates(self, plan),
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
        if sites != plan.sites or (plan.undecided and torch.is_grad_enabled()):
            check(self, particles)
            new = plan.depends is not None and bool(plan.seen) and not plan.seen.issuperset(sites)
            if new:
                plan.look_again(dependence(model, guide, args, kwargs))
            plan.sites = sites
            plan.seen |= set(sites)
            if (
                complete(self, plan, particles, model, guide, args, kwargs) or new
            ):  # sites that earlier runs did not have
                particles = self._draw(plan, model, guide, args, kwargs)
            self._count(plan, particles)
            if not plan.undecided:
                announce(self)
        return particles

    def _count(self, plan: Plan, particles: Particles) -> None:
        """Count model evaluations before the first gradient is taken; generators stay as they are."""
        rows, counts = self.resolver.rows(particles), {}
        if any(estimator.traits.probes != "no" for _, estimator in rows):
            with quiet(), torch.no_grad():
                _, terms, bound = self._objective(plan, particles, rows)
                composer = Composer(particles, terms, bound, plan.depends or Dependence(), None, self._uniform)
                counts = composer.count(rows, self.state)
        self._account(particles, rows, counts)

    def _account(self, particles: Particles, rows: list[tuple[Site, Estimator]], counts: Mapping[str, int]) -> None:
        self.evaluations = self.num_particles * particles.num_outcomes * self.resolver.account(rows, counts)

    def _first_draw(self, plan: Plan, model: Callable, guide: Callable, args: tuple, kwargs: Mapping) -> Particles:
        """Draw; if it turns out that paths have to be split or more has to be known, draw the same again."""
        rewind = generators()
        with ModuleWatch() as watch:
            particles = self._draw(plan, model, guide, args, kwargs)
        try:
            again = complete(self, plan, particles, model, guide, args, kwargs)
        except BaseException:
            watch.restore()
            rewind()
            raise
        if again:
            watch.restore()
            rewind()
            particles = self._draw(plan, model, guide, args, kwargs)
        return particles

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
                ``higher_order`` or leave out a direct score by arguments (`AdaptiveSticking`), which is then left in;
                the state stays.

        Returns:
            The objective (scalar, nats), the surrogate to be *maximised* (its value is of no meaning), the particles,
            and the estimators' next state. Nothing is checked for finiteness; nothing of the loss is changed.
        """
        particles = self.particles(model, guide, args, kwargs)
        plan = self.plans[(model, guide)]
        rows = self.resolver.rows(particles)
        state = self.state if state is None else state
        whole = not (self.objective.splits_paths or any(particles.cuts))
        stuck = {site.name: (site, e.sticks) for site, e in rows if e.sticks is not None and _by_arguments(site, plan)}
        rest = [(site, e) for site, e in rows if site.name not in stuck]
        sticking = None
        if stuck and order == 1 and torch.is_grad_enabled():
            alone = whole and not particles.weights
            sticking = Sticking(stuck.values(), state, self.num_particles, beta, integrates=alone)
        held = () if sticking is None else sticking.whole
        objective, terms, bound = self._objective(plan, particles, rows, beta, held)
        if whole and all(_is_plain(e) for _, e in rest):
            same = beta is None and not any(e.integrates for _, e in rest)
            climbed = objective if same else total(terms) / self.num_particles
            self._account(particles, rows, {})
            objective = objective.detach() if held else objective
            return Evaluation(objective, climbed, particles, accounted(state, state, self.evaluations), sticking)

        def further(site: Site, values: Tensor, estimator: Estimator, signal: Tensor) -> Probed:
            pair = (model, guide, args, kwargs)
            return probe(pair, self.objective, plan, particles, site, values, estimator, signal.shape, beta)

        composer = Composer(particles, terms, bound, plan.depends or Dependence(), further, self._uniform, beta)
        if order == 2 and whole and all(e.traits.higher_order for _, e in rest):
            return Evaluation(objective.detach(), composer.dice(rows, state), particles, state)
        climbed, following = composer.compose(rest, state, sticking)
        self._account(particles, rows, composer.probes)
        following = accounted(state, following, self.evaluations)
        known = isinstance(climbed, Known)
        return Evaluation(objective.detach(), climbed, particles, following, None if known else sticking)

    def _objective(
        self, plan: Plan, particles: Particles, rows: list, beta: Tensor | None = None, held: Collection[str] = ()
    ) -> tuple[Tensor, list[Term], Bound | None]:
        """Return the objective, and the terms that are climbed or the objective of several particles, if it is one.

        What is climbed is annealed, and has the KL of sites integrated whose estimator does so. The entropy of sites in
        `held` has no derivative.
        """
        depends = plan.depends or Dependence()
        drawn = self.objective.terms(particles)
        if held:
            own = [term.kind == "entropy" and term.site in held for term in drawn]
            drawn = [t._replace(value=t.value.detach()) if is_own else t for t, is_own in zip(drawn, own, strict=True)]
        terms = reweighted(drawn, particles, depends)
        bound = self.objective.bound(particles, terms, depends.moves)
        if bound is None:
            names = self._integrated(particles, rows)
            with torch.no_grad() if names else contextlib.nullcontext():
                objective = total(terms) / self.num_particles
            if names:
                terms = reweighted(self.objective.integrated(drawn, particles, names), particles, depends)
                self._check_integrated(names, terms, particles)
                divergence = total([term for term in terms if term.kind == "kl"]).detach()
                objective = objective + 0 * divergence  # not finite if that is not
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

    def _integrated(self, particles: Particles, rows: list) -> list[str]:
        """Return the sites whose KL is integrated: of those that nobody named, where model and guide allow it now."""
        sites = [site for site, estimator in rows if estimator.integrates]
        chosen = {site.name for site in sites if self.is_trial or self.resolver.is_chosen(site)}
        allowed = set(alike(particles, chosen)) if chosen else ()
        return [site.name for site in sites if site.name in allowed or site.name not in chosen]

    def _check_integrated(self, wanted: list[str], terms: list[Term], particles: Particles) -> None:
        integrated = {term.site for term in terms if term.kind == "kl"}
        for name in wanted:
            site = particles.guide[name]
            if name not in integrated and not (self.is_trial or self.resolver.is_chosen(site)):
                prior = particles.model[name].fn if name in particles.model else None
                fail(
                    EstimatorError,
                    "MonteCarloELBO",
                    f"integrate the KL of site {name!r}",
                    got=f"{type(base(site.fn)).__name__} in the guide and "
                    f"{'no such site' if prior is None else type(base(prior)).__name__} in the model",
                    because="torch.distributions.kl_divergence knows no closed form of that pair",
                    fix=f'Use estimator={{"{name}": "pathwise"}}.',
                )

    def _finite(self, evaluation: Evaluation) -> float:
        value = -float(evaluation.objective.detach())
        if not math.isfinite(value):
            raise_non_finite("MonteCarloELBO", value, evaluation.particles)
        return value

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return minus the objective, in nats."""
        particles = self.particles(model, guide, args, kwargs)
        rows = self.resolver.rows(particles)
        objective, _, _ = self._objective(self.plans[(model, guide)], particles, rows)
        return self._finite(Evaluation(objective, objective, particles, {}))

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Return minus the objective as a tensor whose gradient is the estimate.

        If all estimators have the trait ``higher_order``, so are its second derivatives (``create_graph=True``); those
        that ``"auto"`` chooses for reparameterised sites are right there too. Estimators learn nothing here.
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
        evaluation.backward(self.retain_graph)
        self.state = evaluation.state
        return value

    def state_dict(self) -> dict[str, Any]:
        """Return the estimators' state: tensors by site and name."""
        return {"state": {site: dict(tensors) for site, tensors in self.state.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set the estimators' state."""
        self.state = {site: dict(tensors) for site, tensors in state_dict["state"].items()}
        if self.is_probing:  # the choice is in the state
            self.resolver.table, self.plans, self.trials = {}, {}, {}

    def prepare(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Resolve estimators and make their state, leaving generators and buffers as they were."""
        with quiet(), torch.enable_grad():
            self.particles(model, guide, args, kwargs)


def _is_plain(estimator: Estimator) -> bool:
    """Whether the objective, differentiated as it stands, is what the estimator estimates."""
    pathwise = type(estimator) is Pathwise and not estimator.traits.splits_paths
    return pathwise or estimator.traits.draws == "enumerated"


def _by_arguments(site: Site, plan: Plan) -> bool:
    """Whether the direct score is left out by the arguments of a site's distribution, which may be another now."""
    return site.name in plan.arguments and bool(arguments_of(site.fn))


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
