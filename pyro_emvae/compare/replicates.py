r"""Independent gradients of one row, vectorized over the recorded gradient where that can be; and their time."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .._checks import RecordingError
from ..engine import Replicator, gradient, record
from ..loss import MonteCarloELBO
from ..parameters import Parameters
from ..particles import draw, hold_batch
from .coordinates import Coordinates
from .rows import Row

__all__ = ["Problem", "draw_batch", "minibatch_variance", "sample", "time_gradient", "time_rows"]

CACHED = 1.5e7  # bytes that stay in a processor's cache


@dataclass(frozen=True)
class Problem:
    """What gradients are taken of, and what is kept of them."""

    model: Callable
    guide: Callable
    args: tuple
    kwargs: Mapping[str, Any]
    parameters: Parameters
    coordinates: Coordinates

    @property
    def pair(self) -> tuple:
        return self.model, self.guide, self.args, self.kwargs

    def gradient(self, row: Row) -> dict[str, Tensor]:
        """Return one ordinary gradient of the loss by name, averaged over the row's repeats."""
        leaves = self.parameters.leaves()
        parts = [
            gradient(self.model, self.guide, row.loss, self.args, self.kwargs, only=leaves).grads
            for _ in range(row.repeats)
        ]
        return parts[0] if row.repeats == 1 else {n: torch.stack([g[n] for g in parts]).mean(0) for n in parts[0]}


def sample(row: Row, problem: Problem, num_replicates: int, memory: float | None, base: int) -> None:
    """Fill `row.samples` with the gradients of the objective, the same draws for each row of the same particles."""
    chunks: dict[str, list[Tensor]] = {block: [] for block in problem.coordinates.keep}

    def store(grads: Mapping[str, Tensor], rows: int) -> None:
        for block, parts in chunks.items():
            parts.append(-problem.coordinates.pick(grads, block, rows))

    torch.manual_seed(base)
    try:
        for grads, size in _vectorized(row, problem, num_replicates, memory):
            store(grads, size)
    except _CannotVectorize as reason:
        row.looped = str(reason)
        for parts in chunks.values():
            parts.clear()
        torch.manual_seed(base)
        for _ in range(num_replicates):
            store(problem.gradient(row), 1)
    row.samples = {block: torch.cat(parts) for block, parts in chunks.items()}


class _CannotVectorize(Exception):
    pass


def _vectorized(
    row: Row, problem: Problem, num_replicates: int, memory: float | None
) -> Iterator[tuple[dict[str, Tensor], int]]:
    if not isinstance(row.loss, MonteCarloELBO):
        raise _CannotVectorize(f"{type(row.loss).__name__} runs its own loss_and_grads")
    parameters, args, kwargs = problem.parameters, problem.args, problem.kwargs
    try:
        buffers = [b.tensor for b in parameters.buffers]
        recording = record(problem.model, problem.guide, row.loss, parameters.leaves(), buffers, args, kwargs)
    except RecordingError as error:
        raise _CannotVectorize(str(error)) from error
    replicator = Replicator(recording, args, kwargs, row.loss.state)
    limit = int((memory or _memory(parameters)) // (row.repeats * replicator.bytes_each))
    for size in split(num_replicates, limit):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                grads = replicator(size * row.repeats)
        except (RuntimeError, NotImplementedError) as error:
            raise _CannotVectorize(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        yield {n: g.unflatten(0, (size, row.repeats)).mean(1) if row.repeats > 1 else g for n, g in grads.items()}, size


def split(number: int, limit: int) -> list[int]:
    """Divide a number into parts of at most `limit`, as few and as even as can be."""
    count = math.ceil(number / max(1, limit))
    return [number * (i + 1) // count - number * i // count for i in range(count)]


def _memory(parameters: Parameters) -> float:
    device = next(iter(parameters.leaves().values())).device
    return torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else CACHED


def time_gradient(row: Row, problem: Problem) -> float:
    """Return the milliseconds that one ordinary eager gradient of the row takes now."""
    start = time.perf_counter()
    for _ in range(row.repeats):
        gradient(problem.model, problem.guide, row.loss, problem.args, problem.kwargs)
    return 1e3 * (time.perf_counter() - start)


def time_rows(rows: list[Row], problem: Problem, turns: int = 4) -> None:
    """Time each row in turn, so that drift hits all alike."""
    times = [[time_gradient(row, problem) for row in rows] for _ in range(turns)]
    for row, column in zip(rows, zip(*times, strict=True), strict=True):
        row.milliseconds = median(column)


def draw_batch(model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Draw the indices of the plates that subsample, to be held."""
    with torch.no_grad():
        return draw(model, guide, args, kwargs).subsample


def minibatch_variance(row: Row, problem: Problem, num_replicates: int) -> dict[str, Tensor]:
    r"""Return $\mathrm{Var}_B\,E[g|B]$ per coordinate: total variance with drawn batches less that within batches.

    Two gradients share each batch, so their covariance over batches is the wanted variance, without bias.
    """
    pairs: dict[str, list[Tensor]] = {block: [] for block in problem.coordinates.keep}
    for _ in range(max(50, num_replicates // 4)):
        with hold_batch(draw_batch(*problem.pair)):
            both = [problem.gradient(row) for _ in range(2)]
        for block, parts in pairs.items():
            parts.append(torch.cat([problem.coordinates.pick(g, block, 1) for g in both]))
    result = {}
    for block, parts in pairs.items():
        g = torch.stack(parts).double()
        centred = g - g.mean(0)
        result[block] = ((centred[:, 0] * centred[:, 1]).sum(0) / (len(parts) - 1)).clamp(min=0)
    return result
