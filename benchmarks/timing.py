"""Two ways to do one thing, timed in turn in one process, each in a parameter store of its own."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pyro
import torch

Call = Callable[[], Any]
TURNS = 20


@dataclass(frozen=True)
class Case:
    """What is compared, and how dear ours may be.

    Args:
        name: Names it on the command line and in the table.
        what: What one call does.
        limit: The largest ratio of our time to theirs.
        setup: Given whether it is for ours, builds everything afresh and returns what is timed.
    """

    name: str
    what: str
    limit: float
    setup: Callable[[bool], Call]


@dataclass(frozen=True)
class Result:
    """Median seconds per call of both sides, and the median ratio with its quartiles."""

    case: Case
    ours: float
    theirs: float
    ratio: float
    spread: tuple[float, float]

    @property
    def ok(self) -> bool:
        return self.ratio <= self.case.limit


class Side:
    """One of the two: its own parameter store, and the generator's state that it was set up with."""

    def __init__(self, setup: Callable[[bool], Call], ours: bool) -> None:
        with pyro.get_param_store().scope() as self.scope:
            pyro.set_rng_seed(0)
            self.call = setup(ours)

    def time(self, calls: int = 1) -> float:
        """Return the seconds that one of `calls` calls took."""
        with pyro.get_param_store().scope(self.scope) as self.scope:
            start = time.perf_counter()
            for _ in range(calls):
                self.call()
            return (time.perf_counter() - start) / calls

    def warm_up(self, calls: int = 5, seconds: float = 1.0) -> float:
        """Call until nothing is done for the first time any more; return the time of the last call."""
        start, last = time.perf_counter(), self.time()
        while (calls := calls - 1) and time.perf_counter() - start < seconds:
            last = self.time()
        return last


def measure(case: Case, seconds: float = 8.0) -> Result:
    """Time both sides in turn, twenty times each for about so many seconds together; five times if a call is long."""
    ours, theirs = Side(case.setup, True), Side(case.setup, False)
    each = [side.warm_up() for side in (ours, theirs)]
    calls = [max(1, round(seconds / 2 / TURNS / t)) for t in each]
    turns = max(5, min(TURNS, math.ceil(seconds / sum(each))))
    with _uncollected():
        times = [_turn(ours, theirs, calls, backwards=i % 2 == 1) for i in range(turns)]
    low, middle, high = quantiles([a / b for a, b in times], n=4)
    return Result(case, median(a for a, _ in times), median(b for _, b in times), middle, (low, high))


def measure_all(cases: Sequence[Case], minutes: float, most: float = 8.0) -> list[Result]:
    """Measure all cases within so many minutes, each in an equal share of what is left, setting up and warming up too.

    A case of long calls may take more than its share, at the cost of the later ones; a case gets `most` seconds.
    """
    results: list[Result] = []
    deadline, cost = time.perf_counter() + 60 * minutes, 2.0
    for i, case in enumerate(cases):
        share = (deadline - time.perf_counter()) / (len(cases) - i)
        start, seconds = time.perf_counter(), max(0.5, min(most, share - cost))
        results.append(measure(case, seconds))
        cost = 0.5 * cost + 0.5 * max(0.0, time.perf_counter() - start - seconds)
    return results


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Collect garbage now and not within."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _turn(ours: Side, theirs: Side, calls: list[int], backwards: bool) -> tuple[float, float]:
    if backwards:
        b = theirs.time(calls[1])
        return ours.time(calls[0]), b
    return ours.time(calls[0]), theirs.time(calls[1])


def table(results: list[Result]) -> str:
    """Return a Markdown table whose columns are aligned."""
    head = ("case", "ours, ms", "theirs, ms", "ratio (quartiles)", "limit", "ok")
    rows = [head, *map(_row, results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _row(result: Result) -> tuple[str, ...]:
    ratio, spread = f"{result.ratio:.3g}", f"({result.spread[0]:.3g} to {result.spread[1]:.3g})"
    name = f"`{result.case.name}`: {result.case.what}"
    verdict = f"{result.case.limit:.3g}", "yes" if result.ok else "**no**"
    verdict = verdict if math.isfinite(result.case.limit) else ("", "")
    return name, _ms(result.ours), _ms(result.theirs), f"{ratio} {spread}", *verdict


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def machine() -> str:
    """Describe what the figures depend on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "pyro": pyro.__version__}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{os.cpu_count()} cores ({_processor()}); {listed}; Pyro's validation at its default."


def _processor() -> str:
    """Return the processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
