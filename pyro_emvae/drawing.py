r"""How the sites of a guide are drawn: attached, cut or detached, together, weighted, once per group, or not at all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ._checks import EstimatorError, fail
from .estimators.base import Estimator, Situation, misfit
from .estimators.enumerated import Enumerated
from .objectives import MultiSample
from .particles import plates_of
from .resolving import Plan, follows

__all__ = ["enumerates", "sampler", "treat"]


def treat(loss: Any, plan: Plan, found: dict[str, Estimator] | None = None) -> Callable[[dict], str]:
    """Return how a drawn value is treated.

    Args:
        found: The estimators that `sampler` has resolved in this run, by site.
    """
    keep, found = "cut" if plan.splits else "attach", {} if found is None else found

    def how(msg: dict) -> str:
        site = (msg["name"], msg["fn"], msg["infer"] or {}, plan, functools.partial(plates_of, msg))
        estimator = found.pop(msg["name"], None) or loss.resolve(*site)
        plan.relaxed.pop(msg["name"], None)
        if estimator.traits.draws == "relaxed":
            plan.relaxed[msg["name"]] = (loss.resolver.situation(*site), estimator)
        if estimator.traits.probes == "draws":
            return "hold"
        return keep if estimator.traits.needs_rsample or msg["name"] in plan.relaxed else "detach"

    return how


def sampler(
    loss: Any, plan: Plan, weights: dict[str, Tensor], found: dict[str, Estimator]
) -> Callable[[dict], Tensor | None]:
    """Return what draws in place of a distribution, for estimators that do; it fills in weights and estimators."""

    def given(msg: dict) -> Tensor | None:
        estimator = loss.resolve(msg["name"], msg["fn"], msg["infer"], plan, functools.partial(plates_of, msg))
        found[msg["name"]] = estimator
        above = isinstance(loss.objective, MultiSample) and loss.objective.is_above(plates_of(msg))
        if above and loss.num_particles > 1:
            return _draw_above(loss, plan, msg, estimator)
        if estimator.traits.draws in ("independent", "enumerated"):
            return None
        if loss.num_particles > 1 and not plan.vectorize and estimator.traits.draws != "relaxed":
            _refuse_loop(msg["name"], f"{estimator} draws all of them at once")
        drawn = estimator.draw(msg["fn"], loss.num_particles)
        if drawn is not None and drawn.weight is not None:
            weights[msg["name"]] = loss.num_particles * drawn.weight
        return None if drawn is None else drawn.value

    return given


def enumerates(loss: Any, plan: Plan) -> Callable[[dict], bool]:
    """Return which sites of the guide are summed over; it refuses draws downstream that are not pathwise."""

    def is_summed(msg: dict) -> bool:
        estimator = loss.resolve(msg["name"], msg["fn"], msg["infer"], plan, functools.partial(plates_of, msg))
        if estimator.traits.draws == "enumerated":
            return True
        if len(msg["fn"].batch_shape) > plan.nesting + plan.vectorize and not follows(estimator):
            fail(
                EstimatorError,
                "MonteCarloELBO",
                f"draw site {msg['name']!r} once per outcome",
                got=f"{estimator} downstream of an enumerated site",
                because="only pathwise draws are averaged over the outcomes before them",
                fix=_instead_of_sums(loss, loss.resolver.situation(msg["name"], msg["fn"], {}, plan, None)),
            )
        return False

    return is_summed


def _instead_of_sums(loss: Any, at: Situation) -> str:
    """Say what to write where a draw is downstream of a sum."""
    summed = [row.site for row in loss.resolver.table.values() if row.estimator.traits.draws == "enumerated"]
    drawn = ", ".join(f'"{site}": "leave_one_out"' for site in summed)
    if misfit(Enumerated(), replace(at, upstream=())) is None:
        return f'Use estimator={{"{at.name}": "enumerated"}}, or draw what is upstream: estimator={{{drawn}}}.'
    if at.fn.has_rsample:
        return f'Use estimator={{"{at.name}": "pathwise"}}, or draw what is upstream: estimator={{{drawn}}}.'
    return f"Draw what is upstream too: estimator={{{drawn}}} (two particles or more)."


def _draw_above(loss: Any, plan: Plan, msg: dict, estimator: Estimator) -> Tensor:
    """Draw a global latent once for each group of local particles."""
    if not plan.vectorize:
        _refuse_loop(msg["name"], f"{loss.objective} shares them among local particles")
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
    groups = value.reshape(-1, loss.objective.num_local_particles, *value.shape[1:])
    return groups[:, :1].expand_as(groups).reshape(value.shape)


def _refuse_loop(name: str, because: str) -> None:
    fail(
        EstimatorError,
        "MonteCarloELBO",
        f"draw the particles of site {name!r} together",
        got="particles that are run one by one",
        because=because,
        fix='Let model and guide be vectorized (vectorize_particles=True says why not), or use "leave_one_out".',
    )
