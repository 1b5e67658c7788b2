r"""Parameters of local sites as tables with a row per datum, of which a minibatch reads its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from .._checks import ModelError, fail
from .._pyro import Messenger
from ..particles import is_subsample, quiet
from ._plate import signature

__all__ = ["Table", "TableReader", "table_of"]

MAX_LOOKS = 256


@dataclass(frozen=True)
class Table:
    r"""How the contexts of a site are kept: the plate that comes in minibatches first, then the other plates.

    Args:
        shape: The batch shape of the site with the full size of every plate.
        first: The dim (from the right) of the plate whose rows are the table's, which is the only one or subsampled;
            None if there are several plates, and none was subsampled at set-up.
        others: Dims of further plates that are subsampled.
        names: The plate of each dim.
        drawn: How many rows the model had in use at set-up.
    """

    shape: tuple[int, ...]
    first: int | None
    others: tuple[int, ...]
    names: Mapping[int, str] = field(repr=False)
    drawn: Mapping[int, int] = field(repr=False)

    def laid_out(self, context: Tensor) -> Tensor:
        """Return contexts ``(*batch, F)`` of the data in use as a table of all data: further rows repeat the first."""
        for dim, size in self.drawn.items():
            place = len(self.shape) + dim
            index = torch.arange(self.shape[place], device=context.device) % size
            context = context.index_select(place, index)
        return context if self.first is None else context.movedim(len(self.shape) + self.first, 0).flatten(1)

    def _unflatten(self, rows: Tensor) -> Tensor:
        """Return rows of the table as contexts ``(*batch, F)``; the table is flat, for sparse gradients need that."""
        if len(self.shape) == 1:
            return rows
        place = len(self.shape) + self.first
        rest = [size for i, size in enumerate(self.shape) if i != place]
        return rows.reshape(len(rows), *rest, -1).movedim(0, place)

    def whole(self, table: Tensor) -> Tensor:
        """Return the contexts of all data, ``(*batch, F)``."""
        return table if self.first is None else self._unflatten(table)

    def read(self, table: Tensor, plates: Mapping[str, Any], rows: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the contexts of the data that the plates have in use, ``(*batch, F)``."""
        if self.first is None:
            for dim, name in self.names.items():
                self._require(plates[name], self.shape[dim])
                self._require_whole(plates[name])
            return table
        plate = plates[self.names[self.first]]
        self._require(plate, len(table))
        if plate.subsample_size < len(table):
            table = rows(table, plate.indices.to(table.device))
        context = self._unflatten(table)
        for dim in self.others:
            plate = plates[self.names[dim]]
            if plate.subsample_size < self.shape[dim]:
                context = context.index_select(len(self.shape) + dim, plate.indices.to(table.device))
        return context

    @torch.no_grad()
    def write(self, table: Tensor, plates: Mapping[str, Any], context: Tensor) -> None:
        """Put contexts ``(*batch, F)`` where `read` takes them from; nothing else is touched."""
        if self.first is None:
            table.copy_(context)
            return
        place = len(self.shape) + self.first
        rows = plates[self.names[self.first]].indices.to(table.device)
        if self.others:
            laid = self._unflatten(table.index_select(0, rows)).clone()
            index = [torch.arange(size, device=table.device) for size in laid.shape]
            for dim in self.others:
                index[len(self.shape) + dim] = plates[self.names[dim]].indices.to(table.device)
            laid[torch.meshgrid(*index, indexing="ij")] = context
            context = laid
        table[rows] = context.movedim(place, 0).flatten(1)

    def _require(self, plate: Any, rows: int) -> None:
        if plate.size != rows:
            fail(
                ModelError,
                "AutoMeanField",
                f"draw the sites in plate {plate.name!r}",
                got=f"{plate.size} data",
                because=f"there are parameters for {rows}, one row each",
                fix="Make a new guide for other data, or use guides.AutoAmortized, which has none per datum.",
            )

    def _require_whole(self, plate: Any) -> None:
        if plate.subsample_size < plate.size:
            fail(
                ModelError,
                "AutoMeanField",
                f"draw the sites in plate {plate.name!r}",
                got=f"{plate.subsample_size} of {plate.size} data after a first call with all of them",
                because="the first call decides which of several plates has the rows that minibatches choose from",
                fix="Let the first call of the guide be that with a minibatch.",
            )

    def check_support(self, name: str, support: Any) -> None:
        """Refuse bounds that differ between data of which only some are in use."""
        for bound in (getattr(support, key, None) for key in ("lower_bound", "upper_bound")):
            if self.drawn and isinstance(bound, Tensor) and bool((bound != bound.flatten()[0]).any()):
                fail(
                    ModelError,
                    "AutoMeanField",
                    f"serve site {name!r}",
                    got=f"support {support}, which differs between data",
                    because="bounds of the data that are not in the minibatch are not known",
                    fix="Let the latent lie in the unit interval, and scale it in the model.",
                )


def table_of(batch: torch.Size, frames: Iterable[Any]) -> Table:
    """Return the table of a site with a batch shape and plates of the prototype trace."""
    frames = sorted(frames, key=lambda frame: frame.dim)
    shape = list(batch)
    for frame in frames:
        shape[frame.dim] = frame.full_size or frame.size
    subsampled = [frame for frame in frames if (frame.full_size or frame.size) != frame.size]
    dims = [frame.dim for frame in subsampled]
    drawn = {frame.dim: frame.size for frame in subsampled}
    first = dims[0] if dims else frames[0].dim if len(frames) == 1 else None
    return Table(tuple(shape), first, tuple(dims[1:]), {f.dim: f.name for f in frames}, drawn)


class _Seen(Exception):
    """Ends a look at the last latent."""


class TableReader(Messenger):
    """Wraps a guide's model and notes how it opens its plates: sizes, and the indices or number of data in use."""

    def __init__(self, obj: str) -> None:
        super().__init__()
        self.obj = obj
        self.last: str | None = None
        self.opened: dict[str, tuple[str, int, Any]] = {}
        self.known: dict[Any, dict[str, tuple[str, int, Any]]] = {}
        self.given: set[str] = set()

    def copy(self) -> TableReader:
        """Return one that has seen nothing but which plates get their indices from the model."""
        result = TableReader(self.obj)
        result.given = set(self.given)
        return result

    def _pyro_sample(self, msg: dict) -> None:
        if is_subsample(msg):
            wanted, size = msg["fn"].subsample_size, msg["fn"].size
            given = msg["value"] is not None
            source = "given" if given else "whole" if wanted is None or wanted >= size else "drawn"
            self.opened[msg["name"]] = (source, size, msg["value"] if given else min(wanted or size, size))
        elif msg["name"] == self.last and not msg["is_observed"]:
            raise _Seen

    def _look(self, model: Callable, last: str, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Run the model up to its last latent and return how it opens its plates."""
        self.opened, self.last = {}, last
        try:
            with quiet(train=False), torch.no_grad(), poutine.block():
                model(*args, **kwargs)
        except _Seen:
            pass
        finally:
            self.last = None
        return dict(self.opened)

    def plates(
        self, model: Callable | None, frames: Mapping[str, Any], last: str, args: tuple, kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the plates of a call; those whose indices the model gives are opened with these, unseen by it."""
        key = signature((args, kwargs))
        opened = self.known.get(key)
        if model is not None and (opened is None or any(source == "given" for source, _, _ in opened.values())):
            if len(self.known) >= MAX_LOOKS:
                self.known.clear()
            self.known[key] = opened = self._look(model, last, args, kwargs)
            self.given |= {name for name, (source, _, _) in opened.items() if source == "given"}
        if model is None and self.given:
            _refuse_without_model(self.obj, sorted(self.given)[0])
        plates = {}
        for name, frame in sorted(frames.items()):
            source, size, batch = (opened or {}).get(name, ("", frame.full_size or frame.size, frame.size))
            if source == "given":
                with poutine.block():
                    plates[name] = pyro.plate(name, size, subsample=batch, dim=frame.dim)
            else:
                plates[name] = pyro.plate(name, size, subsample_size=batch, dim=frame.dim)
        return plates

    def require_drawn(self, model: Callable, last: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Refuse plates that the model gives indices to, for a list of guides draws others."""
        key = signature((args, kwargs))
        if key not in self.known:
            self.known[key] = self._look(model, last, args, kwargs)
        for name, (source, size, _) in self.known[key].items():
            if source == "given":
                fail(
                    ModelError,
                    self.obj,
                    f"open plate {name!r}",
                    got="an AutoGuideList without create_plates=",
                    because="the model gives the indices of that plate, and the list would draw others",
                    fix=f'Write AutoGuideList(model, create_plates=lambda x, index: pyro.plate("{name}", {size}, '
                    "subsample=index)).",
                )


def _refuse_without_model(obj: str, name: str) -> None:
    fail(
        ModelError,
        obj,
        f"open plate {name!r}",
        got="a guide that was unpickled, without its model",
        because="the model gives the indices of that plate, so that only a run of it shows which rows are meant",
        fix="Make the guide anew from the model and load its state: guide(*args); guide.load_state_dict(state). Or "
        "write create_plates=.",
    )
