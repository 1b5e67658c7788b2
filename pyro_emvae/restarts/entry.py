r"""From the arguments of ``SVI.run`` and ``EM.run`` to a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from .._checks import DataError, fail, positive_int
from ..batches import arguments
from ..driver import Fit
from ..engine import Engine
from ..loss import MonteCarloELBO
from ..parameters import assign
from ..particles import quiet
from .initial import Initial, values_of
from .lockstep import Iterate, Together
from .search import Search

__all__ = ["find", "first_batch", "recent"]

REPEATS = 10  # sets of draws by which starts are compared
SCREEN = 10  # iterations of the screening, at least
SHARE = 20  # of a stochastic run, one part in so many is for the screening

Batch = tuple[tuple, Mapping[str, Any]]


def find(
    engine: Engine,
    run: Callable[..., Fit],
    total: int | None,
    n_init: int,
    init: Any,
    options: Mapping[str, Any],
    first: Batch,
    *,
    start: Callable | None = None,
    exact: bool = False,
    objective: Callable[[Fit], float] | None = None,
    iterate: Iterate | None = None,
    reason: str = "gradient steps",
) -> Fit:
    """Make a run from the best of `n_init` starts, or from what `init` gives for one; see `Search` and `Initial`.

    Args:
        engine, run: See `Search`; `run` takes a number of iterations, what iterates, and options.
        total: Iterations without a loader.
        n_init, init: As the user gave them.
        options: Those of the run.
        first: The data, or a loader's first batch.
        start: The M-step's, see `Initial`.
        exact: Whether runs draw nothing, so that a run is known by its first iterations; then a third of them go on.
        objective: See `Search`; by default that of the run if exact, else the loss on common random numbers.
        iterate, reason: See `Together`.
    """
    seed, data = options.get("seed"), options.get("data")
    if n_init == 1:
        assign(engine.parameters, values_of(init, seed or 0, *first))
        return run(total)
    if data is None:
        length = positive_int("run", "the number of iterations", total)
    else:
        _refuse_both(total)
        length = positive_int("run", "num_epochs", options.get("num_epochs") or 1)

    def make(number: int, iterate: Iterate | None = None, **changed: Any) -> Fit:
        return run(number, iterate, **changed) if data is None else run(None, iterate, num_epochs=number, **changed)

    least = SCREEN if data is None else 1
    if not exact or options.get("device") is not None:
        iterate, reason = None, reason or "device="
    return Search(
        engine,
        make,
        n_init,
        length,
        Initial(engine, init, *first, start=start),
        seed=seed,
        screen=SCREEN if exact else max(least, length // SHARE),
        wanted=max(1, n_init // 3) if exact else 1,
        objective=objective or (_reached if exact else _on_common_numbers(engine, first, options)),
        together=Together(iterate, *first, reason=reason),
        data=data,
        path=options.get("checkpoint"),
        resume=options.get("resume", "auto"),
        every=options.get("every"),
        watched=bool(options.get("callbacks")),
    )()


def first_batch(args: tuple, kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> Batch:
    """Return the arguments of a run, or those of its loader's first batch; the loader is as before."""
    data = options.get("data")
    if data is None:
        return args, kwargs
    before = checkpoint.loader_state(data)
    with quiet():
        batch = next(iter(data), None) if isinstance(data, Iterable) and not isinstance(data, Tensor) else None
    checkpoint.restore_loader(data, before)
    if batch is None or iter(data) is data:
        fail(
            DataError,
            "run",
            "make many starts",
            got=f"data of type {type(data).__name__}" + (" without batches" if batch is None else ""),
            because="each start goes through all batches",
            fix="Pass a list or a DataLoader, not a tensor, an empty list or a generator.",
        )
    return _placed(arguments(batch, options.get("to_args")), options.get("device"))


def recent(fit: Fit) -> float:
    """Return the mean objective of the last half of the iterations, each from its own draws."""
    values = [row[0] for row in fit.record.iterations]
    last = values[len(values) // 2 :]
    return math.fsum(last) / len(last) if last else math.nan


def _reached(fit: Fit) -> float:
    return fit.objective


def _on_common_numbers(engine: Engine, first: Batch, options: Mapping[str, Any]) -> Callable[[Fit], float]:
    """Return what evaluates the objective at the present parameters, in eval mode, on the same draws for all starts."""
    data, device = options.get("data"), options.get("device")

    def batches() -> Iterable[Batch]:
        if data is None:
            return [first] * REPEATS
        return (_placed(arguments(batch, options.get("to_args")), device) for batch in data)

    def objective(fit: Fit) -> float:
        loss = engine.loss if hasattr(engine.loss, "loss") else MonteCarloELBO()
        before = checkpoint.loader_state(data)
        with quiet(seed=0, train=False), torch.no_grad():
            losses = [float(loss.loss(engine.model, engine.guide, *a, **k)) for a, k in batches()]
        checkpoint.restore_loader(data, before)
        return -math.fsum(losses) / len(losses)

    return objective


def _placed(batch: Batch, device: Any) -> Batch:
    def move(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) and device is not None else x

    return tuple(map(move, batch[0])), {name: move(x) for name, x in batch[1].items()}


def _refuse_both(total: int | None) -> None:
    if total is not None:
        fail(
            DataError,
            "run",
            "make many starts with data=",
            got=f"a number of iterations, {total}",
            because="starts are screened, and go on, by whole epochs",
            fix="Write num_epochs= alone.",
        )
