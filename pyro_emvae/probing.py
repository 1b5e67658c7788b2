r"""The model at further values of one site: upstream values kept, downstream ones drawn anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor

from ._checks import EstimatorError, fail
from ._pyro import scale_and_mask
from .estimators.base import Estimator, Probed
from .estimators.partial import has_score_parts
from .estimators.relaxed import log_mass
from .objectives import Objective, Term
from .parameters import reach
from .particles import Dependence, Particles, Site, draw, is_messenger, quiet, run_model, stack_runs, vectorizable
from .surrogate import annealed, group, reaches, reduced, reweighted, side_of, total

__all__ = ["check_relaxed", "differentiates", "price", "probe"]

Pair = tuple[Callable, Callable, tuple, Mapping[str, Any]]


def differentiates(estimator: Estimator) -> bool:
    """Whether the model is differentiated by the values that the estimator asks for."""
    return estimator.traits.probes in ("differentiable", "twice", "draws")


def price(estimator: Estimator) -> int:
    """Return how many model evaluations a further value of a particle counts as: two if it is differentiated twice.

    An evaluation is a run of guide and model and its derivative by the parameters, for one particle. A further value is
    run, and differentiated by the value at most (cheaper than by the parameters); that derivative's own derivative
    takes as long again. A derivative by the draws themselves, whose run there is already, counts as one.
    """
    return 2 if estimator.traits.probes == "twice" else 1


def probe(
    pair: Pair,
    objective: Objective,
    plan: Any,
    particles: Particles,
    site: Site,
    values: Tensor,
    estimator: Estimator,
    shape: torch.Size,
    beta: Tensor | None = None,
) -> Probed:
    r"""Run guide and model at further values of a site and return the learning signal there.

    Guide sites that the value reaches are drawn anew; all others keep the values that the particles have, so that
    what is compared differs in nothing else. Subsampled plates keep their indices, weighted particles their weights.

    Args:
        pair: Model, guide, args, kwargs.
        objective: Whose summands make up the signal.
        plan: What was found out about the pair; for one particle, whether it can be vectorized is added.
        particles: The particles at hand.
        site: The guide's site.
        values: ``(probes, *value.shape)``.
        estimator: Whose trait ``probes`` says whether the signal is differentiated.
        shape: The shape of the signal at the particles.
        beta: A factor of the latents' terms.
    """
    differentiate, twice = differentiates(estimator), estimator.traits.probes == "twice"
    leaf = values.detach().requires_grad_() if differentiate else values.detach()
    with torch.set_grad_enabled(differentiate), _unvalidated(differentiate):
        terms = _terms(pair, objective, plan, particles, site, leaf, estimator, beta)
        inside = all(set(site.frames) <= set(term.frames) for term in terms)
        signal = reduced(group(terms, detach=False), site.frames).reshape(len(values), *shape)
        # a term outside the site's plates is in the signal of each element, and counts once in the derivative
        climbed = signal.sum() if inside else total(terms)
        gradient = torch.autograd.grad(climbed, leaf, create_graph=twice)[0] if differentiate else None
    return Probed(signal if twice else signal.detach(), gradient, leaf, inside)


def _terms(pair, objective, plan, particles, site, values, estimator, beta) -> list[Term]:
    """Return the terms that belong to the site's signal, at its values."""
    depends: Dependence = plan.depends or Dependence()
    if particles.num_particles == 1 and plan.probes is None:
        plan.probes = vectorizable(*pair)[:2]
    vectorize, nesting = plan.probes or (plan.vectorize, particles.max_plate_nesting)
    latents = {n: s for n, s in particles.guide.items() if n != site.name and not s.is_observed}
    if vectorize and plan.shortcut.get(site.name) and _model_alone(pair[1], objective, depends, particles, site):
        terms, probed = _of_model(pair, particles, latents, site, values, nesting, differentiates(estimator))
    else:
        kept = {n: s for n, s in latents.items() if not depends.moves(site.name, "guide", n)}
        kept = {n: s for n, s in kept.items() if n not in particles.enumerated}
        run = _together if vectorize else _one_by_one
        probed = run(pair, particles, kept, site, values, nesting)
        if particles.weights:
            weights = {n: w.repeat(len(values), *(1,) * (w.dim() - 1)) for n, w in particles.weights.items()}
            probed = replace(probed, weights=weights)
        terms = reweighted(objective.terms(probed), probed, depends)
    terms = terms if beta is None else annealed(terms, probed, beta)
    return [term for term in terms if reaches(depends, site.name, estimator, term)]


def _model_alone(guide: Callable, objective: Objective, depends: Dependence, particles: Particles, site: Site) -> bool:
    """Whether the guide says nothing new at other values of a site, so that only the model has to be run."""
    summed = particles.enumerated or particles.weights or getattr(objective, "kl", "sampled") != "sampled"
    reached = any(name != site.name and depends.moves(site.name, "guide", name) for name in particles.guide)
    return not (summed or reached or site.runs or is_messenger(guide))


def find_shortcut(pair: Pair, objective: Objective, plan: Any, particles: Particles, site: Site, e: Estimator) -> bool:
    """Note in the plan whether a run of the model alone says at two more draws what one of guide and model says.

    It does not where the guide leaves the model something that is no site. Return whether anything was run.
    """
    if not _model_alone(pair[1], objective, plan.depends or Dependence(), particles, site):
        plan.shortcut[site.name] = False
        return False
    found = []
    with quiet(seed=0, train=False), torch.no_grad():
        values = torch.stack([site.fn.sample(), site.fn.sample()])
        for plan.shortcut[site.name] in (True, False):  # a run of the guide would leave what the model finds
            try:
                terms = _terms(pair, objective, plan, particles, site, values, e, None)
            except Exception:  # any failure of a run that the user did not ask for is the answer
                terms = []
            found.append({(term.site, term.kind): term.value for term in terms})
    alone, both = found
    plan.shortcut[site.name] = (
        bool(both) and both.keys() == alone.keys() and all(map(_alike, both.values(), alone.values()))
    )
    return True


def _alike(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.allclose(one, two, rtol=1e-4, atol=1e-5, equal_nan=True)


def _of_model(
    pair: Pair, particles: Particles, latents: Mapping, site: Site, values: Tensor, nesting: int, relaxed: bool
) -> tuple[list[Term], Particles]:
    """Run the model alone on all probes of all particles, probes first; log q of other sites is as it was."""
    model, _, args, kwargs = pair
    count = len(values) * particles.num_particles

    def rows(x: Tensor) -> Tensor:
        """Put probes and particles of a density, ``(probes, particles?, *plates)``, into one dim."""
        plates = x.shape[1 + (particles.num_particles > 1) :]
        return x.reshape(count, *(1,) * (nesting - len(plates)), *plates)

    given = {n: (v, particles.guide[n].infer) for n, v in _given(particles, latents, site, values, nesting).items()}
    sites = run_model(model, args, kwargs, given | _indices(particles), count, nesting, particles.latents.keys())
    log_q = log_mass(site.fn, values) if relaxed else None
    own = rows(scale_and_mask(site.fn.log_prob(values) if log_q is None else log_q, site.scale, site.mask))

    def spread(x: Tensor) -> Tensor:
        """Give what does not depend on the probes a row for each."""
        return x if x.dim() > nesting or count == 1 else x.expand(count, *(1,) * (nesting - x.dim()), *x.shape)

    terms = [Term(n, "log_p", s.frames, spread(s.scaled)) for n, s in sites.items()]
    terms.append(Term(site.name, "entropy", site.frames, -own))
    for name, other in particles.guide.items():
        if name != site.name:
            again = particles.rows(other.scaled).expand(particles.num_particles, *(-1,) * nesting)
            terms.append(Term(name, "entropy", other.frames, -again.repeat(len(values), *(1,) * nesting)))
    return terms, replace(particles, model=sites)


def check_relaxed(
    pair: Pair, objective: Objective, plan: Any, particles: Particles, site: Site, estimator: Estimator
) -> None:
    """Run guide and model halfway between the values of a binary site, and see that they can be differentiated there.

    Raises:
        EstimatorError: A guide site that the value reaches has no path; the model raises there, or is not finite, or a
            term that the value reaches has no derivative, or another than it moves by: steps, or a density that is
            differentiated by some of its arguments only (Pyro's Binomial, by its number of trials).
    """
    depends: Dependence = plan.depends or Dependence()
    for name, other in particles.guide.items():
        reached = name != site.name and not other.is_observed and depends.moves(site.name, "guide", name)
        if reached and (not other.fn.has_rsample or has_score_parts(other.fn)):
            _refuse(site, estimator, f"guide site {name!r} downstream", "has no reparameterised sampler")
    half = torch.full_like(site.value, 0.5)
    signs = 1 - 2 * (torch.arange(half.numel(), device=half.device) % 2).to(half).reshape(half.shape)
    leaf, step = half[None].requires_grad_(), 0.02

    def at(values: Tensor) -> list[Term]:
        with quiet(seed=0, validate=False), torch.enable_grad():
            terms = _terms(pair, objective, plan, particles, site, values, estimator, None)
        return [term for term in terms if depends.moves(site.name, side_of(term), term.site)]

    try:
        terms, above, below = at(leaf), at((half + step * signs)[None]), at((half - step * signs)[None])
    except Exception as error:  # any failure of the user's code at such a value is the answer
        _refuse(site, estimator, f"{type(error).__name__} ({str(error)[:200]})", "is an error", error)
    for term, high, low in zip(terms, above, below, strict=True):
        where, value = f"the term of {term.site!r} at the value 0.5", term.value.detach()
        if not bool(torch.isfinite(value).all()):
            _refuse(site, estimator, where, "is not finite")
        if id(leaf) not in reach([term.value]):
            _refuse(site, estimator, where, "has no derivative (the value is compared, indexes, or is made integer)")
        ones = torch.ones_like(value)
        slope = float((torch.autograd.grad(term.value, leaf, ones, retain_graph=True)[0] * signs).sum())
        moved = float((high.value - low.value).detach().double().sum()) / (2 * step)
        rounding = 20 * torch.finfo(value.dtype).eps * float(value.abs().sum()) / step
        if abs(slope - moved) > 0.05 * (abs(slope) + abs(moved)) + rounding:
            _refuse(site, estimator, where, f"moves by {moved:.3g} and has the derivative {slope:.3g}")


def _refuse(site: Site, estimator: Estimator, got: str, what: str, cause: BaseException | None = None) -> None:
    fail(
        EstimatorError,
        type(estimator).__name__,
        f"differentiate the model by site {site.name!r}",
        got=f"{got}, which {what}",
        because="its control variate needs the model at relaxed values between 0 and 1, and the derivative there",
        fix='Use estimator="leave_one_out" or "disarm".',
        cause=cause,
    )


def _together(pair: Pair, particles: Particles, kept: Mapping, site: Site, values: Tensor, nesting: int) -> Particles:
    """Run all probes of all particles under one particle plate, probes first."""
    given = {name: (value, None) for name, value in _given(particles, kept, site, values, nesting).items()}
    options = {"num_particles": len(values) * particles.num_particles, "vectorize": True, "max_plate_nesting": nesting}
    return draw(*pair, **options, values=given | _indices(particles), enumerate_site=_again(particles))


def _given(particles: Particles, kept: Mapping, site: Site, values: Tensor, nesting: int) -> dict[str, Tensor]:
    """Return the values of a site and of the sites that keep theirs, for all probes of all particles."""
    count, given = len(values), {}
    for name, other in {**kept, site.name: site}.items():
        value = values if name == site.name else other.value.expand(count, *other.value.shape)
        event = other.value.shape[other.value.dim() - other.fn.event_dim :]
        batch = other.value.shape[: other.value.dim() - other.fn.event_dim]
        batch = (1,) * (nesting + 1 - len(batch)) + tuple(batch)
        rows = value.reshape(count, *batch, *event).expand(count, particles.num_particles, *batch[1:], *event)
        given[name] = rows.reshape(-1, *batch[1:], *event) if rows.shape[:2] != (1, 1) else value[0]
    return given


def _one_by_one(pair: Pair, particles: Particles, kept: Mapping, site: Site, values: Tensor, nesting: int) -> Particles:
    runs = []
    for value in values:
        for k in range(particles.num_particles):
            given = {name: (other.runs[k].value if other.runs else other.value, None) for name, other in kept.items()}
            own = value[k].reshape(site.runs[k].value.shape) if site.runs else value
            given[site.name] = (own, None)
            options = {"max_plate_nesting": nesting, "enumerate_site": _again(particles)}
            runs.append(draw(*pair, values=given | _indices(particles, k), **options))
    return stack_runs(runs)


def _again(particles: Particles) -> Callable[[dict], bool]:
    return lambda msg: msg["name"] in particles.enumerated


def _indices(particles: Particles, run: int = 0) -> dict[str, tuple[Tensor, None]]:
    """Return the minibatch of a particle as given values; particles that are run one by one differ in it."""
    subsample = particles.batches[run] if particles.batches else particles.subsample
    return {name: (index, None) for name, index in subsample.items()}


def _unvalidated(off: bool) -> Any:
    """Let relaxed values be scored by distributions whose support they lie beside."""
    return pyro.validation_enabled(False) if off else contextlib.nullcontext()
