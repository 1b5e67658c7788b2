r"""What a run is watched for: step norms, tracked parameters, the stopping rule, an objective that went down."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._checks import EmvaeError, StepError, choose, fail, message, nearest
from .convergence import Deterministic, Verdict
from .engine import Engine, largest_change

__all__ = ["Monitor"]

SEEN = ("tracked", "objectives", "changes", "iterations", "decreased", "_epoch")
ENDS = ("CONVERGED", "SLOW", "STALLED", "MAX_ITER")


class Monitor:
    r"""Looks at the engine before the first iteration and after each one; it changes nothing unless it reverts.

    Args:
        engine: What the iterations change.
        stop: A rule of `convergence`, None, or ``"auto"``: `Deterministic()` where `fixed` holds.
        on_decrease: ``"raise"``, ``"warn"`` or ``"revert"``; None: raise in float64, warn in lower precision.
        fixed: No half-step draws and the data are the same in each iteration, so that the objective has no noise.
        track: Names of parameters whose constrained values are kept.
        monotone: Nor can a half-step lower it.
        norms: The step norm of each iteration is wanted, whatever the rule: a copy of the parameters each.
        look: Returns what says that the present parameters are on a spike of the likelihood, asked after a decrease:
            rounding lowers the objective where a scale vanishes.

    A decrease is one beyond rounding: more than the square root of the dtype's rounding unit, in nats per datum.
    """

    def __init__(
        self,
        engine: Engine,
        stop: Any,
        on_decrease: str | None,
        fixed: bool,
        track: list[str],
        *,
        monotone: bool = False,
        norms: bool = False,
        look: Callable[[], str] | None = None,
    ) -> None:
        if on_decrease is not None:
            choose("run", "on_decrease", on_decrease, ("raise", "warn", "revert"))
        if stop is not None and stop != "auto" and not hasattr(stop, "judge"):
            fail(
                EmvaeError,
                "run",
                f"use stop={stop!r}",
                got=type(stop).__name__,
                because="a stopping rule is an object that judges",
                fix="Write stop=convergence.Deterministic(tol=1e-6), stop=convergence.Windowed(), or stop=None.",
            )
        self.engine, self.stop, self.policy, self.track = engine, stop, on_decrease, track
        self.fixed, self.rises, self.norms = fixed, monotone, norms
        self.tracked: dict[str, list[np.ndarray]] = {}
        self.objectives: list[float] = []
        self.changes: list[float] = []
        self.iterations: list[tuple[int, float]] = []
        self.verdict = Verdict()
        self.decreased = False
        self.look = look
        self._epoch: list[float] = []
        self._last: deque[tuple[dict[str, Tensor], dict]] = deque(maxlen=3)
        self._flat: deque[np.ndarray] = deque(maxlen=getattr(stop, "span", 0))

    # Looking --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Note the initial parameters: now, or as soon as the first iteration has found them."""
        self.engine.refresh()
        if self.engine.parameters is not None:
            self.note()
        else:
            self.engine.on_setup = self.note

    def note(self) -> None:
        """Note the present parameters: an iterate."""
        self.engine.on_setup = None
        rows = {row.name: row for row in self.engine.parameters.rows}
        for name in self.track:
            if name not in rows:
                fail(
                    EmvaeError,
                    "run",
                    f"track {name!r}",
                    got="an unknown parameter",
                    because="neither model nor guide has it",
                    fix=nearest(name, rows),
                )
            self.tracked.setdefault(name, []).append(rows[name].value.detach().cpu().numpy().copy())
        if not self._copies:
            return
        leaves = {name: leaf.detach().clone() for name, leaf in self.engine.parameters.leaves().items()}
        self._last.append((leaves, self.engine.steps if self.monotone else {}))
        if not self.monotone and len(self._last) > 2:
            self._last.popleft()

    def after(self, iteration: int, loss: float, judged: bool = True, annealed: bool = False) -> str | None:
        """Look at an iteration that is over; return the status that ends the run, or None.

        Args:
            iteration: Its number.
            loss: Minus the objective before the iteration, or with gradient steps of its draws.
            judged: Whether the rule is asked now; if not, the objective enters the mean of the epoch.
            annealed: Whether it climbed another objective than the one that is judged; then it is not looked at.
        """
        if self.engine.parameters is None:  # every step so far was left out
            return None
        self.note()
        change = self._change()
        self.iterations.append((iteration, change))
        if annealed:
            self._epoch = []
            return None
        self._epoch.append(-loss)
        if not judged:
            return None
        objective, self._epoch = float(np.mean(self._epoch)), []
        before = self.objectives[-1] if self.objectives else -math.inf
        self.objectives.append(objective)
        self.changes.append(change)
        if self.monotone and self._fell(before, objective):
            return self._decrease(before, objective, 0)
        return self._judge()

    def hear(self, verdict: Verdict | None) -> str | None:
        """Take over what an iteration says of itself, unless another rule was asked for."""
        if verdict is None or self.stop != "auto":
            return None
        self.verdict = verdict
        return verdict.status

    def end(self, status: str, objective: float) -> tuple[str, float]:
        """Return the status of the run and the objective, given that at its last parameters."""
        if self.monotone and status in ENDS and self.objectives and self._fell(self.objectives[-1], objective):
            status = self._decrease(self.objectives[-1], objective, -2) or status
            objective = self.objectives[-1] if status in ("REVERTED", "DEGENERATE") else objective
        return "DECREASED" if self.decreased and status in ENDS else status, objective

    def screen(self, status: str, found: str) -> str:
        """Return the status of the run, given what says that its parameters are no maximum, if anything does."""
        if not found:
            return status
        self.verdict = dataclasses.replace(self.verdict, status="DEGENERATE", reason=found)
        return "DEGENERATE"

    # Its state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen, in plain values, for a checkpoint; a rule with a memory of its own gives it as well."""
        state = {name: getattr(self, name) for name in SEEN}
        last = list(self._last)[0 if self.monotone else -1 :]
        state |= {"verdict": dataclasses.asdict(self.verdict), "last": last, "flat": list(self._flat)}
        return state | ({"rule": self.stop.state_dict()} if hasattr(self.stop, "state_dict") else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was seen by a run that was cut; what it did not track is NaN up to here."""
        for name in SEEN:
            setattr(self, name, state[name])
        rows = {row.name: row.value for row in self.engine.parameters.rows}
        for name in self.track:
            if name in rows and name not in self.tracked:
                unknown = np.full(tuple(rows[name].shape), math.nan)
                self.tracked[name] = [unknown] * (len(self.iterations) + 1)
        self.tracked = {name: values for name, values in self.tracked.items() if name in self.track}
        self.verdict = Verdict(**state["verdict"])
        self._last.extend(state["last"])
        self._flat.extend(state["flat"])
        if "rule" in state and hasattr(self.stop, "load_state_dict"):
            self.stop.load_state_dict(state["rule"])

    # Judging --------------------------------------------------------------------------------------------------------

    @property
    def deterministic(self) -> bool:
        """Whether the objective is computed without noise."""
        parameters = self.engine.parameters
        return self.fixed and parameters is not None and not parameters.subsampled

    @property
    def monotone(self) -> bool:
        """Whether it cannot go down either."""
        return self.rises and self.deterministic

    @property
    def rule(self) -> Any:
        """The rule in force."""
        if self.stop != "auto":
            return self.stop
        return Deterministic() if self.deterministic else None

    @property
    def _copies(self) -> bool:
        """Whether anything is asked of the parameters of each iteration."""
        limit = getattr(self.rule, "max_parameters", math.inf)
        few = sum(leaf.numel() for leaf in self._theta.values()) <= limit
        return self.norms or self.monotone or (self.rule is not None and few)

    @property
    def _theta(self) -> dict[str, Tensor]:
        return self.engine.parameters.leaves(*self.engine.parameters.theta)

    @property
    def _epsilon(self) -> float:
        leaves = self.engine.parameters.leaves().values()
        return max([torch.finfo(leaf.dtype).eps for leaf in leaves], default=2.0**-52)

    def _change(self) -> float:
        """Return the largest relative change of a parameter in the last iteration, unconstrained."""
        if len(self._last) < 2:
            return math.nan
        (old, _), (new, _) = list(self._last)[-2:]
        names = [name for name in old if name in new]
        return largest_change([old[name] for name in names], [new[name] for name in names])

    def _judge(self) -> str | None:
        rule = self.rule
        if rule is None:
            return None
        data = self.engine.parameters.num_data
        numbers = {"changes": self.changes, "num_data": data, "epsilon": self._epsilon}
        self.verdict = rule.judge(self.objectives, parameters=self._parameters(rule), **numbers)
        return self.verdict.status

    def _parameters(self, rule: Any) -> np.ndarray | None:
        """Return the model's last unconstrained parameters as rows, where the rule asks for them."""
        limit, span = getattr(rule, "max_parameters", 0), getattr(rule, "span", 0)
        names = self._theta
        if not names or sum(leaf.numel() for leaf in names.values()) > limit:
            return None
        self._flat.append(torch.cat([self._last[-1][0][n].flatten() for n in names]).double().cpu().numpy())
        return np.stack(self._flat) if len(self._flat) == span else None

    def _fell(self, before: float, after: float) -> bool:
        return after < before - math.sqrt(self._epsilon) * max(self.engine.parameters.num_data, abs(before))

    def _decrease(self, before: float, after: float, place: int) -> str | None:
        """Raise, warn, or put back the parameters of the higher objective."""
        self.decreased = True
        policy = self.policy or ("raise" if self._epsilon < 1e-10 else "warn")
        text = {
            "act": "raise the objective in each iteration",
            "got": f"{after:.10g} after {before:.10g} nats, in iteration {len(self.objectives) - 1}",
            "because": "an exact E-step and an exact M-step cannot lower it",
            "fix": "Check `update` (a formula that is no maximum, or a penalty that is not in the model), or write "
            'on_decrease="warn" or "revert".',
        }
        if policy == "warn":
            warnings.warn(message("EM", **text), stacklevel=2)
            return None
        spike = "" if self.look is None else self.look()
        self._restore(place)
        if spike:
            return self.screen("", spike)
        if policy == "raise":
            fail(StepError, "EM", **text)
        self.verdict = Verdict("REVERTED", reason=text["got"])
        return "REVERTED"

    def _restore(self, place: int) -> None:
        leaves, self.engine.steps = self._last[place]
        live = self.engine.parameters.leaves()
        with torch.no_grad():
            for name, leaf in leaves.items():
                live[name].copy_(leaf)
