r"""Which estimator a site gets when nobody named one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._checks import EstimatorError, fail, nearest
from .._registry import create, entries, lookup
from ..particles import is_annotated, num_outcomes
from .base import Estimator, Situation, is_point_mass, misfit
from .partial import PartialPathwise, has_score_parts
from .pathwise import Pathwise
from .score import Score

__all__ = ["POLICIES", "auto", "auto_table", "from_user", "pyro"]

Choice = tuple[Estimator, str]
Policy = Callable[[Situation], Choice]


def pyro(at: Situation) -> Choice:
    """Choose as `Trace_ELBO` does: pathwise where ``rsample`` exists, else the score function of all terms."""
    if at.fn.has_rsample:
        return _pathwise(at.fn, reach="all")
    return Score(reach="all"), "no rsample"


def auto(at: Situation) -> Choice:
    """Choose the first unbiased candidate that fits, in the order of the trait ``auto``: see `auto_table`."""
    if is_point_mass(at.fn) or (at.fn.has_rsample and has_score_parts(at.fn)):
        return _pathwise(at.fn)
    for entry in _candidates():
        estimator = entry.factory()
        summed = entry.traits.draws == "enumerated"
        if summed and not (at.enumerable or at.below):
            continue
        if misfit(estimator, at) is None:
            if summed:
                return estimator, _why_summed(at)
            return estimator, f"first of auto's candidates that fits ({entry.summary})"
    return Score(), "nothing else fits"


def _why_summed(at: Situation) -> str:
    asked = 'infer={"enumerate": "parallel"}' if is_annotated(at.infer) else "right at each of them and cheap"
    return f"its {num_outcomes(at.fn)} outcomes are summed exactly: {asked}"


POLICIES: dict[str, Policy] = {"pyro": pyro, "auto": auto}


def auto_table() -> list[dict[str, Any]]:
    """Return auto's candidates in order: name, what they need, and a line about them.

    Example:
        >>> [row["estimator"] for row in auto_table()][:2]
        ['enumerated', 'pathwise']
    """
    return [
        {
            "estimator": e.name,
            "needs_rsample": e.traits.needs_rsample,
            "support": e.traits.support,
            "min_particles": e.traits.min_particles,
            "summary": e.summary,
        }
        for e in _candidates()
    ]


def _candidates() -> list:
    rows = [e for e in entries("estimator") if e.traits.auto is not None and e.traits.unbiased]
    return sorted(rows, key=lambda entry: entry.traits.auto)


def _pathwise(fn: Any, reach: str = "downstream") -> Choice:
    if is_point_mass(fn):
        return Pathwise(), "deterministic"
    if has_score_parts(fn):
        return PartialPathwise(reach), "its sampler is reparameterised in part"
    return Pathwise(), "has rsample"


def from_user(spec: Any) -> Estimator | Policy:
    """Return a policy or an estimator for what the user gave: a name, an instance or a policy.

    A policy is a function of a `Situation` that returns an estimator and why.

    Raises:
        EstimatorError: If the name is unknown (with the nearest known one) or the object is no estimator.
    """
    if isinstance(spec, str):
        if spec in POLICIES:
            return POLICIES[spec]
        known = [*POLICIES, *(n for e in entries("estimator") for n in (e.name, *e.aliases))]
        if spec not in known:
            fail(
                EstimatorError,
                "MonteCarloELBO",
                f"use estimator {spec!r}",
                got="an unknown name",
                because="no estimator or policy of that name is registered",
                fix=nearest(spec, known),
            )
        return create("estimator", lookup("estimator", spec).name)
    if isinstance(spec, Estimator) or (callable(spec) and not isinstance(spec, type)):
        return spec
    fail(
        EstimatorError,
        "MonteCarloELBO",
        f"use estimator {spec!r}",
        got=type(spec).__name__,
        because="an estimator is a registered name, an instance or a mapping from site to one of these",
        fix='Write estimator="auto", or estimator={"z": "leave_one_out"}.',
    )
