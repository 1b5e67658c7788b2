r"""How a model opens its data plate, found by running it to its first local site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from pyro import poutine

from .._checks import ModelError, fail
from .._pyro import Messenger
from ..particles import is_subsample, quiet

__all__ = ["DataPlate", "PlateReader", "look", "signature"]


@dataclass(frozen=True)
class DataPlate:
    r"""How the model opens its data plate for given arguments.

    Args:
        name: The plate's name.
        dim: Its dim.
        full_size: N, the number of data.
        size: B, the number of data in use; densities are scaled by N / B.
        source: Who says which data: ``"whole"`` (all of them), ``"given"`` (the model, by ``subsample=``) or
            ``"drawn"`` (the plate, by ``subsample_size=``).
        device: Where a drawn plate keeps its indices.
    """

    name: str
    dim: int
    full_size: int
    size: int
    source: str
    device: Any = None

    def resized(self, rows: int) -> DataPlate:
        """Return the plate for another number of rows, as far as it can be told without the model."""
        if self.source == "drawn":
            return self
        return replace(self, size=rows, full_size=rows if self.source == "whole" else self.full_size)


class _Found(Exception):
    """Ends a look at the first site that was asked for."""


class PlateReader(Messenger):
    """Wraps a model and notes how it opens its plates; with `until`, ends the run at the first of these sites."""

    def __init__(self) -> None:
        super().__init__()
        self.until: frozenset[str] = frozenset()
        self.sources: dict[str, tuple[str, Any]] = {}
        self.frames: tuple = ()

    def _pyro_sample(self, msg: dict) -> None:
        if is_subsample(msg):
            self.sources[msg["name"]] = (_source(msg), msg["fn"].device)
        elif msg["name"] in self.until and not msg["is_observed"]:
            self.frames = msg["cond_indep_stack"]
            raise _Found

    def plate(self, frame: Any) -> DataPlate:
        """Return the plate of a frame. One that was made before the run draws nothing that a guide could repeat."""
        source, device = self.sources.get(frame.name, ("given", None))
        return DataPlate(frame.name, frame.dim, frame.full_size or frame.size, frame.size, source, device)


def _source(msg: Mapping[str, Any]) -> str:
    if msg["value"] is not None:
        return "given"
    wanted = msg["fn"].subsample_size
    return "whole" if wanted is None or wanted >= msg["fn"].size else "drawn"


def look(reader: PlateReader, model: Callable, sites: Iterable[str], name: str, args: tuple, kwargs: dict) -> DataPlate:
    r"""Run the model to its first local site and return the plate around it; nothing is changed by that.

    Raises:
        ModelError: If the model no longer draws one of `sites` inside plate `name`.
    """
    reader.sources, reader.frames, reader.until = {}, (), frozenset(sites)
    try:
        with quiet(train=False), torch.no_grad(), poutine.block():
            model(*args, **kwargs)
    except _Found:
        pass
    finally:
        reader.until = frozenset()
    for frame in reader.frames:
        if frame.name == name:
            return reader.plate(frame)
    fail(
        ModelError,
        "AutoAmortized",
        f"open plate {name!r}",
        got="a run of the model in which its sites are not inside it",
        because="the structure of the model has to be the same in every call",
        fix="Make one guide per structure.",
    )


def signature(value: Any) -> Any:
    """Return a hashable key of what decides the size of plates: shapes, lengths, whole numbers, flags, names."""
    if isinstance(value, Mapping):
        return tuple((str(key), signature(item)) for key, item in value.items())
    if isinstance(value, (tuple, list)) and len(value) < 64:
        return tuple(signature(item) for item in value)
    if value is None or isinstance(value, (Integral, str)):
        return value
    shape = getattr(value, "shape", None)
    size = shape if shape is not None else (len(value) if hasattr(value, "__len__") else None)
    return type(value).__qualname__, tuple(size) if isinstance(size, (tuple, list)) else size
