r"""What a loss finds out about model and guide before it takes the first gradient, and what it refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ._checks import EstimatorError, fail, nearest
from .estimators.base import Situation, base, misfit
from .estimators.enumerated import Enumerated
from .estimators.pathwise import AdaptiveSticking, Analytic, Pathwise
from .estimators.relaxed import require_paths
from .objectives import ELBO, MultiSample
from .objectives.elbo import integrable
from .particles import (
    BUDGET,
    Particles,
    Site,
    check_match,
    check_plates,
    choose_vectorize,
    dependence,
    mixed_up,
    num_outcomes,
    quiet,
    summable,
)
from .probing import check_relaxed, differentiates, find_shortcut
from .resolving import KEPT, Plan, follows
from .sticking import arguments_of, is_downstream

__all__ = ["announce", "check", "complete", "make_plan"]

logger = logging.getLogger("pyro_emvae")

ENTROPIES = (Pathwise(), Pathwise(entropy=Analytic()), Pathwise(entropy=AdaptiveSticking()))
"""What `auto` chooses between where a site is reparameterised."""

LOOKS = 16
"""For how many models, such as one that is wrapped anew in each step, a sum is looked at outcome by outcome."""


def make_plan(loss: Any, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Plan:
    pair = (model, guide, args, kwargs)
    chosen = choose_vectorize(
        "MonteCarloELBO", loss.vectorize_particles, loss.num_particles, loss._nesting, pair, stacklevel=5
    )
    return Plan(*chosen, splits=False, depends=dependence(*pair) if loss.num_particles > 1 else None)


def complete(loss: Any, plan: Plan, particles: Particles, *pair: Any) -> bool:
    """Find out what the estimators of the sites need to know; return whether the particles have to be drawn anew.

    To look at what depends on what restores buffers, which the graph of the present draws may hold.
    """
    traits = [loss.resolver.table[name].estimator.traits for name in particles.guide if name in loss.resolver.table]
    known = plan.depends
    sought = _seek_sums(loss, plan, particles, pair)
    if not sought:
        _seek_entropies(loss, plan, particles)
    stuck = [site.name for site, estimator in loss.resolver.rows(particles) if estimator.sticks is not None]
    plan.arguments = _sticking(particles, stuck) if loss.objective == ELBO() else set()
    splits = not plan.splits and _splits(loss, plan, particles, pair)
    summed = sought or (plan.nesting is None and _sums(particles, traits))
    if summed:
        plan.nesting = particles.max_plate_nesting
    several = isinstance(loss.objective, MultiSample)
    unknown = plan.depends is None and (several or any(t.needs_signal for t in traits))
    plan.splits = plan.splits or splits
    if unknown:
        plan.depends = dependence(*pair)
    rows = loss.resolver.rows(particles)
    halfway = [row for row in rows if differentiates(row[1]) and row[0].name not in plan.halfway]
    for site, estimator in halfway:
        check_relaxed(pair, loss.objective, plan, particles, site, estimator)
        plan.halfway.add(site.name)
    looked = _check_sums(loss, plan, particles, pair)
    for site, estimator in rows:
        if estimator.traits.probes not in ("no", "draws") and site.name not in plan.shortcut:
            looked = find_shortcut(pair, loss.objective, plan, particles, site, estimator) or looked
    relaxed = set(plan.relaxed) - plan.followed
    if relaxed:
        _follow(loss, plan, *pair)
        plan.followed |= relaxed
    return splits or plan.depends is not known or summed or looked or bool(halfway) or bool(relaxed)


def _splits(loss: Any, plan: Plan, particles: Particles, pair: tuple) -> bool:
    """Whether values have to be cut from their paths, as where log q of a site has one through an upstream value."""
    rows = [(site, e) for site, e in loss.resolver.rows(particles) if site.name not in plan.arguments]
    rows = [(site, e) for site, e in rows if e.traits.splits_paths]
    if rows:
        plan.depends = plan.depends or dependence(*pair)
        _require_inverse(rows)
    apart = [(site.name, e.traits.doubly) for site, e in rows]
    always = loss.objective.splits_paths or (apart and particles.enumerated)
    return always or any(doubly or plan.depends.upstream(name) for name, doubly in apart)


def _require_inverse(rows: list[tuple[Site, Any]]) -> None:
    """Raise where log q is known at the very value that was drawn only, as of a flow without inverse."""
    for site, estimator in rows:
        try:
            with torch.no_grad():
                site.each(lambda run: run.density(run.value.detach()))
        except (KeyError, NotImplementedError) as cause:
            fail(
                EstimatorError,
                repr(estimator),
                f"tell paths apart at site {site.name!r}",
                got=f"a {type(base(site.fn)).__name__} without an inverse",
                because="log q is then needed at a value that is cut from its draw",
                fix=f'Use estimator={{"{site.name}": "pathwise"}}.',
                cause=cause,
            )


def _follow(loss: Any, plan: Plan, model: Callable, guide: Callable, args: tuple, kwargs: Mapping) -> None:
    """Raise if the model drops the path of a relaxed value."""
    reached = dependence(model, guide, args, kwargs, direct=True)
    with quiet(), torch.enable_grad():
        particles = loss._draw(plan, model, guide, args, kwargs)
        require_paths(particles, loss.objective.terms(particles), reached, plan.relaxed)


def _check_sums(loss: Any, plan: Plan, particles: Particles, pair: tuple) -> bool:
    """Refuse to sum over a site that was named for it where outcomes are mixed; return whether any were looked at.

    Where ``"auto"`` found a sum right for another model and it is not for this one, the site is drawn from now on.
    """
    names = [n for n in particles.enumerated if n not in plan.alone and loss.resolver.looks.get(n, 0) < LOOKS]
    looked = bool(names)
    while names and (wrong := mixed_up(pair, particles.max_plate_nesting, names)) is not None:
        if loss.resolver.summable.get(wrong):
            names.remove(wrong)
            loss.resolver.summable[wrong] = False
            loss.resolver.table[wrong] = replace(loss.resolver.table[wrong], kind=())
            plan.depends = plan.depends or dependence(*pair)
            continue
        fail(
            EstimatorError,
            "enumerated",
            f"sum over site {wrong!r}",
            got="other densities at all outcomes together than at each of them alone",
            because="outcomes lie in a dim left of the plates, and model and guide have to keep them apart",
            fix="Index from the right in model and guide (sum over dim=-1, not over all dims; no Python branch on "
            f'the value), or use estimator={{"{wrong}": "leave_one_out"}}.',
        )
    plan.alone |= set(names)
    loss.resolver.looks |= {name: loss.resolver.looks.get(name, 0) + 1 for name in names}
    return looked


def _seek_sums(loss: Any, plan: Plan, particles: Particles, pair: tuple) -> bool:
    """Find sites at which ``"auto"`` may sum and not draw; return whether there are any new ones."""
    rows = [loss.resolver.table[name] for name in particles.guide if name in loss.resolver.table]
    counts = {}
    for row in rows if loss.objective.name in Enumerated.traits.objectives else ():
        site = particles.guide[row.site]
        new = loss.resolver.is_chosen(site) and row.site not in loss.resolver.summable
        if new and misfit(Enumerated(), _plain(loss, site)) is None:
            counts[row.site] = num_outcomes(site.fn)
    counts = {n: c for n, c in counts.items() if c <= BUDGET and n not in particles.enumerated}
    if not counts:
        return False
    plan.depends = plan.depends or dependence(*pair)
    chosen = [
        row.site for row in rows if row.estimator in ENTROPIES and loss.resolver.is_chosen(particles.guide[row.site])
    ]
    follow = [row.site for row in rows if follows(row.estimator) or row.site in chosen]
    names = summable(pair, particles.max_plate_nesting, counts, plan.depends, follow)
    loss.resolver.summable |= {name: name in names for name in counts}
    plan.alone |= set(names)
    for name in names:  # to be chosen anew
        loss.resolver.table[name] = replace(loss.resolver.table[name], kind=())
    return bool(names)


def _seek_entropies(loss: Any, plan: Plan, particles: Particles) -> None:
    """Find the sites at which ``"auto"`` may integrate the KL, or leave out the direct score of log q in part.

    It does so where that is found for all models that it was asked about. What draws are upstream is not known without
    derivatives: it is then left for later, and nothing left out until then.
    """
    if loss.objective != ELBO():
        return
    rows = [loss.resolver.table[site.name] for site, _ in loss.resolver.rows(particles)]
    rows = [row for row in rows if row.why != KEPT and row.estimator in ENTROPIES]
    rows = [row for row in rows if loss.resolver.is_chosen(particles.guide[row.site])]
    found = integrable(particles) if rows else ()
    sampled = [row.site for row in rows if row.site not in found]
    plan.undecided = not torch.is_grad_enabled() and any(arguments_of(particles.guide[name].fn) for name in sampled)
    sought = [(loss.resolver.integrable, found)]
    if not plan.undecided:
        sought.append((loss.resolver.sticks, _sticking(particles, sampled)))
    for known, right in sought:
        known |= {row.site: known.get(row.site, True) and row.site in right for row in rows}
    for row in rows:
        wanted = (loss.resolver.integrable[row.site], loss.resolver.sticks.get(row.site, False))
        if wanted != (row.estimator.integrates, row.estimator.sticks is not None):
            site = particles.guide[row.site]
            loss.resolver.table[row.site] = replace(row, kind=())  # to be chosen anew
            loss.resolve(row.site, site.fn, site.infer, plan, site.frames)


def _sticking(particles: Particles, names: list[str]) -> set[str]:
    """Return the sites of which the direct score of log q is had by the arguments of their distribution."""
    known = [] if particles.enumerated else [name for name in names if arguments_of(particles.guide[name].fn)]
    return {name for name in known if not is_downstream(particles, name)}


def _plain(loss: Any, site: Site) -> Situation:
    return Situation(site.name, site.fn, loss.num_particles, loss.objective.name, site.infer)


def _sums(particles: Particles, traits: list) -> bool:
    """Whether a site is enumerated, for which the number of plate dims has to be known beforehand."""
    latents = any("summed_out" in site.infer for site in particles.model.values())
    return latents or any(t.draws == "enumerated" for t in traits)


def check(loss: Any, particles: Particles) -> None:
    check_match(particles)
    check_plates(particles)
    for row in loss.resolver.table.values():
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
            loss.resolve(name, site.fn, site.infer, None, site.frames)
    for name in loss.resolver.by_site:
        if name not in particles.guide and name not in particles.model:
            fail(
                EstimatorError,
                "MonteCarloELBO",
                f"set the estimator of site {name!r}",
                got="no such site in the guide",
                because="estimators belong to the guide's sites",
                fix=nearest(name, particles.guide),
            )
    for name in particles.ignored if loss.annotations else ():
        fail(
            EstimatorError,
            "MonteCarloELBO",
            f"obey the estimator annotation at site {name!r}",
            got='infer={"estimator": ...} in the model',
            because="draws are made by the guide, whose site has no such annotation",
            fix=f'Move it to the guide\'s pyro.sample({name!r}, ...), or write estimator={{"{name}": ...}}.',
        )


def announce(loss: Any) -> None:
    """Log the resolved table, once; that of a loss that is only tried, not at all."""
    rows = (f"  {row.site}: {row.estimator} ({row.why}; cost {row.cost})" for row in loss.table)
    text = "\n".join(rows)
    if text != loss.announced and not loss.is_trial:
        loss.announced = text
        logger.info("estimators per guide site:\n%s", text)
