r"""The one run loop of `SVI` and `EM`: data, history, validation, callbacks, interruption, and what it returns."""

from __future__ import annotations

import contextlib
import math
import platform
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import annealing
from ._checks import DataError, DegenerateError, EmvaeError, fail, positive_int, refuse_missing, require_data
from .batches import (
    arguments,
    batches,
    dims_of,
    first_batch,
    layout,
    length,
    refuse_data,
    refuse_dims,
    refuse_iterators,
    shapes_of,
    to_device,
)
from .checkpoint import Checkpoints, loader_state, restore_loader
from .convergence import Verdict
from .engine import Engine
from .history import History, Record
from .loss import MonteCarloELBO
from .monitor import ENDS, Monitor
from .particles import quiet

__all__ = ["Fit", "History", "Progress", "Record", "run"]


@dataclass(frozen=True)
class Fit:
    r"""What a run returns.

    Args:
        status: ``"MAX_ITER"`` (all iterations were made: no claim of convergence) or another key of
            `convergence.STATUSES`, which says what each means.
        model, guide: The user's.
        params: Constrained values at the end, detached, by name.
        blocks: Block of each parameter.
        num_iterations: Iterations made.
        provenance: Versions, device, dtype, seed, data shapes, resolved estimators.
        objective: Objective at ``params`` where both half-steps are exact, else that of the last iteration; nats.
        verdict: What the stopping rule said last: estimated rate, projected gain, its reason.
        restarts: A table of all starts of a run with ``n_init``, else None.
        inference: The `SVI` or `EM` that made the fit, whose E-step `standard_errors` uses.
    """

    status: str
    model: Callable = field(repr=False)
    guide: Callable = field(repr=False)
    params: dict[str, Tensor] = field(repr=False)
    blocks: dict[str, str] = field(repr=False)
    num_iterations: int
    provenance: dict[str, Any] = field(repr=False)
    record: History = field(repr=False)
    objective: float = field(default=math.nan, repr=False)
    verdict: Verdict = field(default=Verdict(), repr=False)
    restarts: Any = field(default=None, repr=False)
    inference: Any = field(default=None, repr=False)

    @property
    def history(self) -> Any:
        """The history as an `xarray.Dataset` with dims ``step`` (gradient steps) and ``iteration``."""
        return self.record.dataset

    def summary(self, standard_errors: Any = None) -> Any:
        """Return a table of the parameters, as a `pandas.DataFrame`.

        Args:
            standard_errors: What `pyro_emvae.standard_errors` returned for this fit. One row per element of the model's
                parameters then: parameter, index, block, shape, estimate, standard error, and status, which is that
                of the run, or why there is no standard error. Parameters without, such as the guide's, have one row.
                None: one row per parameter, with the mean of a tensor's elements, and NaN for the standard error.
        """
        import pandas as pd

        errors = {} if standard_errors is None else standard_errors.rows
        rows = []
        for name, value in self.params.items():
            about = {"parameter": name, "block": self.blocks[name], "shape": tuple(value.shape)}
            brief = {"index": (), "estimate": _brief(value), "standard_error": math.nan, "status": self.status}
            rows += [about | row | _status(row, self.status) for row in errors.get(name, [brief])]
        columns = ["parameter", "block", "shape", "estimate", "standard_error", "status"]
        return pd.DataFrame(rows, columns=columns if standard_errors is None else [columns[0], "index", *columns[1:]])


def _status(row: Mapping[str, Any], status: str) -> dict[str, str]:
    return {"status": status if row["status"] in ("", status) else row["status"]}


def _brief(value: Tensor) -> Any:
    return value.item() if value.numel() == 1 else f"mean {float(value.double().mean()):.4g}"


@dataclass(frozen=True)
class Progress:
    """What a callback sees; it stops the run by returning True."""

    iteration: int
    epoch: int
    loss: float
    validation: float
    model: Callable = field(repr=False)
    guide: Callable = field(repr=False)
    history: History = field(repr=False)


class _Interrupt:
    """Turn the first Ctrl-C into a flag, so that no update is torn; the second one is an ordinary Ctrl-C."""

    def __enter__(self) -> _Interrupt:
        self.flag = False
        self.previous = None
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.getsignal(signal.SIGINT)
            if self.previous is not signal.default_int_handler:
                self.previous = None
            else:
                signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.flag = True
        signal.signal(signal.SIGINT, self.previous)

    def __exit__(self, *_: Any) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)


def run(
    engine: Engine,
    iterate: Callable[[tuple, dict], Record],
    num_iterations: int | None,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    data: Iterable | None = None,
    num_epochs: int | None = None,
    to_args: Callable[[Any], Any] | None = None,
    validation: Any = None,
    every: int | None = None,
    callbacks: Callable | Iterable[Callable] = (),
    on_nonfinite: str | None = None,
    progress_bar: bool | None = None,
    device: Any = None,
    seed: int | None = None,
    track: Iterable[str] = (),
    stop: Any = None,
    on_decrease: str | None = None,
    deterministic: bool = False,
    monotone: bool = False,
    norms: bool = False,
    evaluate: Callable[[tuple, dict], float] | None = None,
    screen: Callable[[tuple, dict], str] | None = None,
    checkpoint: Any = None,
    resume: str | bool = "auto",
    anneal: Any = None,
) -> Fit:
    r"""Iterate over data and return a `Fit`; the loop behind ``SVI.run`` and ``EM.run``.

    Args:
        engine: What the iterations change.
        iterate: Makes one iteration on one batch.
        num_iterations: Iterations on ``args, kwargs``; with `data`, at most this many in all.
        args, kwargs: The data, without `data`.
        data: An iterable of batches, such as a DataLoader; a tuple becomes positional arguments, a dict keyword
            arguments, anything else one argument.
        num_epochs: Passes over `data`; 1 by default.
        to_args: Turns a batch into ``(args, kwargs)`` in place of that rule.
        validation: Held-out data, as a batch or an iterable of batches; its objective is recorded per epoch, or
            every `every` iterations. It is taken once more before the first update, so that what is wrong with it
            shows in time.
        every: Iterations between validations, and between checkpoints, without `data`; a twentieth of the run by
            default. With `data` both are made at the end of every epoch.
        callbacks: One or many; called after every iteration with a `Progress`; True stops.
        on_nonfinite: Overrides the engine's policy for this run.
        progress_bar: True, False, or None: if the standard error is a terminal.
        device: Where batches are moved.
        seed: Seed for Pyro, torch, numpy and Python before the first iteration.
        track: Names of parameters whose constrained value is recorded, the initial one and after each iteration.
        stop: A rule of `convergence`, asked after every iteration, or with `data` after every epoch about its mean;
            None: all iterations are made; ``"auto"``: see `Monitor`.
        on_decrease, deterministic, monotone, norms: See `Monitor`.
        evaluate: Returns minus the objective at the present parameters, at the end of a run without noise.
        screen: Returns what says that the parameters are no maximum, at the end of such a run; "" if nothing does.
        checkpoint: A file for all that the run changes. It is there whole or not at all, so that a run that was
            killed at any point, and is started again in the same way, gives the numbers of one that was not.
            Not in it: what callbacks, the model or a loader's workers keep in Python.
        resume: ``"auto"``: go on from `checkpoint` if it exists, else start; iterations and epochs count from the
            first start, and a run that had come to its end returns its `Fit`. True: it has to exist. False: start
            anew, and replace it.
        anneal: A schedule of `annealing`, or a function from iteration to factor, which reaches 1 within the run. What
            is recorded is the objective without the factor; no rule judges before it is 1. The factors are the
            history's ``anneal``.

    Raises:
        EmvaeError: A schedule that does not reach 1 within the run.
        DataError: No data: both or neither of arguments and `data`, an empty loader, or an iterator for what is gone
            through more than once; a batch that is laid out unlike the first one, other than by its number of rows.
        StepError: The objective of exact half-steps went down, and `on_decrease` is ``"raise"``; the parameters are
            those before.
        CheckpointError: `checkpoint` cannot be written, is damaged, or belongs to another model or seed.
    """
    _check_options(data, callbacks, every, seed)
    refuse_iterators(data, num_epochs, validation)
    total = length(num_iterations, data, num_epochs)
    schedule, history = annealing.checked(anneal, total), History()
    keeper = Checkpoints(engine, checkpoint, resume, data, seed)
    track = [track] if isinstance(track, str) else list(track)
    look = None if screen is None else lambda: screen(*to_device(args, kwargs, device))
    fixed = deterministic and data is None
    history.monitor = Monitor(engine, stop, on_decrease, fixed, track, monotone=monotone, norms=norms, look=look)
    if hasattr(iterate, "state_dict"):
        history.iterate = iterate
    start = keeper.begin(history, lambda: to_device(*first_batch(args, kwargs, data, to_args), device))
    if seed is not None and not start.source:
        pyro.set_rng_seed(seed)
    held_out = None if validation is None else lambda: _validate(engine, validation, to_args, device)
    callbacks = [callbacks] if callable(callbacks) else list(callbacks)
    status = start.status if start.ended else "MAX_ITER"
    numbers = {"limit": num_iterations, "total": total, "every": every, "by_epoch": data is not None}
    loop = _Loop(engine, iterate, history, keeper, schedule, held_out, callbacks, start.iteration, status, **numbers)
    given = batches(num_iterations, args, kwargs, data, num_epochs, to_args, start)
    with _settings(engine, schedule, on_nonfinite):
        loop.go(((epoch, last, *to_device(*batch, device)) for epoch, last, batch in given), progress_bar)
    if not loop.iteration and loop.status == "MAX_ITER":
        refuse_data("an iterable without batches", "Pass a loader that has at least one batch.")
    value = None if evaluate is None else lambda: -evaluate(*to_device(args, kwargs, device))
    status, objective = _closed(loop, value, look)
    shapes = loop.shapes or shapes_of(args, kwargs)
    fit = _fit(engine, status, loop.iteration, history, keeper.seed, shapes, objective)
    fit.provenance.update({"resumed_from": start.source} if start.source else {})
    return fit


@contextlib.contextmanager
def _settings(engine: Engine, schedule: annealing.Schedule | None, on_nonfinite: str | None) -> Iterator[None]:
    """Let the engine know what holds for this run, and forget it afterwards."""
    engine.expect_changes()
    engine.beta = None if schedule is None else torch.ones((), dtype=torch.float64)
    policy, engine.on_nonfinite = engine.on_nonfinite, on_nonfinite or engine.on_nonfinite
    try:
        yield
    finally:
        engine.on_nonfinite, engine.on_setup, engine.beta = policy, None, None


@dataclass
class _Loop:
    """Where a run stands, and its iterations one by one."""

    engine: Engine
    iterate: Callable[[tuple, dict], Record]
    history: History
    keeper: Checkpoints
    schedule: annealing.Schedule | None
    held_out: Callable[[], float] | None
    callbacks: list[Callable]
    iteration: int
    status: str
    limit: int | None
    total: int | None
    every: int | None
    by_epoch: bool
    shapes: list[str] | None = None
    first: list[str] | None = None
    dims: dict[Any, int] = field(default_factory=dict)

    def go(self, given: Iterable[tuple[int, bool, tuple, dict]], progress_bar: bool | None) -> None:
        """Iterate until the batches or the iterations are over, or something ends the run."""
        hidden = None if progress_bar is None else not progress_bar
        bar = tqdm(total=self.total, initial=self.iteration, disable=hidden, leave=False)
        try:
            with bar, _Interrupt() as interrupt:
                if not self.iteration:
                    self._begin()
                for epoch, last, args, kwargs in given:
                    if self.limit is not None and self.iteration >= self.limit:
                        break
                    self._once(epoch, last, args, kwargs, bar, interrupt)
                    if self.status != "MAX_ITER":
                        break
        except KeyboardInterrupt:
            self.status = "INTERRUPTED"
        except DegenerateError as error:
            self.status, self.history.monitor.verdict = "DEGENERATE", Verdict("DEGENERATE", reason=str(error))

    def _begin(self) -> None:
        """Note where the run starts, and let what is wrong with the held-out data show before anything is changed."""
        self.history.monitor.start()
        if self.held_out is None:
            return
        if self.engine.parameters is not None:
            self.held_out()
            return
        note = self.engine.on_setup
        self.engine.on_setup = lambda: (note(), self.held_out())

    def _once(self, epoch: int, last: bool, args: tuple, kwargs: dict, bar: tqdm, interrupt: _Interrupt) -> None:
        """Make one iteration, and tell all that want to know."""
        record, ended = self._iterated(args, kwargs, last)
        judged = last if self.by_epoch else _due(self.iteration, self.total, self.every)
        validation = self._validated(judged)
        bar.set_postfix(_shown(record, ended), refresh=bool(ended) or self.iteration + 1 == self.total)
        bar.update()
        sides = (self.engine.model, self.engine.guide, self.history)
        progress = Progress(self.iteration, epoch, record.loss, validation, *sides)
        self.iteration += 1
        if _call(self.callbacks, progress, self.engine):
            self.status = "STOPPED"
        elif interrupt.flag or ended:
            self.status = "INTERRUPTED" if interrupt.flag else ended
        if judged or (not self.by_epoch and self.status != "MAX_ITER"):
            self.keeper.write(self.history, self.iteration, epoch + 1, self.status)

    def _iterated(self, args: tuple, kwargs: dict, last: bool) -> tuple[Record, str | None]:
        """Iterate on a batch; return what happened, and the status that ends the run if a rule says so."""
        monitor = self.history.monitor
        self.shapes, self.first = self.shapes or shapes_of(args, kwargs), self.first or layout(args, kwargs)
        refuse_dims(args, kwargs, self.dims)
        self.dims = dims_of(args, kwargs) | self.dims
        annealed = _set_factor(self.engine, self.schedule, self.iteration)
        record = _iterated(self.iterate, args, kwargs, self.first)
        if self.schedule is not None:
            record.facts = {**record.facts, "anneal": float(self.engine.beta)}
        self.history.add(self.iteration, record)
        return record, monitor.after(self.iteration, record.loss, last, annealed) or monitor.hear(record.verdict)

    def _validated(self, judged: bool) -> float:
        """Return the last objective of held-out data, NaN before the first."""
        if self.held_out is not None and judged:
            self.history.validation.append((self.iteration, self.held_out()))
        return self.history.validation[-1][1] if self.history.validation else math.nan


def _closed(loop: _Loop, value: Callable[[], float] | None, look: Callable[[], str] | None) -> tuple[str, float]:
    """Return status and objective of a run that is over, of one without noise as they are at its last parameters."""
    status, monitor = loop.status, loop.history.monitor
    if loop.engine.skipped > loop.keeper.skipped and status == "MAX_ITER":
        status = "NAN"
    objective = loop.history.iterations[-1][0] if loop.history.iterations else math.nan
    if monitor.deterministic and value is not None and status != "INTERRUPTED":
        status, objective = monitor.end(status, value())
        status = monitor.screen(status, look() if look is not None and status in ENDS else "")
    return status, objective


def _iterated(iterate: Callable[[tuple, dict], Record], args: tuple, kwargs: dict, first: list[str]) -> Record:
    """Make an iteration; if it fails on a batch that is laid out unlike the first one, say so."""
    try:
        return iterate(args, kwargs)
    except (ValueError, RuntimeError, TypeError, IndexError) as cause:
        here = layout(args, kwargs)
        if isinstance(cause, EmvaeError) or here == first:
            raise
        fail(
            DataError,
            "run",
            "iterate on a batch",
            got=f"{', '.join(here)} after {', '.join(first)}",
            because=f"batches may differ in their number of rows, and this one fails: {str(cause).splitlines()[0]}",
            fix="Let the loader give batches of one kind, or turn them into arguments by to_args=.",
            cause=cause,
        )


def _set_factor(engine: Engine, schedule: annealing.Schedule | None, iteration: int) -> bool:
    """Set the factor of an iteration, in the tensor that recorded steps read; return whether it is below 1."""
    if schedule is None:
        return False
    engine.beta.fill_(schedule.factor(iteration))
    return iteration < schedule.ends


def _check_options(data: Any, callbacks: Any, every: Any, seed: Any) -> None:
    if isinstance(data, Tensor):
        refuse_data(
            f"one tensor of shape {tuple(data.shape)} as data=",
            "Pass it as an argument, run(1000, x); or batches, data=DataLoader(TensorDataset(x), batch_size=128).",
        )
    for name, value, minimum in (("every", every, 1), ("seed", seed, 0)):
        if value is not None:
            positive_int("run", name, value, minimum)
    wrong = [] if callable(callbacks) else [c for c in _listed(callbacks) if not callable(c)]
    if wrong:
        fail(
            EmvaeError,
            "run",
            "call its callbacks",
            got=repr(wrong[0]),
            because="a callback is a function of a Progress",
            fix="Write callbacks=lambda progress: progress.iteration >= 100, which stops by returning True.",
        )


def _listed(callbacks: Any) -> list:
    return list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]


def _due(iteration: int, total: int | None, every: int | None) -> bool:
    every = every or max(1, (total or 20) // 20)
    return (iteration + 1) % every == 0 or iteration + 1 == total


def _validate(engine: Engine, validation: Any, to_args: Any, device: Any) -> float:
    """Return the mean objective over the validation batches, in eval mode, on fixed draws."""
    single = isinstance(validation, Tensor | tuple | Mapping)
    loss = engine.loss if hasattr(engine.loss, "loss") else MonteCarloELBO()
    losses, before = [], loader_state(validation)
    try:
        with quiet(seed=0, train=False), torch.no_grad():
            for batch in [validation] if single else validation:
                a, k = to_device(*arguments(batch, to_args), device)
                require_data("validation=", a, k)
                losses.append(float(loss.loss(engine.model, engine.guide, *a, **k)))
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, EmvaeError):
            refuse_missing("validation=", error, a, k, act="be judged on these data")
        error.add_note("This is about validation=, not about the data of the iterations.")
        raise
    finally:
        restore_loader(validation, before if isinstance(before, list) else None)
    if not losses:
        refuse_data("validation without batches", "Pass a tensor, a tuple, or a loader with at least one batch.")
    return -math.fsum(losses) / len(losses)


def _call(callbacks: list[Callable], progress: Progress, engine: Engine) -> bool:
    """Call them all; generators, buffers and modes are as before."""
    if not callbacks:
        return False
    modules = {m for module in engine.parameters.modules for m in module.modules()} if engine.parameters else set()
    modes = [(module, module.training) for module in modules]
    try:
        with quiet():
            return any([callback(progress) is True for callback in callbacks])
    finally:
        for module, training in modes:
            module.training = training


def _shown(record: Record, status: str | None) -> dict[str, str]:
    """Return what the progress bar says: the objective by its name, the gains that are known, the status at the end."""
    numbers = {record.kind: -record.loss, "E": record.e_gain, "M": record.m_gain}
    shown = {name: f"{value:.4g}" for name, value in numbers.items() if name == record.kind or not math.isnan(value)}
    return shown | ({"status": status} if status else {})


def _fit(
    engine: Engine,
    status: str,
    iteration: int,
    history: History,
    seed: int | None,
    shapes: Any,
    objective: float,
) -> Fit:
    parameters = engine.parameters
    rows = parameters.rows if parameters is not None else ()
    leaf = next((row.leaf for row in rows), None)
    resolved = getattr(engine.loss, "resolved", {})
    provenance = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "device": str(leaf.device) if leaf is not None else "",
        "dtype": str(leaf.dtype) if leaf is not None else "",
        "seed": -1 if seed is None else seed,
        "data": shapes or [],
        "loss": type(engine.loss).__name__,
        "estimators": [f"{site}: {estimator}" for site, estimator in resolved.items()],
        "backend": engine.backend,
    }
    params = parameters.constrained() if parameters is not None else {}
    blocks = {row.name: row.block for row in rows}
    return Fit(
        status,
        engine.model,
        engine.guide,
        params,
        blocks,
        iteration,
        provenance,
        history,
        objective,
        history.monitor.verdict,
    )
