r"""Screen many starts, take the best to the end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import checkpoint
from .._checks import DegenerateError, EmvaeError, ModelError, StepError, fail
from ..driver import Fit
from ..engine import Engine
from ..parameters import MODEL, SHARED
from .initial import Initial, read, write
from .lockstep import Iterate, Together
from .starts import Slot, Start, table

__all__ = ["Search"]

HALVINGS = (1.0, 0.5, 0.25, 0.125, 0.0625)
FAILURES = (ArithmeticError, ValueError, torch.linalg.LinAlgError)


@dataclass
class Search:
    r"""Screen all starts by a few iterations, take the best to the end, and return the best that is sound.

    Every start makes ``screen`` iterations; the ``wanted`` best go on to the end. A start that becomes degenerate (an
    update at the boundary of a constraint) or fails is left out, and the next best takes its place: its likelihood may
    be the highest, and without bound. A noisy start that does is drawn again with half of the noise, four times.

    Each start is a run of its own, with the parameters, buffers, optimizers' and half-steps' state and generators that
    the search began with, and its own seed; going on after the screening is resuming it, so that the best start is bit
    for bit the run from there alone. Runs of exact half-steps go side by side (`Lockstep`) where an iteration can be
    recorded, a few at a time where data are many; the table is the same either way. With `callbacks`, which are called
    in the runs to the end, those go one by one: a recorded iteration would not see what a callback changes.

    Args:
        engine: What the iterations change. At the end it has the state of the best start.
        run: ``run(number, iterate=None, **options) -> Fit``: makes a run up to so many iterations, or with a loader
            epochs.
        n_init: Starts.
        total: Iterations, or with a loader epochs, of a run.
        initial: Where starts begin.
        seed: Start k has seed ``seed + k``; None: 0 for the initial values, and the generators are not seeded.
        screen: Iterations, or with a loader epochs, of the screening.
        wanted: How many starts go on.
        objective: Returns the objective of a run that was just made, in nats, comparable between starts.
        together: How iterations are made side by side; by default they are not.
        data: The loader, whose generators belong to a run.
        path, resume: A file for the whole search; see `driver.run`.
        every: Iterations between checkpoints.
        watched: Whether callbacks look at the runs to the end.

    Raises:
        StepError: All starts failed, with the reason of each; or none has an objective to be compared by. Parameters
            are as before.
        CheckpointError: The file belongs to another search.

    Source: Biernacki, Celeux and Govaert 2003, for short runs before long ones.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_emvae import SVI
        >>> def model(x): pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)
        >>> def guide(x): pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(-9.0)), 0.7))
        >>> pyro.clear_param_store()
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}))
        >>> start = lambda seed: {"loc": torch.tensor(3.0 * seed)}
        >>> fit = svi.run(100, torch.tensor(1.0), n_init=3, init=start, seed=0)
        >>> print(fit.restarts[["start", "init", "status", "iterations", "agrees"]])
           start   init    status  iterations agrees
        0      0  given  MAX_ITER         100   True
        1      1  given  SCREENED          10   None
        2      2  given  SCREENED          10   None
    """

    engine: Engine
    run: Callable[..., Fit]
    n_init: int
    total: int
    initial: Initial
    seed: int | None = None
    screen: int = 10
    wanted: int = 1
    objective: Callable[[Fit], float] = lambda fit: fit.objective
    together: Together = field(default_factory=Together)
    data: Any = None
    path: Any = None
    resume: Any = "auto"
    every: int | None = None
    watched: bool = False
    starts: list[Start] = field(init=False, default_factory=list)
    origin: Mapping[str, Any] = field(init=False, default_factory=dict)
    last: Start | None = field(init=False, default=None)

    def __call__(self) -> Fit:
        """Search, and return the fit of the best start with the table of all."""
        checkpoint.Checkpoints(self.engine, self.path, self.resume)  # refuses what cannot be
        self.file = None if self.path is None else checkpoint.writable(self.path)
        self._meet()
        before, loader = checkpoint.pack(self.engine), checkpoint.loader_state(self.data)
        interrupted = False
        try:
            source = self._begin(before, loader)
            try:
                self._screen()
                self._finish()
            except KeyboardInterrupt:
                interrupted = True
            best = self._best()
            fit = self._take(best)
        except BaseException:
            checkpoint.restore(self.engine, before)
            checkpoint.restore_loader(self.data, loader)
            raise
        self._save(best.slot)
        about = {"restarts": self.together.way}
        fit.provenance.pop("resumed_from", None)
        fit.provenance.update(about | ({"resumed_from": source} if source else {}))
        status = "INTERRUPTED" if interrupted else fit.status
        return dataclasses.replace(fit, status=status, restarts=table(self.starts, best, about))

    # Beginning ------------------------------------------------------------------------------------------------------

    def _meet(self) -> None:
        """Let the optimizers take all parameters, so that their state before the first step can be put back."""
        for key, optimizer in self.engine.optimizers.items():
            blocks = {None: (), MODEL: (MODEL, SHARED)}.get(key, (key,))
            rows = [r for r in self.engine.parameters.rows if not blocks or r.block in blocks]
            optimizer.add({r.name: r.leaf for r in rows})

    def _begin(self, before: Mapping[str, Any], loader: Any) -> str:
        """Make the starts, or take those of the file; return whence."""
        exists = self.file is not None and self.file.exists()
        saved = self._read() if self.resume is True or (exists and self.resume == "auto") else None
        base = self.seed or 0
        for k in range(self.n_init):
            self.starts.append(Start(k, base + k, self.initial.kind(k, base + k), Slot(k, self._save)))
        if saved is None:
            rng = before["rng"] | {"loader": None if loader is None else checkpoint.plain(loader, "the loader's state")}
            self.origin = {**before, "state": {**before["state"], "steps": {}}, "rng": rng}
            return ""
        self.origin, self.screen = saved["origin"], saved["plan"]["screen"]
        for start, state in zip(self.starts, saved["starts"], strict=True):
            start.load_state_dict(state)
            start.finished &= saved["plan"]["total"] == self.total or start.status != "MAX_ITER"
        return f"{sum(s.iterations for s in self.starts)} iterations in {self.file}"

    def _read(self) -> Mapping[str, Any]:
        content = checkpoint.read(self.file)
        saved = content.get("restarts")
        there = saved and {name: saved["plan"][name] for name in ("n_init", "seed")}
        here = {"n_init": self.n_init, "seed": self.seed}
        if there != here:
            checkpoint.refuse(
                f"go on from {self.file}",
                f"{here}, {there or 'one run'} in the file",
                "a file holds one search, with its starts and their seeds",
                "Write the arguments that it was written with, another path, or resume=False.",
            )
        checkpoint.restore(self.engine, content, generators=False)  # compares what has to agree
        return saved

    def _save(self, slot: Slot) -> None:
        """Write the file, if there is to be one: all starts, and above them the checkpoint of one."""
        if self.file is None:
            return
        plan = {"n_init": self.n_init, "seed": self.seed, "screen": self.screen, "total": self.total}
        saved = {"plan": plan, "origin": self.origin, "starts": [s.state_dict() for s in self.starts]}
        checkpoint.write(self.file, {**(slot.content or self.origin), "restarts": saved})

    # Running --------------------------------------------------------------------------------------------------------

    def _screen(self) -> None:
        """Make some iterations from every start; noisy ones that fail are drawn again with less noise."""
        while group := self._waiting():
            for start in group:
                if start.leaves is None:
                    start.leaves = self._place(start)
            self._run(group, min(self.screen, self.total), screening=True)

    def _waiting(self) -> list[Start]:
        """Return the starts of the first attempt that not all of them made; those that failed in one make the next."""
        for attempt in range(len(HALVINGS)):
            group = [s for s in self.starts if s.attempt == attempt]
            if not all(s.made for s in group):
                return group
            for start in group:
                if not start.passed and start.kind == "noise" and attempt + 1 < len(HALVINGS):
                    start.begin_again()
        return []

    def _place(self, start: Start) -> dict[str, torch.Tensor]:
        """Return where a start begins."""
        checkpoint.restore(self.engine, self.origin)
        return self.initial(start.number, start.seed, HALVINGS[start.attempt], read(self.engine))

    def _finish(self) -> None:
        """Take the best to the end, the next best in place of those that fail."""
        order, sound = sorted((s for s in self.starts if s.passed), key=lambda s: -s.screened), 0
        while order and sound < self.wanted:
            group, order = order[: self.wanted - sound], order[self.wanted - sound :]
            self._run(group, self.total, screening=False)
            sound += sum(s.sound for s in group)

    def _run(self, group: list[Start], number: int, screening: bool) -> None:
        """Make the runs of a group up to `number` iterations."""
        for part in self.together.parts(self.engine, self.origin, self.starts[0].leaves, group):
            ended = [s.made if screening else s.finished for s in part]
            alone = self.watched and not screening
            rows = None if alone else self.together.rows(self.engine, part, ended)
            for place, start in enumerate(part):
                if ended[place]:
                    continue
                self._make(start, number, screening, rows and rows.row(place))
                if start.status == "INTERRUPTED":
                    raise KeyboardInterrupt
                start.made, start.finished = True, not screening
                if screening:
                    self._judge(start)
                self._save(start.slot)
                if rows:
                    rows.leave(place)

    def _judge(self, start: Start) -> None:
        """Note what the screening showed."""
        start.passed, start.screened = start.sound, start.objective
        if start.passed and start.status == "MAX_ITER" and self.total > self.screen:
            start.status = "SCREENED"

    def _make(self, start: Start, number: int, screening: bool, iterate: Iterate | None) -> None:
        self.last = start
        if start.slot.content is None:
            checkpoint.restore(self.engine, self.origin)
            checkpoint.restore_loader(self.data, self.origin["rng"]["loader"])
            write(self.engine, start.leaves)
        quietly = {"callbacks": (), "validation": None, "progress_bar": False} if screening else {}
        every = self.every or (number if self.file is None or screening else None)
        options = {"seed": start.seed if self.seed is not None else None, "checkpoint": start.slot, "every": every}
        try:
            start.fit = fit = self.run(number, iterate=iterate, resume="auto", **options, **quietly)
            start.objective, start.reason = self.objective(fit), ""
        except FAILURES as error:
            if isinstance(error, EmvaeError) and not isinstance(error, ModelError):
                raise
            start.error, start.reason = error, str(error)
            start.status = "DEGENERATE" if isinstance(error, DegenerateError) else "FAILED"
            return
        start.status, start.iterations = fit.status, fit.num_iterations
        if fit.status == "DEGENERATE":
            start.reason = fit.verdict.reason
            packed = checkpoint.pack(
                self.engine, fit.record, iteration=fit.num_iterations, status=fit.status, seed=options["seed"]
            )
            packed["rng"]["loader"] = self.origin["rng"]["loader"]
            start.slot.content = packed

    # Ending ---------------------------------------------------------------------------------------------------------

    def _best(self) -> Start:
        """Return the best start: of those that were not screened out, that are sound, or that have a fit at all."""
        ended = [s for s in self.starts if s.sound and s.status != "SCREENED"]
        broken = [s for s in self.starts if s.status in ("DEGENERATE", "INTERRUPTED") and (s.fit or s.slot.content)]
        for candidates in (ended, [s for s in self.starts if s.sound], broken):
            if candidates:
                return max(candidates, key=lambda s: -math.inf if math.isnan(s.objective) else s.objective)
        reasons = "; ".join(f"start {s.number}: {s.reason or s.status}" for s in self.starts)
        fail(
            StepError,
            "run",
            f"find a start among n_init={self.n_init}",
            got=f"none that did not fail: {reasons}",
            because="at least one has to come to an objective that can be compared",
            fix="Give starts by init=, or run once without n_init to see the error where it happens.",
            cause=next((s.error for s in self.starts if s.error), None),
        )

    def _take(self, best: Start) -> Fit:
        """Give the engine the state of the best start, and return its fit."""
        content = best.slot.content
        if best.status == "INTERRUPTED" and best is self.last:
            return best.fit
        if best.fit is not None:
            checkpoint.restore(self.engine, content)
            return best.fit
        number = content["iteration"] if self.data is None else content["epoch"]
        quietly = {"callbacks": (), "validation": None, "progress_bar": False}
        return self.run(number, checkpoint=best.slot, resume=True, seed=content["seed"], **quietly)
