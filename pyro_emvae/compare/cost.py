r"""Rows that cost the same: more particles for cheap ones, or averages of repeated gradients."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from .._checks import EmvaeError, EstimatorError, fail, nearest, number
from .replicates import Problem, time_gradient
from .rows import Row, evaluations, warm_up

__all__ = ["COSTS", "check_equal", "equalize"]

COSTS = ("evaluations", "milliseconds")
MOST = 4096  # times its particles that a row may get for equal time


def check_equal(equal: Any, budget: Any) -> None:
    """Raise if `equal` is no cost, or `budget` no positive number or without one."""
    if equal is not None and equal not in COSTS:
        fail(
            EmvaeError,
            "compare_gradients",
            "let rows cost the same",
            got=f"equal={equal!r}",
            because="a gradient's cost is counted in model evaluations or measured in milliseconds",
            fix=nearest(str(equal), COSTS),
        )
    if budget is None:
        return
    if equal is None:
        fail(
            EmvaeError,
            "compare_gradients",
            "keep to a budget",
            got=f"budget={budget!r} with equal=None",
            because="a budget is a cost that all rows are given",
            fix='Write equal="evaluations", or equal="milliseconds".',
        )
    number("compare_gradients", "budget", budget, "above 0", lambda x: x > 0, 8)


def equalize(rows: list[Row], problem: Problem, equal: str, budget: float | None) -> float:
    """Give each row as many particles, or repeats, as the budget allows; return the budget.

    A row whose least cost is beyond the budget is `too_dear`: it says so, and is not run. If all rows are, that is an
    error.
    """
    measure = _count if equal == "evaluations" else _time
    costs = [measure(row, problem) for row in rows]
    limit = max(costs) if budget is None else float(budget)
    errors = []
    for row, cost in zip(rows, costs, strict=True):
        try:
            _give(row, problem, cost, equal, limit)
        except _TooDear as error:
            row.too_dear = str(error)
            errors.append(error)
    if len(errors) == len(rows):
        raise errors[0]
    return limit


class _TooDear(EmvaeError):
    """A row's least cost is beyond the budget."""


def _give(row: Row, problem: Problem, cost: float, equal: str, limit: float) -> None:
    if row.make is None:
        repeats = int(limit // cost)
        if not repeats:
            _refuse(row.name, cost, row.loss.num_particles, equal, limit)
        row.repeats = repeats
    elif equal == "evaluations":
        _most_by_count(row, problem, limit)
    else:
        _most_by_time(row, problem, cost, limit)


def _refuse(name: str, cost: float, particles: int, equal: str, limit: float) -> None:
    fail(
        _TooDear,
        "compare_gradients",
        f"give row {name!r} a cost of {limit:.4g} {equal}",
        got=f"{cost:.4g} for {particles} particle{'s' * (particles > 1)}, its least",
        because="a row cannot cost less than one gradient",
        fix=f"Write budget={cost:.4g}, or more.",
    )


def _count(row: Row, problem: Problem) -> float:
    return float(evaluations(row.loss))


def _time(row: Row, problem: Problem, turns: int = 5) -> float:
    return median([time_gradient(row, problem) for _ in range(turns)])


def _trial(row: Row, particles: int, problem: Problem) -> Row | None:
    """Return the row with another number of particles, or None if its estimators do not take that many."""
    trial = Row(row.name, row.make(particles), row.make)
    try:
        warm_up(trial, *problem.pair)
    except EstimatorError:
        return None
    return trial


def _most_by_count(row: Row, problem: Problem, limit: float) -> None:
    """Find the most particles whose evaluations are within the limit, from above: each particle is at least one.

    Counts grow by a constant per particle (probes, pairs) from a constant, so that the proportion of limit and count
    never steps below the answer.
    """
    particles, cost, least = int(limit), float("nan"), 1
    while particles >= 1:
        trial = _trial(row, particles, problem)
        if trial is not None:
            cost, least = _count(trial, problem), particles
            if cost <= limit:
                row.loss = trial.loss
                return
            particles = min(particles - 1, int(particles * limit / cost))
        else:
            particles -= 1
    _refuse(row.name, cost if cost == cost else _count(row, problem), least, "evaluations", limit)


def _most_by_time(row: Row, problem: Problem, cost: float, limit: float) -> None:
    """Find the most particles whose time is within the limit, to a tenth: doubling, then halving the interval."""
    start = row.loss.num_particles

    def fits(particles: int) -> bool:
        trial = _trial(row, particles, problem)
        if trial is None:
            return False
        within = _time(trial, problem) <= limit
        if within:
            row.loss = trial.loss
        return within

    low, high = (start, None) if cost <= limit else (0, start)
    low, high = _double(fits, low, start) if high is None else (low, high)
    while high - low > max(1, low // 10):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if not low:
        _refuse(row.name, cost, start, "milliseconds", limit)


def _double(fits: Callable[[int], bool], low: int, start: int) -> tuple[int, int]:
    while low < MOST * start and fits(2 * low):
        low *= 2
    return low, 2 * low if low < MOST * start else low
