r"""Schedules by which a run starts from an easier objective, and ends at the one that was asked for.

A schedule gives a factor $\beta_t\in[0,1]$ per iteration, which has to be 1 before the run ends.

* Gradient steps of a guide climb $E_q[\log p_\theta(x|z)]+\beta_t\,E_q[\log p_\theta(z)-\log q_\phi(z)]$: the terms of
  all latents are scaled, in model *and* guide, so that at each $\beta$ it is a bound (Sonderby et al. 2016).
* An exact E-step takes $q(z)\propto p_\theta(x,z)^{\beta_t}$: deterministic annealing (Ueda and Nakano 1998). One that
  draws draws from it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ._checks import EmvaeError, fail, positive_int

__all__ = ["Cyclic", "Geometric", "Linear", "Schedule", "checked"]


class Schedule(ABC):
    """A factor per iteration; ``ends`` is the first iteration from which on it is 1."""

    @property
    @abstractmethod
    def ends(self) -> int:
        """Return the first iteration from which on the factor is 1."""

    @abstractmethod
    def factor(self, iteration: int) -> float:
        """Return the factor of an iteration, the first of which is 0."""


@dataclass(frozen=True)
class Linear(Schedule):
    r"""$\beta_t=b+(1-b)\,t/w$ for the first w iterations, then 1.

    When to use: warm-up of the KL of a variational autoencoder.

    Args:
        warm_up: w, iterations below 1.
        start: b, the first factor. An exact E-step needs it above 0.

    Raises:
        EmvaeError: `start` outside [0, 1), or `warm_up` not a positive whole number.

    Source: Bowman et al. 2016, who scale the prior's side alone where the two are one KL.

    Example:
        >>> [Linear(4).factor(t) for t in (0, 2, 4, 9)]
        [0.0, 0.5, 1.0, 1.0]
    """

    warm_up: int
    start: float = 0.0

    def __post_init__(self) -> None:
        positive_int("annealing.Linear", "warm_up", self.warm_up)
        _check_start("Linear", self.start, self.start >= 0, "[0, 1)")

    @property
    def ends(self) -> int:
        return self.warm_up

    def factor(self, iteration: int) -> float:
        return min(1.0, self.start + (1.0 - self.start) * iteration / self.warm_up)


@dataclass(frozen=True)
class Geometric(Schedule):
    r"""$\beta_t=b^{1-t/w}$ for the first w iterations, then 1: a temperature $1/\beta$ that falls by a constant factor.

    When to use: deterministic annealing of a mixture.

    Args:
        warm_up: w, iterations below 1.
        start: b, the first factor.

    Raises:
        EmvaeError: `start` outside (0, 1), or `warm_up` not a positive whole number.

    Source: Ueda and Nakano 1998, section 4.

    Example:
        >>> [round(Geometric(2, start=0.01).factor(t), 12) for t in (0, 1, 2)]
        [0.01, 0.1, 1.0]
    """

    warm_up: int
    start: float = 0.1

    def __post_init__(self) -> None:
        positive_int("annealing.Geometric", "warm_up", self.warm_up)
        _check_start("Geometric", self.start, self.start > 0, "(0, 1)")

    @property
    def ends(self) -> int:
        return self.warm_up

    def factor(self, iteration: int) -> float:
        return min(1.0, self.start ** max(0.0, 1.0 - iteration / self.warm_up))


@dataclass(frozen=True)
class Cyclic(Schedule):
    r"""Cycles that rise linearly from b to 1 in their first part and stay there for the rest; after the last one, 1.

    Args:
        period: Iterations of a cycle.
        cycles: Number of cycles.
        ramp: Part of a cycle in which it rises, in (0, 1].
        start: b, the factor at the beginning of each cycle.

    Raises:
        EmvaeError: An argument out of its range.

    Source: Fu et al. 2019, "Cyclical annealing schedule".

    Example:
        >>> rule = Cyclic(period=4, cycles=2)
        >>> [rule.factor(t) for t in range(9)], rule.ends
        ([0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0], 6)
    """

    period: int
    cycles: int = 4
    ramp: float = 0.5
    start: float = 0.0

    def __post_init__(self) -> None:
        positive_int("annealing.Cyclic", "period", self.period)
        positive_int("annealing.Cyclic", "cycles", self.cycles)
        _check_start("Cyclic", self.start, self.start >= 0, "[0, 1)")
        if not 0 < self.ramp <= 1:
            _refuse("annealing.Cyclic", "use ramp", repr(self.ramp), "it is a part of a cycle", "Write ramp=0.5.")

    @property
    def ends(self) -> int:
        return (self.cycles - 1) * self.period + math.ceil(self.ramp * self.period)

    def factor(self, iteration: int) -> float:
        if iteration >= self.ends:
            return 1.0
        place = (iteration % self.period) / (self.ramp * self.period)
        return min(1.0, self.start + (1.0 - self.start) * place)


@dataclass(frozen=True)
class _Given(Schedule):
    """A user's function, looked at over the whole run."""

    function: Callable[[int], float]
    total: int

    @property
    def ends(self) -> int:
        return max((t + 1 for t in range(self.total) if self.factor(t) != 1.0), default=0)

    def factor(self, iteration: int) -> float:
        value = self.function(iteration)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            _refuse(
                "run",
                f"anneal iteration {iteration}",
                repr(value),
                "a factor is a number from 0 to 1",
                "Write anneal=lambda t: min(1.0, t / 100), or annealing.Linear(100).",
            )
        return float(value)


def checked(anneal: Any, total: int | None) -> Schedule | None:
    r"""Return the schedule of a run.

    Args:
        anneal: A `Schedule`, a function of the iteration, or None.
        total: Iterations of the run at most; None if that is not known.

    Raises:
        EmvaeError: It does not reach 1 within the run, so that what is fitted would not be what was asked for.
    """
    if anneal is None:
        return None
    if not isinstance(anneal, Schedule) and (isinstance(anneal, type) or not callable(anneal)):
        because = "a schedule gives a factor per iteration"
        _refuse("run", f"use anneal={anneal!r}", type(anneal).__name__, because, "Write anneal=annealing.Linear(100).")
    if total is None:
        _refuse(
            "run",
            f"anneal by {anneal!r}",
            "an unknown number of iterations",
            "the schedule has to reach 1 before the run ends",
            "Write max_iter=..., or pass a loader that has a length.",
        )
    schedule = anneal if isinstance(anneal, Schedule) else _Given(anneal, total)
    if schedule.ends >= total:
        _refuse(
            "run",
            f"anneal by {anneal!r}",
            f"a factor that is 1 from iteration {schedule.ends} on, in a run of {total}",
            "what is fitted before it reaches 1 is another objective",
            f"Write annealing.Linear({max(1, total // 3)}), or more iterations.",
        )
    return schedule


def _check_start(name: str, start: Any, fits: bool, bounds: str) -> None:
    if isinstance(start, bool) or not isinstance(start, int | float) or not (fits and start < 1):
        _refuse(f"annealing.{name}", "use start", repr(start), f"it lies in {bounds}", "Write start=0.1.")


def _refuse(obj: str, act: str, got: str, because: str, fix: str) -> None:
    fail(EmvaeError, obj, act, got=got, because=because, fix=fix)
