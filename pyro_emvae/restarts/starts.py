r"""One start of a search, where its run is kept, and the table of all."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .. import checkpoint
from ..driver import Fit

__all__ = ["Slot", "Start", "agreement", "table"]

AGREES = 0.1  # nats
KEPT = (
    "number",
    "seed",
    "kind",
    "attempt",
    "made",
    "finished",
    "passed",
    "status",
    "objective",
    "screened",
    "iterations",
    "reason",
    "leaves",
)


class Slot:
    """Keeps the checkpoint of one start in memory, as the store of its run."""

    def __init__(self, number: int, saved: Callable[[Slot], None]) -> None:
        self.number, self.saved = number, saved
        self.content: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        return f"start {self.number}"

    def exists(self) -> bool:
        return self.content is not None

    def read(self) -> dict[str, Any]:
        return copy.deepcopy(dict(self.content))

    def write(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.saved(self)


@dataclass
class Start:
    """One start: where it begins, what it reached, and its status.

    ``attempt`` counts the halvings of its noise, ``made`` is whether this attempt was screened, ``passed`` whether it
    was sound then, ``screened`` its objective then, and ``finished`` whether it was taken to its end.
    """

    number: int
    seed: int
    kind: str
    slot: Slot
    attempt: int = 0
    made: bool = False
    passed: bool = False
    finished: bool = False
    status: str = "WAITING"
    objective: float = math.nan
    screened: float = math.nan
    iterations: int = 0
    reason: str = ""
    leaves: dict[str, Tensor] | None = None
    fit: Fit | None = field(default=None, repr=False)
    error: Exception | None = field(default=None, repr=False)

    @property
    def sound(self) -> bool:
        return self.made and self.status not in ("DEGENERATE", "FAILED") and not math.isnan(self.objective)

    @property
    def values(self) -> dict[str, Tensor]:
        """Where it is: the unconstrained parameters of its last checkpoint, or where it begins."""
        return self.leaves if self.slot.content is None else checkpoint.decoded(self.slot.content["state"]["params"])

    def begin_again(self) -> None:
        """Draw it again, with half of the noise."""
        self.attempt, self.made, self.leaves, self.fit, self.slot.content = self.attempt + 1, False, None, None, None

    def state_dict(self) -> dict[str, Any]:
        kept = checkpoint.plain({name: getattr(self, name) for name in KEPT}, str(self.slot))
        return kept | {"content": self.slot.content}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in KEPT:
            setattr(self, name, checkpoint.decoded(state[name]))
        self.slot.content = state["content"]


def table(starts: list[Start], best: Start, attributes: Mapping[str, Any]) -> Any:
    r"""Return a `pandas.DataFrame` with one row per start.

    Its columns: ``start``; ``seed``; ``init``, how it began; ``objective`` in nats, on the same random numbers for all;
    ``status``, a key of `convergence.STATUSES`, ``"SCREENED"`` for a start that was not taken to its end, or
    ``"FAILED"``; ``degenerate``; ``iterations``; ``agrees``, whether it came within 0.1 nat of the best, None if it was
    degenerate, failed, or was not taken to its end; ``reason``, of the one that failed. ``attrs["agreement"]`` is the
    share that agrees, of those taken to their end.
    """
    import pandas as pd

    rows = [
        {
            "start": s.number,
            "seed": s.seed,
            "init": s.kind,
            "objective": s.objective,
            "status": s.status,
            "degenerate": s.status == "DEGENERATE",
            "iterations": s.iterations,
            "agrees": _agrees(s, best),
            "reason": s.reason.split(" This is because ")[0],
        }
        for s in starts
    ]
    found = pd.DataFrame(rows).astype({"agrees": object})
    found.attrs.update({**attributes, "agreement": agreement(starts, best)})
    return found


def _agrees(start: Start, best: Start) -> bool | None:
    if not start.sound or start.status == "SCREENED":
        return None
    return abs(start.objective - best.objective) <= AGREES


def agreement(starts: list[Start], best: Start) -> float:
    """Return the share of the starts taken to their end that came within 0.1 nat of the best."""
    answers = [a for a in (_agrees(s, best) for s in starts) if a is not None]
    return sum(answers) / len(answers) if answers else math.nan
