r"""Numbers that are only told, and what listens to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

__all__ = ["listen", "report"]

_listeners: list[list[tuple[Tensor, float]]] = []


def report(value: Tensor) -> float:
    r"""Return a tensor's number, such as an objective in nats, that decides nothing: no branch, no further operation.

    What records tensor operations may take it from the tensor of another run then, as `engine.record_map` does.
    """
    number = float(value)
    for heard in _listeners:
        heard.append((value, number))
    return number


@contextlib.contextmanager
def listen() -> Iterator[list[tuple[Tensor, float]]]:
    """Collect what is reported meanwhile: tensors and their numbers."""
    _listeners.append([])
    try:
        yield _listeners[-1]
    finally:
        _listeners.pop()
