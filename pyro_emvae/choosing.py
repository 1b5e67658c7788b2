r"""`estimator="probe"`: which estimator a site keeps is found out at run time, from a twentieth of the evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._checks import EmvaeError
from .estimators.base import State
from .particles import quiet
from .surrogate import States

__all__ = ["PROBE", "SHARE", "accounted", "begin", "best", "due", "learn", "trial"]

PROBE = "(probe)"
"""Where the states of a loss keep what was found; no site has this name."""

SHARE = 0.05
LEAST = 4
WINDOW = 32
Sites = Mapping[str, tuple[str, ...]]


def begin(sites: Sites) -> State:
    """Return the record before the first trial: per site and candidate, mean squared norm, trials and cost."""
    record = {name: torch.zeros((), dtype=torch.float64) for name in ("used", "spent", "turn")}
    for site, names in sites.items():
        for name in names:
            record |= {
                f"{site}|{name}|{what}": torch.zeros((), dtype=torch.float64) for what in ("mean", "count", "cost")
            }
    return record


def accounted(before: States, after: States, evaluations: int) -> States:
    """Add the model evaluations of a gradient to the record, which the estimators of the sites do not know."""
    if PROBE not in before:
        return after
    record = before[PROBE]
    return {**after, PROBE: {**record, "used": record["used"] + evaluations}}


def due(record: State, sites: Sites, num_particles: int) -> tuple[str, str] | None:
    """Return the site and the candidate whose turn it is, if its trial keeps within the share of all evaluations."""
    pairs = [(site, name) for site, names in sites.items() for name in names]
    pairs = [(s, n) for s, n in pairs if math.isfinite(float(record[f"{s}|{n}|cost"]))]
    if not pairs:
        return None
    site, name = pairs[int(record["turn"]) % len(pairs)]
    cost = max(float(record[f"{site}|{name}|cost"]), num_particles)
    return (site, name) if float(record["spent"]) + cost <= SHARE * float(record["used"]) else None


def trial(loss: Any, pair: tuple[Callable, Callable, tuple, Mapping], state: States) -> tuple[Tensor, States] | None:
    """Return the squared norm of a gradient at the present parameters and the next state; nothing else is changed.

    None if the estimators do not go together: that one is then tried no more.
    """
    model, guide, args, kwargs = pair
    with quiet():
        try:
            evaluation = loss.evaluate(model, guide, args, kwargs, state)
        except EmvaeError:
            return None
        grads = evaluation.descent(evaluation.leaves)
    total = torch.zeros((), dtype=torch.float64)
    return sum((g.double().square().sum().to(total) for g in grads.values()), total), evaluation.state


def learn(record: State, site: str, name: str, square: Tensor | None, evaluations: int) -> State:
    """Return the record after a trial."""
    key = f"{site}|{name}"
    new = {**record, "turn": record["turn"] + 1}
    if square is None:
        return {**new, f"{key}|cost": torch.full_like(record["used"], math.inf)}
    new["spent"] = record["spent"] + evaluations
    if not bool(torch.isfinite(square)):
        return new
    count = record[f"{key}|count"] + 1
    mean = record[f"{key}|mean"]
    new[f"{key}|count"] = count
    new[f"{key}|mean"] = mean + (square.detach().cpu() - mean) / count.clamp(max=WINDOW)
    new[f"{key}|cost"] = torch.full_like(count, float(evaluations))
    return new


def best(record: State, site: str, names: tuple[str, ...]) -> str | None:
    r"""Return the candidate with the least $E\lVert g\rVert^2$ times cost; None before all have had their trials."""
    scores = {}
    for name in names:
        cost, count = (float(record[f"{site}|{name}|{what}"]) for what in ("cost", "count"))
        if not math.isfinite(cost):
            continue
        if count < LEAST:
            return None
        scores[name] = float(record[f"{site}|{name}|mean"]) * cost
    return min(scores, key=scores.__getitem__) if scores else None
