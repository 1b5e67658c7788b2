r"""Standard errors by fits to resampled rows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._checks import DataError, EmvaeError, fail, tensors_in
from ..driver import Fit
from ..parameters import assign
from ..particles import quiet
from .coordinates import Coordinates
from .errors import LIMIT, StandardErrors

__all__ = ["bootstrap"]

FAILED = (ArithmeticError, ValueError, torch.linalg.LinAlgError)


def bootstrap(fit: Fit, where: Coordinates, args: tuple, kwargs: dict[str, Any], n_boot: int, seed: int) -> Any:
    r"""Fit rows drawn with replacement, each time from the estimate, and return the spread of the estimates.

    The loop's parameters, buffers and steps are put back at the end.

    Args:
        fit: By an EM without gradient steps, whose state is its parameters.
        where: Its coordinates.
        args, kwargs: The data; the first dim of each tensor counts the rows.
        n_boot: Number of fits.
        seed: Of the resampling.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    em = fit.inference
    if em is None or not hasattr(em, "phases") or em.schedule == "joint" or any(p.takes_gradients for p in em.phases):
        fail(
            EmvaeError,
            "standard_errors",
            "refit resampled rows",
            got=f"a fit by {type(em).__name__} with gradient steps",
            because="optimizers would carry their momentum from one fit to the next",
            fix='Use half-steps without gradients, or method="louis".',
        )
    count = _rows(args, kwargs)
    generator = torch.Generator().manual_seed(seed)
    estimates, failed = [], 0
    with _restored(em.engine), quiet():
        for _ in range(n_boot):
            rows = torch.randint(count, (count,), generator=generator)
            again = _refit(fit, _take(args, rows), _take(kwargs, rows))
            failed += again is None
            estimates += [] if again is None else [again]
    return _result(where, fit, estimates, failed, n_boot)


def _rows(args: tuple, kwargs: dict[str, Any]) -> int:
    counts = {len(x) for x in tensors_in((args, kwargs)) if x.dim()}
    if len(counts) != 1 or not next(iter(counts)):
        fail(
            DataError,
            "standard_errors",
            "resample rows",
            got=f"tensors with first dims of sizes {sorted(counts)}",
            because="a row is a datum, and each tensor has the same rows",
            fix='Give the data rows in their first dim, or write method="louis".',
        )
    return counts.pop()


def _take(data: Any, rows: Tensor) -> Any:
    if isinstance(data, Tensor):
        return data[rows.to(data.device)] if data.dim() else data
    if isinstance(data, dict):
        return {key: _take(value, rows) for key, value in data.items()}
    if isinstance(data, tuple | list):
        return type(data)(_take(value, rows) for value in data)
    return data


def _refit(fit: Fit, args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor] | None:
    """Return the values of a fit from the estimate, or None if it failed."""
    engine = fit.inference.engine
    try:
        assign(engine.parameters, fit.params)
        engine.steps = {}
        again = fit.inference.run(*args, **kwargs, max_iter=max(500, fit.num_iterations), progress_bar=False)
    except FAILED:
        return None
    sound = again.status not in ("DEGENERATE", "NAN", "INTERRUPTED")
    return again.params if sound else None


@contextlib.contextmanager
def _restored(engine: Any) -> Iterator[None]:
    leaves = [(row.leaf, row.leaf.detach().clone()) for row in engine.parameters.rows]
    saved = {name: getattr(engine, name) for name in ("steps", "count", "skipped", "failure", "on_nonfinite")}
    buffers = [(buffer.tensor, buffer.tensor.clone()) for buffer in engine.parameters.buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in leaves + buffers:
                tensor.copy_(value)
        for name, value in saved.items():
            setattr(engine, name, value)


def _result(where: Coordinates, fit: Fit, found: list, failed: int, n_boot: int) -> StandardErrors:
    names = [row.name for row in where.rows]
    note = f"{failed} of {n_boot} fits failed, and are left out" if failed else ""
    size = len(where.places)
    if len(found) < 2:
        nothing = torch.full_like(where.estimate, math.nan)
        reasons = ("undefined: no two fits to resampled rows succeeded",) * size
        covariance = where.estimate.new_full((size, size), math.nan)
        return StandardErrors(
            "bootstrap", "bootstrap", where.places, where.estimate, nothing, reasons, covariance, nothing, note
        )
    values = torch.stack([torch.cat([f[name].flatten().to(where.estimate) for name in names]) for f in found])
    covariance = torch.cov(values.mT).reshape(size, size)
    relative = values.std(0) / where.jacobian().abs().amax(1)
    bounded = torch.cat([_touches(row, where) for row in where.rows])
    edge = ~torch.isfinite(relative) | (bounded & (relative > LIMIT))
    covariance[edge] = math.nan
    covariance[:, edge] = math.nan
    error = covariance.diagonal().sqrt()
    reasons = tuple("undefined: at the boundary of its constraint" if e else "" for e in edge.tolist())
    return StandardErrors(
        "bootstrap",
        "bootstrap",
        where.places,
        where.estimate,
        error,
        reasons,
        covariance,
        error / math.sqrt(2 * (len(found) - 1)),
        note,
    )


def _touches(row: Any, where: Coordinates) -> Tensor:
    """Return which elements of a parameter have a boundary: all, if one of its coordinates has."""
    names = [r.name for r in where.rows]
    bounded = where.bounded().split([r.leaf.numel() for r in where.rows])[names.index(row.name)]
    return bounded.any().expand(math.prod(row.value.shape))
