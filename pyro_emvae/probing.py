r"""The model at further values of one site: upstream values kept, downstream ones drawn anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from .estimators.base import Estimator, Probed
from .objectives import Objective
from .particles import Dependence, Particles, Site, draw, stack_runs, vectorizable
from .surrogate import group, reaches, reduced

__all__ = ["probe"]

Pair = tuple[Callable, Callable, tuple, Mapping[str, Any]]


def probe(
    pair: Pair,
    objective: Objective,
    plan: Any,
    particles: Particles,
    site: Site,
    values: Tensor,
    estimator: Estimator,
    shape: torch.Size,
) -> Probed:
    r"""Run guide and model at further values of a site and return the learning signal there.

    Guide sites that the value reaches are drawn anew; all others keep the values that the particles have, so that
    what is compared differs in nothing else. Subsampled plates keep their indices.

    Args:
        pair: Model, guide, args, kwargs.
        objective: Whose summands make up the signal.
        plan: What was found out about the pair; for one particle, whether it can be vectorized is added.
        particles: The particles at hand.
        site: The guide's site.
        values: ``(probes, *value.shape)``.
        estimator: Whose trait ``probes`` says whether the signal is differentiated.
        shape: The shape of the signal at the particles.
    """
    depends: Dependence = plan.depends or Dependence()
    if particles.num_particles == 1 and plan.probes is None:
        plan.probes = vectorizable(*pair)[:2]
    vectorize, nesting = plan.probes or (plan.vectorize, particles.max_plate_nesting)
    kept = {n: s for n, s in particles.guide.items() if n != site.name and not depends.moves(site.name, "guide", n)}
    kept = {n: s for n, s in kept.items() if not s.is_observed and n not in particles.enumerated}
    differentiate = estimator.traits.probes == "differentiable"
    leaf = values.detach().requires_grad_(differentiate)
    with torch.set_grad_enabled(differentiate), _unvalidated(differentiate):
        run = _together if vectorize else _one_by_one
        probed = run(pair, particles, kept, site, leaf, nesting)
        terms = [term for term in objective.terms(probed) if reaches(depends, site.name, estimator, term)]
        signal = reduced(group(terms, detach=False), site.frames).reshape(len(values), *shape)
        gradient = torch.autograd.grad(signal.sum(), leaf)[0] if differentiate else None
    return Probed(signal.detach(), gradient)


def _together(pair: Pair, particles: Particles, kept: Mapping, site: Site, values: Tensor, nesting: int) -> Particles:
    """Run all probes of all particles under one particle plate, probes first."""
    count, given = len(values), {}
    for name, other in {**kept, site.name: site}.items():
        value = values if name == site.name else other.value.expand(count, *other.value.shape)
        event = other.value.shape[other.value.dim() - other.fn.event_dim :]
        batch = other.value.shape[: other.value.dim() - other.fn.event_dim]
        batch = (1,) * (nesting + 1 - len(batch)) + tuple(batch)
        rows = value.reshape(count, *batch, *event).expand(count, particles.num_particles, *batch[1:], *event)
        given[name] = (rows.reshape(-1, *batch[1:], *event) if rows.shape[:2] != (1, 1) else value[0], None)
    options = {"num_particles": count * particles.num_particles, "vectorize": True, "max_plate_nesting": nesting}
    return draw(*pair, **options, values=given | _indices(particles), enumerate_site=_again(particles))


def _one_by_one(pair: Pair, particles: Particles, kept: Mapping, site: Site, values: Tensor, nesting: int) -> Particles:
    runs = []
    for value in values:
        for k in range(particles.num_particles):
            given = {name: (other.runs[k].value if other.runs else other.value, None) for name, other in kept.items()}
            own = value[k].reshape(site.runs[k].value.shape) if site.runs else value
            given[site.name] = (own, None)
            options = {"max_plate_nesting": nesting, "enumerate_site": _again(particles)}
            runs.append(draw(*pair, values=given | _indices(particles), **options))
    return stack_runs(runs)


def _again(particles: Particles) -> Callable[[dict], bool]:
    return lambda msg: msg["name"] in particles.enumerated


def _indices(particles: Particles) -> dict[str, tuple[Tensor, None]]:
    return {name: (index, None) for name, index in particles.subsample.items()}


def _unvalidated(off: bool) -> Any:
    """Let relaxed values be scored by distributions whose support they lie beside."""
    return pyro.validation_enabled(False) if off else contextlib.nullcontext()
