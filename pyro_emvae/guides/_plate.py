r"""How a model opens its plates and what it observes, found by running it as far as needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .._checks import ModelError, fail
from .._pyro import Messenger
from ..particles import hold_batch, is_computed, is_subsample, quiet

__all__ = ["DataPlate", "Look", "PlateReader", "check_shapes", "cover", "look", "signature"]


@dataclass(frozen=True)
class DataPlate:
    r"""How the model opens a plate for given arguments.

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


@dataclass(frozen=True)
class Look:
    r"""What one run of the model showed.

    Args:
        plates: The plates around the sites that were seen, by name.
        messages: The sites seen, by name, in order; kept only as long as they are read.
        indices: The indices that plates got, by plate.
    """

    plates: dict[str, DataPlate]
    messages: dict[str, dict] = field(default_factory=dict, repr=False)
    indices: dict[str, Any] = field(default_factory=dict, repr=False)


class _Found(Exception):
    """Ends a look at the last site that was asked for."""


class PlateReader(Messenger):
    """Wraps a model. In a look it notes plates and sites, and ends the run once all of `wanted` have been seen."""

    def __init__(self) -> None:
        super().__init__()
        self.active = False
        self.wanted: set[str] | None = None
        self.sources: dict[str, tuple[str, Any]] = {}
        self.indices: dict[str, Any] = {}
        self.messages: dict[str, dict] = {}

    def start(self, wanted: Iterable[str] | None) -> None:
        """Begin to note what the model does; with `wanted`, up to the last of these sites."""
        self.active, self.wanted = True, None if wanted is None else set(wanted)
        self.sources, self.indices, self.messages = {}, {}, {}

    def end(self) -> Look:
        """Return what was seen. A plate made before the run draws nothing that a guide could repeat."""
        frames = {f.name: f for msg in self.messages.values() for f in msg["cond_indep_stack"] if f.vectorized}
        plates = {}
        for name, frame in frames.items():
            source, device = self.sources.get(name, ("given", None))
            full = frame.full_size or frame.size
            plates[name] = DataPlate(name, frame.dim, full, frame.size, source, device)
        result = Look(plates, self.messages, self.indices)
        self.active, self.sources, self.indices, self.messages = False, {}, {}, {}
        return result

    def _pyro_sample(self, msg: dict) -> None:
        if not self.active:
            return
        if is_subsample(msg):
            self.sources[msg["name"]] = (_source(msg), msg["fn"].device)
            self.indices[msg["name"]] = msg["value"]
            return
        if not is_computed(msg):
            self.messages[msg["name"]] = msg
        if self.wanted is not None:
            self.wanted.discard(msg["name"])
            if not self.wanted:
                raise _Found

    def _pyro_post_sample(self, msg: dict) -> None:
        if self.active and is_subsample(msg):
            self.indices[msg["name"]] = msg["value"]


def _source(msg: Mapping[str, Any]) -> str:
    if msg["value"] is not None:
        return "given"
    wanted = msg["fn"].subsample_size
    return "whole" if wanted is None or wanted >= msg["fn"].size else "drawn"


def look(
    reader: PlateReader,
    model: Callable,
    wanted: Iterable[str],
    plates: Iterable[str],
    args: tuple,
    kwargs: Mapping[str, Any],
    batch: Mapping[str, Any],
) -> Look:
    r"""Run the model until all of some sites have been seen; nothing is changed by that.

    Args:
        reader: What the model is wrapped in.
        model: The model.
        wanted: The sites.
        plates: The plates that they have to lie in.
        args, kwargs: The arguments of the model.
        batch: The indices of plates that draw a minibatch, by name.

    Raises:
        ModelError: If the model no longer has one of `wanted`, or they do not lie inside `plates`.
    """
    wanted, missing = list(wanted), set()
    reader.start(wanted)
    try:
        with quiet(train=False), torch.no_grad(), poutine.block(), hold_batch(batch):
            model(*args, **kwargs)
    except _Found:
        pass
    finally:
        missing = reader.wanted
        seen = reader.end()
    if missing or not set(plates) <= set(seen.plates):
        lost = f"without site {sorted(missing)[0]!r}" if missing else "in which its sites are not inside it"
        fail(
            ModelError,
            "AutoAmortized",
            f"open plate {next(name for name in plates if missing or name not in seen.plates)!r}",
            got=f"a run of the model {lost}",
            because="the structure of the model has to be the same in every call",
            fix="Make one guide per structure.",
        )
    return seen


def check_shapes(seen: Look, nodes: Mapping[str, Mapping[str, Any]]) -> None:
    r"""Compare the latents seen with those of the prototype trace.

    Raises:
        ModelError: One has another event shape, or lies in other plates.
    """
    for name in seen.messages.keys() & nodes.keys():
        now, before = _shape(seen.messages[name]), _shape(nodes[name])
        if now != before:
            fail(
                ModelError,
                "AutoAmortized",
                f"draw site {name!r}",
                got=f"event shape {now[0]} in plates {sorted(now[1])}; it was {before[0]} in {sorted(before[1])}",
                because="the structure of the model has to be the same in every call",
                fix="Make one guide per structure.",
            )


def _shape(node: Mapping[str, Any]) -> tuple[tuple, set[str]]:
    return tuple(node["fn"].event_shape), {frame.name for frame in node["cond_indep_stack"]}


def cover(nodes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return sites, the earliest ones, that together lie in all the plates that any of them lies in."""
    found, seen = [], set()
    for name, node in nodes.items():
        plates = {frame.name for frame in node["cond_indep_stack"]}
        if not plates <= seen:
            found.append(name)
            seen |= plates
    return found


def signature(value: Any) -> Any:
    """Return a hashable key of what decides the size of plates: shapes, lengths, whole numbers, flags, names."""
    if type(value) is Tensor:
        return "Tensor", value.shape
    if isinstance(value, Mapping):
        return tuple((str(key), signature(item)) for key, item in value.items())
    if isinstance(value, (tuple, list)) and len(value) < 64:
        return tuple(signature(item) for item in value)
    if value is None or isinstance(value, (Integral, str)):
        return value
    shape = getattr(value, "shape", None)
    size = shape if shape is not None else (len(value) if hasattr(value, "__len__") else None)
    return type(value).__qualname__, tuple(size) if isinstance(size, (tuple, list)) else size
