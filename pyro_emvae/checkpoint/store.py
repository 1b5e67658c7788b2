r"""Where a run's checkpoint is kept: a file, or whatever answers in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from .file import read, writable, write
from .plain import refuse

__all__ = ["File", "Store", "store_of"]


class Store(Protocol):
    """Has at most one checkpoint; prints as the place where that is."""

    def exists(self) -> bool: ...

    def read(self) -> dict[str, Any]: ...

    def write(self, content: Mapping[str, Any]) -> None: ...


class File:
    """A file of one run.

    Raises:
        CheckpointError: It cannot be there; it is the file of many starts.
    """

    def __init__(self, path: Any) -> None:
        self.path = writable(path)

    def __str__(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        return self.path.exists()

    def read(self) -> dict[str, Any]:
        content = read(self.path)
        if "restarts" in content:
            refuse(
                f"go on from {self.path}",
                f"a search among {content['restarts']['plan']['n_init']} starts",
                "a run without n_init has one start",
                "Write the same n_init=, another path, or resume=False.",
            )
        return content

    def write(self, content: Mapping[str, Any]) -> None:
        write(self.path, content)


def store_of(where: Any) -> Store | None:
    """Return a store itself, or the file of a path; None for None."""
    return where if where is None or (hasattr(where, "exists") and hasattr(where, "write")) else File(where)
