r"""What a row of the comparison is: a loss, how often it runs the model, and whether its mean is the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer import ELBO, JitTrace_ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor

from .. import objectives
from .._checks import EmvaeError, EstimatorError, fail
from .._registry import entries
from ..estimators.base import Estimator, Situation, is_point_mass, misfit
from ..loss import MonteCarloELBO
from ..particles import draw

__all__ = ["Row", "is_unbiased", "make_row", "specifications", "warm_up"]

BURN_IN = 50


@dataclass
class Row:
    """One estimator: its loss, how to make that of another number of particles, and its gradients by block.

    `make` is None where the number of particles is the user's, or another one would be another objective: such a row
    is made dearer by averaging `repeats` gradients. ``samples``: (replicates, coordinates).
    """

    name: str
    loss: Any
    make: Callable[[int], Any] | None = None
    repeats: int = 1
    unbiased: bool = False
    biased: bool = False
    samples: dict[str, Tensor] = field(default_factory=dict)
    milliseconds: float = float("nan")
    looped: str = ""
    too_dear: str = ""

    @property
    def evaluations(self) -> int:
        """How often one gradient runs the model."""
        return self.repeats * evaluations(self.loss)


def evaluations(loss: Any) -> int:
    """Return the model evaluations of one gradient; of a loss that does not count them, its particles."""
    found = getattr(loss, "evaluations", None)
    return loss.num_particles if found is None else found


def specifications(model, guide, args, kwargs, estimators, num_particles, objective) -> list[tuple[str, Any]]:
    """Return a label and a specification for each row that the user asked for."""
    if estimators is None:
        with torch.no_grad():
            sites = draw(model, guide, args, kwargs).guide.values()
        sites = [site for site in sites if not site.is_observed]
        if not isinstance(objective, objectives.ELBO):
            return labelled(_fitting(sites, num_particles, objective))
        fns = [site.fn for site in sites]
        pathwise = ["pathwise"] if all(fn.has_rsample for fn in fns) else []
        several = ["leave_one_out"] if num_particles > 1 else []
        estimators = ["score", *several, *pathwise, Trace_ELBO(num_particles=num_particles)]
    return labelled(estimators)


def _fitting(sites: list[Any], num_particles: int, objective: Any) -> list[str]:
    """Return the registered unbiased estimators that differentiate the objective and fit all sites."""
    several = isinstance(objective, objectives.MultiSample)
    places = [Situation(s.name, s.fn, num_particles, objective.name, multi_sample=several) for s in sites]
    parts = [(e.name, e.factory()) for e in entries("estimator") if e.traits.unbiased and not e.traits.arguments]
    return [name for name, part in parts if all(misfit(part, at) is None for at in places)]


def labelled(estimators: Iterable[Any] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return pairs of a label of its own and a specification."""
    if isinstance(estimators, str | Estimator | ELBO):
        estimators = [estimators]
    if not estimators:
        fail(
            EmvaeError,
            "compare_gradients",
            "compare gradients",
            got=f"estimators={estimators!r}",
            because="there has to be a row",
            fix='Write estimators=["score", "pathwise", Trace_ELBO()].',
        )
    if isinstance(estimators, Mapping):
        return list(estimators.items())
    specs: dict[str, Any] = {}
    for spec in estimators:
        name = _label(spec)
        count = sum(n == name or n.startswith(f"{name} (") for n in specs)
        specs[name if not count else f"{name} ({count + 1})"] = spec
    return list(specs.items())


def _label(spec: Any) -> str:
    if isinstance(spec, str):
        return spec
    if isinstance(spec, Mapping):
        return ", ".join(f"{site}: {_label(part)}" for site, part in spec.items())
    return type(spec).__name__ if isinstance(spec, ELBO) else repr(spec)


def make_row(name: str, spec: Any, num_particles: int, objective: Any) -> Row:
    """Return the row of a specification; a loss that the user gave is copied."""
    if isinstance(spec, ELBO):
        if not isinstance(spec, MonteCarloELBO):
            return Row(name, _twin(spec))
        own = spec.fresh()
        own.state = dict(spec.state)
        return Row(name, own)
    if not isinstance(spec, str | Estimator | Mapping) and not callable(spec):
        fail(
            EstimatorError,
            "compare_gradients",
            f"use row {name!r}",
            got=type(spec).__name__,
            because="a row is a name, an estimator, a mapping or a pyro.infer.ELBO",
            fix='Write estimators=["score", "pathwise", Trace_ELBO()].',
        )
    annotations = isinstance(spec, Mapping)

    def make(number: int) -> MonteCarloELBO:
        return MonteCarloELBO(number, estimator=spec, objective=objective, annotations=annotations)

    loss = make(num_particles)
    return Row(name, loss, make if isinstance(loss.objective, objectives.ELBO) else None)


def _twin(loss: ELBO) -> ELBO:
    """Return a shallow copy; `copy.copy` would leave a mark on Pyro's class (``__slotnames__``)."""
    twin = object.__new__(type(loss))
    twin.__dict__.update(loss.__dict__)
    return twin


def is_unbiased(row: Row, model, guide, args, kwargs, objective: Any) -> bool:
    """Whether the row's mean is the gradient of `objective`, as far as traits and Pyro's documentation say so.

    `Trace_ELBO` leaves auxiliary sites of the guide out of the score function's signal.
    """
    of_elbo = isinstance(objective, objectives.ELBO)
    if isinstance(row.loss, MonteCarloELBO):
        own = row.loss.objective
        same = isinstance(own, objectives.ELBO) if of_elbo else own == objective
        return same and all(resolution.estimator.traits.unbiased for resolution in row.loss.table)
    if not of_elbo or isinstance(row.loss, TraceGraph_ELBO | TraceMeanField_ELBO | TraceEnum_ELBO):
        return of_elbo
    with torch.no_grad():
        sites = draw(model, guide, args, kwargs).guide.values()
    auxiliary = any(s.infer.get("is_auxiliary") and not is_point_mass(s.fn) for s in sites)
    return type(row.loss) in (Trace_ELBO, JitTrace_ELBO) and not auxiliary


def warm_up(row: Row, model, guide, args, kwargs) -> None:
    """Check the row on the problem; let a stateful estimator see a few steps, so that it is compared in use."""
    if not isinstance(row.loss, MonteCarloELBO):
        return
    evaluation = row.loss.evaluate(model, guide, args, kwargs)
    row.loss.state = evaluation.state
    for _ in range(BURN_IN if evaluation.state else 0):
        row.loss.state = row.loss.evaluate(model, guide, args, kwargs).state
