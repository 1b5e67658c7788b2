r"""Exact iterations of many starts side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from .._checks import RecordingError
from ..driver import Record
from ..engine import BatchedMap, Engine, RecordedMap, record_map
from .starts import Start

__all__ = ["Lockstep", "Together"]

LONGEST = 256  # iterates of a start that wait to be looked at
BYTES = 64 * 2**20  # of the iterates that wait
MANY = 128 * 2**20  # bytes of all operations together, beyond which nothing is gained by more starts at a time
LARGEST = 512 * 2**20  # bytes of the operations of one start, which are held while they are recorded

Leaves = dict[str, Tensor]
Iterate = Callable[[tuple, Mapping[str, Any]], Record]


class Lockstep:
    r"""Makes each iteration of one start an iteration of all of them, and keeps the others' iterates until asked.

    A run loop goes through one start after the other, with all that it looks at and decides; what it iterates by is
    `row`, which takes the next iterate of its start, and lets all starts make an iteration when there is none. So a
    start has the iterates, the judgement and the end that it would have had alone.

    A start that leaves the recorded path (a covariance that becomes singular, a value at the boundary) stands still in
    the batch. When its turn comes, that one iteration is made by `iterate`, which raises as it would have alone, or
    takes the other branch; then the start is back in the batch. Others never feel it.

    Args:
        engine: Has the parameters.
        iterate: One iteration of one start.
        recorded: The same, recorded as a map of the unconstrained parameters.
        starts: Values of these parameters for each start.
        moving: Which starts have iterations to make; the others hold a place.
    """

    def __init__(
        self,
        engine: Engine,
        iterate: Iterate,
        recorded: RecordedMap,
        starts: Sequence[Sequence[Tensor]],
        moving: Sequence[bool],
    ) -> None:
        self.engine, self.iterate, self.first = engine, iterate, starts
        self.stacks = [torch.stack(parts) for parts in zip(*starts, strict=True)]
        self.map = BatchedMap(recorded, len(starts))
        self.queues: list[deque[tuple[list[Tensor], float]]] = [deque() for _ in starts]
        self.moving = list(moving)
        size = sum(stack.numel() * stack.element_size() for stack in self.stacks)
        self.longest = max(1, min(LONGEST, BYTES // max(1, size)))

    def row(self, place: int) -> Iterate:
        """Return what makes the iterations of one start, in place of `iterate`."""
        fresh = True

        def iterate(args: tuple, kwargs: Mapping[str, Any]) -> Record:
            nonlocal fresh
            if fresh and not _equal(self._live(), self.first[place]):
                self._put(place)
            fresh = False
            if not self.queues[place] and self.moving[place]:
                self._advance()
            if self.queues[place]:
                values, loss = self.queues[place].popleft()
                with torch.no_grad():
                    for live, value in zip(self._live(), values, strict=True):
                        live.copy_(value)
                return Record(loss, [])
            record = self.iterate(args, kwargs)
            self._put(place)
            return record

        return iterate

    def leave(self, place: int) -> None:
        """Let a start stand still that has come to its end."""
        self.moving[place] = False
        self.queues[place].clear()

    def _live(self) -> list[Tensor]:
        return [row.leaf for row in self.engine.parameters.rows]

    def _put(self, place: int) -> None:
        """Let a start go on from the engine's values."""
        self.queues[place].clear()
        self.moving[place] = True
        for stack, live in zip(self.stacks, self._live(), strict=True):
            stack[place] = live.detach()

    def _advance(self) -> None:
        """Let every start that moves make an iteration."""
        places = [p for p, queue in enumerate(self.queues) if self.moving[p] and len(queue) < self.longest]
        try:
            self._take(places, self.map(self.stacks))
        except RuntimeError:  # of torch.linalg, for the sake of one start: each fills the batch by itself
            for place in places:
                self._alone(place)

    def _alone(self, place: int) -> None:
        stacks = [stack[place].expand_as(stack).clone() for stack in self.stacks]
        try:
            self._take([place], self.map(stacks))
        except RuntimeError:
            self.moving[place] = False

    def _take(self, places: list[int], found: tuple[list[Tensor], Tensor, Tensor]) -> None:
        """Take over the new values of starts that kept to the recorded path; the others stop where they are."""
        new, values, kept = found
        values, kept = values.tolist(), kept.tolist()
        for place in places:
            self.moving[place] = kept[place]
        moved = [place for place in places if kept[place]]
        for stack, after in zip(self.stacks, new, strict=True):
            stack[moved] = after[moved]
        for place in moved:
            self.queues[place].append(([after[place].clone() for after in new], -values[place]))


def _equal(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


class Together:
    r"""Decides which starts go side by side, and says why others do not.

    An iteration is recorded once: see `engine.record_map`. An exact E-step of your own is recorded if it tells its loss
    by `particles.report`, the log evidence as a tensor in and a number out.

    Args:
        iterate: One exact iteration without a state of its own; None: starts go one by one.
        args, kwargs: The data.
        reason: Why they do, if `iterate` is None.
    """

    def __init__(
        self,
        iterate: Iterate | None = None,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
        reason: str = "",
    ) -> None:
        self.iterate, self.args, self.kwargs, self.reason = iterate, args, kwargs or {}, reason
        self.recorded: RecordedMap | None = None
        self.ways: set[str] = set()

    @property
    def way(self) -> str:
        """How the starts went: side by side, or one by one and why."""
        return "; ".join(sorted(self.ways, reverse=True))

    def parts(self, engine: Engine, origin: Mapping[str, Any], other: Leaves, group: list[Start]) -> list[list[Start]]:
        """Divide a group of starts into those that go at a time.

        The first time, an iteration is recorded, from the values at the beginning or else from `other`.
        """
        present = checkpoint.decoded(origin["state"]["params"])
        for values in (present, other):
            if self.iterate is not None and self.recorded is None:
                checkpoint.restore(engine, origin)
                self._record(engine, values)
        if self.recorded is None:
            self.iterate = None
        size = len(group) if self.recorded is None else max(1, MANY // max(1, self.recorded.bytes))
        if self.recorded is None:
            self.ways.add(f"one by one: {self.reason}")
        else:
            self.ways.add("side by side" if size >= len(group) else f"side by side, {size} at a time")
        return [group[k : k + size] for k in range(0, len(group), size)]

    def rows(self, engine: Engine, part: list[Start], ended: list[bool]) -> Lockstep | None:
        """Return what runs a part of a group side by side, None if they go one by one."""
        if self.recorded is None or all(ended):
            return None
        live = {row.name: row.leaf for row in engine.parameters.rows}
        values = [[start.values[name].to(leaf) for name, leaf in live.items()] for start in part]
        try:
            return Lockstep(engine, self.iterate, self.recorded, values, [not end for end in ended])
        except Exception as error:
            self.iterate = self.recorded = None
            self.ways = {f"one by one: {_brief(error)}"}
            return None

    def _record(self, engine: Engine, values: Leaves) -> None:
        """Record an iteration from given values and from others near by."""
        generator = torch.Generator().manual_seed(0)
        near = {
            name: leaf + 1e-3 * torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
            for name, leaf in values.items()
        }
        live = {row.name: row.leaf for row in engine.parameters.rows}

        def step() -> float:
            engine.steps = {}
            loss = self.iterate(self.args, self.kwargs).loss
            if any(engine.steps.values()):
                raise RecordingError("a half-step with a state of its own")
            return loss

        try:
            starts = [[at[name].to(leaf) for name, leaf in live.items()] for at in (values, near)]
            self.recorded = record_map(step, list(live.values()), starts, LARGEST)
        except Exception as error:
            self.reason = _brief(error)


def _brief(error: Exception) -> str:
    """Return what an error says was found, in one line."""
    text = str(error).split(": got ", 1)[-1].split(". This is because ", 1)[0]
    return f"{text.splitlines()[0] if text else type(error).__name__}"
