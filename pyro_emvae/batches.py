r"""Data of a run: batches as arguments, how many there are, and what cannot be iterated over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ._checks import DataError, fail, positive_int
from .checkpoint import Position

__all__ = [
    "arguments",
    "batches",
    "dims_of",
    "first_batch",
    "layout",
    "length",
    "refuse_data",
    "refuse_dims",
    "refuse_iterators",
    "shapes_of",
    "to_device",
]

NOTHING = object()


def length(num_iterations: int | None, data: Any, num_epochs: int | None) -> int | None:
    if data is None:
        if num_iterations is None or num_epochs is not None:
            refuse_data("no number of iterations", "Write run(1000, x), or run(data=loader, num_epochs=10).")
        return num_iterations
    if num_epochs is not None:
        positive_int("run", "num_epochs", num_epochs)
    try:
        epochs = len(data) * (num_epochs or 1)
    except TypeError:
        return num_iterations
    return epochs if num_iterations is None else min(epochs, num_iterations)


def batches(
    num_iterations: int | None,
    args: tuple,
    kwargs: dict,
    data: Any,
    num_epochs: int | None,
    to_args: Any,
    start: Position,
) -> Iterator[tuple[int, bool, tuple[tuple, dict]]]:
    """Yield epoch, whether the batch is the epoch's last, and the arguments."""
    if start.ended:
        return
    if data is None:
        for i in range(start.iteration, num_iterations):
            yield i, True, (args, kwargs)
        return
    if args or kwargs:
        refuse_data(f"{len(args)} arguments beside data=", "Pass the data one way: as arguments, or as data=.")
    for epoch in range(start.epoch, num_epochs or 1):
        waiting: Any = NOTHING
        for batch in data:
            if waiting is not NOTHING:
                yield epoch, False, arguments(waiting, to_args)
            waiting = batch
        if waiting is NOTHING:
            if epoch:
                refuse_data(
                    f"an iterable that was exhausted after {epoch} epochs",
                    "Pass a list or a DataLoader, not a generator.",
                )
            return
        yield epoch, True, arguments(waiting, to_args)


def first_batch(args: tuple, kwargs: dict, data: Any, to_args: Any) -> tuple[tuple, dict]:
    """Return the arguments of a first batch."""
    if data is None:
        return args, kwargs
    for batch in data:
        return arguments(batch, to_args)
    refuse_data("an iterable without batches", "Pass a loader that has at least one batch.")


def arguments(batch: Any, to_args: Callable[[Any], Any] | None = None) -> tuple[tuple, dict]:
    """Return the positional and keyword arguments that a batch stands for."""
    if to_args is not None:
        return to_args(batch)
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    return (batch,), {}


def to_device(args: tuple, kwargs: dict, device: Any) -> tuple[tuple, dict]:
    if device is None:
        return args, kwargs

    def move(x: Any) -> Any:
        return x.to(device, non_blocking=True) if isinstance(x, Tensor) else x

    return tuple(map(move, args)), {k: move(v) for k, v in kwargs.items()}


def shapes_of(args: tuple, kwargs: dict) -> list[str]:
    return [f"{tuple(x.shape)} {x.dtype}" for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]


def layout(args: tuple, kwargs: dict) -> list[str]:
    """Return kind, dtype and shape of each argument, without its number of rows."""
    named = [(str(place), x) for place, x in enumerate(args)] + sorted(kwargs.items())
    return [
        f"argument {name} of shape (rows, {', '.join(map(str, x.shape[1:]))}) {x.dtype}"
        if isinstance(x, Tensor) and x.dim()
        else f"argument {name} of type {type(x).__name__}"
        for name, x in named
    ]


def refuse_dims(args: tuple, kwargs: dict, first: dict[Any, int]) -> None:
    """Refuse a tensor of other dims than in the first batch: models broadcast it without an error, over other data."""
    for name, dims in dims_of(args, kwargs).items():
        if dims != first.get(name, dims):
            fail(
                DataError,
                "run",
                "iterate on a batch",
                got=f"argument {name} of {dims} dims after {first[name]}",
                because="batches may differ in their sizes, and each argument has the same dims in all of them",
                fix="Let the loader keep dims of size 1 (a squeeze() drops that of a single row), or use to_args=.",
            )


def dims_of(args: tuple, kwargs: dict) -> dict[Any, int]:
    """Return how many dims each tensor among the arguments has."""
    return {name: x.dim() for name, x in (*enumerate(args), *kwargs.items()) if isinstance(x, Tensor)}


def refuse_data(got: str, fix: str) -> None:
    fail(DataError, "run", "iterate", got=got, because="every iteration needs data", fix=fix)


def refuse_iterators(data: Any, num_epochs: int | None, validation: Any) -> None:
    """Refuse what would be exhausted before the run is over: each epoch goes through all batches again."""
    for name, given, times in (("data", data, num_epochs or 1), ("validation", validation, 2)):
        if isinstance(given, Iterator) and times > 1:
            many = f" for {num_epochs} epochs" if name == "data" else ""
            refuse_data(
                f"{name}= of type {type(given).__name__}{many}, which can be gone through once",
                "Pass a list or a DataLoader, not a generator.",
            )
