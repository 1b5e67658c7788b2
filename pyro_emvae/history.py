r"""What a run records: a `Record` per iteration, and the `History` that gathers them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .convergence import Verdict
from .engine import Gradient
from .monitor import Monitor

__all__ = ["History", "Record", "kind_of"]

PHASES = {"E": 0, "M": 1, None: 2}
KINDS = {
    "elbo": "E_q[log p(x, z) - log q(z)], a lower bound of the log evidence, and equal to it for an exact q",
    "Q": "E_q[log p(x, z)], of draws whose density log q is not known; there is no ELBO",
    "approximation": "an approximation of the log evidence that is no bound, as Laplace's",
    "iwae": "the importance-weighted bound of several draws, a lower bound of the log evidence",
    "renyi": "Renyi's bound of several draws, a lower bound of the log evidence for an order of at least 0",
    "chi2": "minus the chi-square bound of several draws, an upper bound of the log evidence in the limit only",
    "other": "an objective of several draws that is not the ELBO",
}


def kind_of(loss: Any) -> str:
    """Return what minus a loss is, a key of `KINDS`; someone else's loss is taken for minus an ELBO."""
    name = getattr(getattr(loss, "objective", None), "name", "elbo")
    return name if name in KINDS else "other"


@dataclass
class Record:
    r"""One iteration.

    Args:
        loss: Minus the objective after E and before M, nats.
        gradients: Its gradient steps, each with the key of its phase; None for a joint step.
        losses: The losses at the boundaries of the phases, NaN where they were not computed: before the first one,
            between neighbours, after the last.
        phases: The keys of the phases, such as ``("E", "M")``.
        evaluations: How often E and M were made.
        kind: What the objective is, a key of `KINDS`.
        facts: What is known of the E-step's draws: least and median effective number over the data, ...
        verdict: What the iteration itself says of convergence.
    """

    loss: float
    gradients: list[tuple[str | None, Gradient]]
    losses: tuple[float, ...] = ()
    phases: tuple[str, ...] = ()
    evaluations: int = 1
    kind: str = "elbo"
    facts: Mapping[str, float] = field(default_factory=dict)
    verdict: Verdict | None = None

    @property
    def before(self) -> float:
        """The loss before the first phase, NaN if it was not computed."""
        return self.losses[0] if self.losses else math.nan

    def gain(self, slot: str) -> float:
        """How much the phases of a slot raised the objective; NaN if that is not known."""
        gains = [
            before - after
            for key, before, after in zip(self.phases, self.losses, self.losses[1:], strict=False)
            if key.startswith(slot)
        ]
        return math.fsum(gains) if gains else math.nan

    @property
    def e_gain(self) -> float:
        """Objective after E minus objective before E, both from their own draws."""
        return self.gain("E")

    @property
    def m_gain(self) -> float:
        """Objective after M minus objective before M."""
        return self.gain("M")


class History:
    r"""What a run recorded; `dataset` is it as an xarray Dataset.

    ``objective`` of iteration 0 is that at the initial parameters: each iteration's value comes from its E-step, or its
    gradient, before its update of theta; ``objective_kind`` says what it is. Tracked parameters lie along ``iterate``,
    one longer: iterate 0 is the initial value, iterate t the value after t iterations, so that objective and parameter
    of the same number belong together. ``gain`` has the gain of each phase, ``e_gain`` and ``m_gain`` their sums by
    slot. ``change`` is the step norm, of that parameter for which it is largest: how far it went in the iteration,
    unconstrained, over its norm before (over the root of its size, if that is larger); `EM` records it in every run,
    `SVI` in those with a stopping rule. Of E-steps that draw there are, over the data: ``ess_min`` and ``ess_median``,
    ``acceptance_min`` and ``acceptance_mean``, ``khat_median`` and ``khat_max``, and ``num_particles``, their draws.

    ``monitor``, and ``iterate`` if what iterates has a state of its own, give it to checkpoints by ``state_dict``.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.steps: list[tuple[int, int, float, float, float]] = []
        self.iterations: list[tuple[float, float, int]] = []
        self.losses: list[tuple[float, ...]] = []
        self.phases: tuple[str, ...] = ()
        self.facts: dict[str, list[float]] = {}
        self.validation: list[tuple[int, float]] = []
        self.evaluations = 0
        self.monitor: Monitor | None = None
        self.iterate: Any = None

    def add(self, iteration: int, record: Record) -> None:
        """Append one iteration."""
        now = time.perf_counter() - self.start
        self.evaluations += record.evaluations
        self.iterations.append((-record.loss, now, list(KINDS).index(record.kind)))
        self.losses.append(tuple(record.losses))
        self.phases = record.phases or self.phases
        for name in {*self.facts, *record.facts}:
            mine = self.facts.setdefault(name, [math.nan] * (len(self.iterations) - 1))
            mine.append(record.facts.get(name, math.nan))
        for key, g in record.gradients:
            self.steps.append((iteration, PHASES[key and key[0]], -g.loss, g.norm, now))

    def gains(self) -> np.ndarray:
        """Return how much each phase raised the objective: ``(iterations, phases)``, NaN where that is not known.

        What was not computed after the last phase is what the next iteration found before its first one.
        """
        count = len(self.phases)
        rows = [row if len(row) == count + 1 else (math.nan,) * (count + 1) for row in self.losses]
        losses = np.array(rows, dtype=float).reshape(len(rows), count + 1)
        if len(losses) > 1:
            last = losses[:-1, -1]
            losses[:-1, -1] = np.where(np.isnan(last), losses[1:, 0], last)
        return -np.diff(losses, axis=1)

    @property
    def dataset(self) -> Any:
        """An `xarray.Dataset`: per gradient step and per iteration; nats, seconds since the start."""
        import xarray as xr

        steps = np.array(self.steps, dtype=float).reshape(-1, 5)
        coords = {"step": np.arange(len(steps)), "iteration": np.arange(len(self.iterations))}
        variables = self._per_step(steps) | self._per_iteration()
        if self.phases:
            variables["gain"] = (("iteration", "half_step"), self.gains())
            coords["half_step"] = list(self.phases)
        for name, values in (self.monitor.tracked if self.monitor else {}).items():
            array = np.stack(values)
            variables[f"param_{name}"] = (("iterate", *[f"{name}_dim_{i}" for i in range(array.ndim - 1)]), array)
            coords["iterate"] = np.arange(len(array))
        attrs = {
            "phases": "0=E, 1=M, 2=joint",
            "units": "nats, seconds",
            "map_evaluations": self.evaluations,
            "objective_kind": ", ".join(f"{kind}: {KINDS[kind]}" for kind in dict.fromkeys(self._kinds)),
        }
        return xr.Dataset(variables, coords=coords, attrs=attrs)

    @property
    def _kinds(self) -> list[str]:
        return [list(KINDS)[int(row[2])] for row in self.iterations]

    def _per_step(self, steps: np.ndarray) -> dict[str, tuple]:
        other = np.array([kind not in ("elbo", "approximation") for kind in self._kinds], dtype=bool)
        iterations = steps[:, 0].astype(np.int64)
        values = steps[:, 2]
        return {
            "elbo": ("step", np.where(other[iterations], np.nan, values) if len(values) else values),
            "step_objective": ("step", values),
            "phase": ("step", steps[:, 1].astype(np.int8)),
            "step_iteration": ("step", iterations),
            "grad_norm": ("step", steps[:, 3]),
            "time": ("step", steps[:, 4]),
        }

    def _per_iteration(self) -> dict[str, tuple]:
        count = len(self.iterations)
        change, validation = np.full(count, np.nan), np.full(count, np.nan)
        for iteration, value in self.monitor.iterations if self.monitor else []:
            change[iteration] = value
        for iteration, value in self.validation:
            validation[iteration] = value
        gains = self.gains()
        found = {
            "objective": np.array([row[0] for row in self.iterations], dtype=float),
            "objective_kind": np.array(self._kinds, dtype=object if not count else str),
            "e_gain": self._of_slot("E", gains),
            "m_gain": self._of_slot("M", gains),
            "iteration_time": np.array([row[1] for row in self.iterations], dtype=float),
            "change": change,
            "validation": validation,
        }
        found |= {name: np.array(values, dtype=float) for name, values in sorted(self.facts.items())}
        return {name: ("iteration", values) for name, values in found.items()}

    def _of_slot(self, slot: str, gains: np.ndarray) -> np.ndarray:
        mine = [place for place, key in enumerate(self.phases) if key.startswith(slot)]
        return gains[:, mine].sum(1) if mine else np.full(len(gains), np.nan)
