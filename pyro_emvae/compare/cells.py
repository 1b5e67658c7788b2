r"""The cells of a sweep in one file: there whole or not at all, readable without us, refused if of something else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from pyro.infer import ELBO
from torch import Tensor

from .._checks import EmvaeError, fail, tensors_in

__all__ = ["Cells", "digest", "signature"]

FORMAT = 1


class Cells:
    """Finished cells by key, with what they were computed from; kept in a JSON file if there is a path."""

    def __init__(self, path: Any) -> None:
        self.path = None if path is None else _writable(path)
        self.known: dict[str, dict[str, Any]] = self._read() if self.path and self.path.exists() else {}

    def find(self, key: list[Any], origin: Mapping[str, Any]) -> Any:
        """Return the Dataset of a cell, or None if it has to be computed.

        Other rows make it stale; another origin (parameters, data, options) is an error.
        """
        import xarray as xr

        cell = self.known.get(json.dumps(key))
        if cell is None or cell["origin"]["rows"] != origin["rows"]:
            return None
        for name, value in origin.items():
            if cell["origin"].get(name) != value:
                _refuse(
                    f"go on with the cell {key} of {self.path}",
                    f"{name} {value} where the file has {cell['origin'].get(name)}",
                    "cells of one sweep have the same parameters to start from, data and options",
                    "Start another file: give another path.",
                )
        return xr.Dataset.from_dict(cell["dataset"])

    def add(self, key: list[Any], origin: Mapping[str, Any], dataset: Any) -> None:
        """Add a cell, and write the file anew."""
        self.known[json.dumps(key)] = {"origin": dict(origin), "dataset": dataset.to_dict()}
        if self.path is not None:
            self._write()

    def _write(self) -> None:
        waiting = self.path.with_name(f".{self.path.name}.tmp")
        try:
            with open(waiting, "w", encoding="utf-8") as file:
                json.dump({"format": FORMAT, "cells": self.known}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(waiting, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                waiting.unlink()
            raise

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}")
            return dict(content["cells"])
        except (OSError, ValueError, KeyError, TypeError) as cause:
            _refuse(
                f"read {self.path}",
                f"{type(cause).__name__}: {str(cause)[:100]}",
                "a sweep goes on with a file that a sweep wrote",
                "Give another path, or remove the file.",
                cause,
            )


def _writable(path: Any) -> Path:
    try:
        path = Path(os.fspath(path)).absolute()
    except TypeError as cause:
        _refuse("write cells", f"path={path!r}", "a path is a string or a Path", 'Write path="sweep.json".', cause)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        got = "a folder" if path.is_dir() else f"the folder {path.parent}, which is missing or not writable"
        _refuse(f"write to {path}", got, "it is a file in a folder that exists", "Make the folder first.")
    return path


def _refuse(act: str, got: str, because: str, fix: str, cause: BaseException | None = None) -> NoReturn:
    fail(EmvaeError, "sweep_gradients", act, got=got, because=because, fix=fix, cause=cause)


def digest(named: Mapping[str, Tensor], *values: Any) -> str:
    """Return a short checksum of tensors by name and of all tensors in nested values."""
    total = hashlib.sha256()
    tensors: Iterable[tuple[str, Tensor]] = [*named.items(), *(("", t) for t in tensors_in(values))]
    for name, tensor in tensors:
        plain = torch.as_tensor(tensor).detach().cpu().contiguous()
        total.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        total.update(plain.numpy().tobytes())
    return total.hexdigest()[:16]


def signature(spec: Any) -> str:
    """Return what tells one row's specification from another's."""
    if isinstance(spec, Mapping):
        return ", ".join(f"{name}: {signature(part)}" for name, part in spec.items())
    if isinstance(spec, ELBO):
        parts = [getattr(spec, name, None) for name in ("num_particles", "estimator", "objective", "alpha")]
        return f"{type(spec).__name__}({', '.join(map(signature, parts))})"
    return getattr(spec, "__qualname__", None) or repr(spec)
