r"""Many starts, the best of which is kept: EM climbs the hill that it starts on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import DegenerateError, StepError
from .driver import Fit
from .engine import Engine
from .parameters import assign

__all__ = ["run"]

HALVINGS = (1.0, 0.5, 0.25, 0.125, 0.0625)
FAILED = (ArithmeticError, ValueError, torch.linalg.LinAlgError)


@dataclass
class _Start:
    """One start: where it is, what it reached, and its status."""

    number: int
    leaves: dict[str, Tensor]
    steps: dict[str, dict]
    fit: Fit | None = None
    status: str = "SCREENED"
    error: Exception | None = None
    noisy: bool = False
    iterations: int = 0
    seed: int | None = None

    @property
    def sound(self) -> bool:
        return self.status not in ("DEGENERATE", "FAILED")

    @property
    def objective(self) -> float:
        return self.fit.objective if self.fit else float("nan")


def run(
    engine: Engine,
    iterate: Callable[..., Fit],
    max_iter: int,
    n_init: int,
    init: Callable[[int, int], Mapping[str, Tensor] | None],
    seed: int | None,
    screen: int = 10,
) -> Fit:
    r"""Screen all starts by a few iterations, run the best to the end, and return the best that is sound.

    Every start makes `screen` iterations. The best third, and at least one, then goes on to the end. A start that
    becomes degenerate (an update at the boundary of a constraint) or fails is left out, and the next best takes its
    place: its likelihood may be the highest, and without bound.

    Args:
        engine: What the iterations change. At the end its parameters are those of the best start.
        iterate: Makes a run of a given number of iterations from the present parameters.
        max_iter: Iterations of a full run, less those of the screening.
        n_init: Starts.
        init: Constrained initial values of a start, given its number and seed; those not returned stay as they are.
            None: the present values, for all but start 0 with normal noise on the unconstrained ones, of standard
            deviation ``max(1, root mean square)`` of the parameter, halved until the start is no longer degenerate.
        seed: Start k has seed ``seed + k``; 0 if None.
        screen: Iterations of the screening.

    Returns:
        The fit of the best start with ``restarts``, a table with one row per start: its objective (nats), status, and
        whether it was degenerate. If all were degenerate, the fit of the one whose objective was highest.

    Source: Biernacki, Celeux and Govaert 2003, for short runs before long ones.
    """
    starts = _screened(engine, iterate, min(screen, max_iter), n_init, init, seed)
    wanted, done = max(1, n_init // 3), []
    for start in sorted((s for s in starts if s.status == "SCREENED"), key=lambda s: -s.objective):
        if len(done) == wanted or _interrupted(starts):
            break
        _go_on(engine, start, iterate, max(1, max_iter - screen))
        if start.sound:
            done.append(start)
    candidates = done or [s for s in starts if s.sound] or [s for s in starts if s.fit is not None]
    if not candidates:
        raise starts[0].error
    best = max(candidates, key=lambda s: s.objective)
    _write(engine, best)
    status = "INTERRUPTED" if _interrupted(starts) else best.fit.status
    return dataclasses.replace(best.fit, status=status, restarts=_table(starts))


def _screened(
    engine: Engine, iterate: Callable[..., Fit], number: int, n_init: int, init: Any, seed: int | None
) -> list[_Start]:
    """Make some iterations from every start."""
    present, starts = _read(engine), []
    while len(starts) < n_init and not _interrupted(starts):
        place = len(starts)
        for noise in HALVINGS:
            start = _begin(engine, present, place, init, (seed or 0) + place, noise)
            start.seed = None if seed is None else seed + place
            _go_on(engine, start, iterate, number, track=(), callbacks=(), validation=None)
            if start.sound or not start.noisy:
                break
        start.status = "SCREENED" if start.sound and start.status != "INTERRUPTED" else start.status
        starts.append(start)
    return starts


def _interrupted(starts: list[_Start]) -> bool:
    return any(start.status == "INTERRUPTED" for start in starts)


def _begin(engine: Engine, present: dict[str, Tensor], number: int, init: Any, seed: int, noise: float) -> _Start:
    start = _Start(number, {name: leaf.clone() for name, leaf in present.items()}, {})
    _write(engine, start)
    values = init(number, seed)
    if values is not None:
        assign(engine.parameters, values)
        start.leaves = _read(engine)
    elif number:
        generator, start.noisy = torch.Generator().manual_seed(seed), True
        for name, leaf in start.leaves.items():
            drawn = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
            start.leaves[name] = leaf + noise * drawn * leaf.square().mean().sqrt().clamp(min=1.0)
    return start


def _go_on(engine: Engine, start: _Start, iterate: Callable[..., Fit], number: int, **changed: Any) -> None:
    _write(engine, start)
    try:
        start.fit = iterate(number, progress_bar=False, seed=start.seed, **changed)
        start.iterations += start.fit.num_iterations
        start.status = start.fit.status
    except StepError:
        raise
    except FAILED as error:
        start.error, start.status = error, "DEGENERATE" if isinstance(error, DegenerateError) else "FAILED"
    start.leaves, start.steps = _read(engine), engine.steps


def _read(engine: Engine) -> dict[str, Tensor]:
    return {name: leaf.detach().clone() for name, leaf in engine.parameters.leaves(*engine.parameters.theta).items()}


def _write(engine: Engine, start: _Start) -> None:
    live = engine.parameters.leaves(*engine.parameters.theta)
    with torch.no_grad():
        for name, leaf in start.leaves.items():
            live[name].copy_(leaf)
    engine.steps = start.steps


def _table(starts: list[_Start]) -> Any:
    import pandas as pd

    rows = [
        {
            "start": s.number,
            "objective": s.objective,
            "status": s.status,
            "degenerate": s.status == "DEGENERATE",
            "iterations": s.iterations,
        }
        for s in starts
    ]
    return pd.DataFrame(rows)
