r"""What a guide knows about calls whose arguments have the same shapes, and how an encoder's output is shared out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import Tensor

from .._checks import ModelError, fail
from ._encoder import DefaultEncoder, Served
from ._observed import Observed, Source, follow, full_shape, leaf_mask, read
from ._plate import DataPlate, Look
from ._sites import LocalSite

__all__ = ["Reading", "default_encoder", "refuse_run", "split_context"]


@dataclass(frozen=True)
class Reading:
    r"""How the model opens its plates, and where its data are, for arguments of certain shapes.

    Args:
        plates: The plates of all latents, by name.
        plate: The name of the data plate.
        sources: By observed site: where its value is in the arguments, or None.
        runs: The sites of which something is known only from a run of the model, in every call.
    """

    plates: Mapping[str, DataPlate]
    plate: str
    sources: Mapping[str, Source | None]
    runs: tuple[str, ...] = ()

    def observed(self, messages: Mapping, args: tuple, kwargs: Mapping, plates: Mapping | None) -> dict:
        """Return the observed values ``(*batch, *event)``, each with its mask or None, by site."""
        found = {}
        for name, source in self.sources.items():
            if source is not None:
                found[name] = (read(source, args, kwargs, plates), None)
            else:
                msg = messages[name]
                found[name] = (msg["value"].expand(full_shape(msg)), leaf_mask(msg))
        return found

    def refuse_random_rows(self) -> None:
        """Refuse to speak of all rows where a plate draws some of them and only a run of the model shows which."""
        for plate in self.plates.values():
            if plate.source == "drawn":
                fail(
                    ModelError,
                    "AutoAmortized",
                    "give medians and quantiles",
                    got=f"a random minibatch of plate {plate.name!r}",
                    because=f"the values of site {self.runs[0]!r} are no argument, and a run of the model shows those "
                    "of a minibatch only",
                    fix="Pass whole data: arguments with which the plate takes all rows.",
                )

    def resized(self, inputs: tuple, args: tuple, kwargs: Mapping) -> Reading:
        """Return the reading for another number of rows, as far as it can be told without the model.

        Args:
            inputs: What an encoder of the user reads; empty for a default one.
            args, kwargs: The arguments.
        """
        changes = [name for name, source in self.sources.items() if source is None or not source.any_size]
        if changes or self.runs:
            refuse_run([*changes, *self.runs][0])
        plate = self.plates[self.plate]
        values = [follow((args, kwargs), source.path) for source in self.sources.values()]
        sizes = [value.shape[source.rows] for value, source in zip(values, self.sources.values(), strict=True)]
        sizes += [len(t) for t in inputs if isinstance(t, Tensor) and t.dim()]
        rows = sizes[0] if sizes else plate.size
        return replace(self, plates={**self.plates, self.plate: plate.resized(rows)})


def refuse_run(name: str) -> NoReturn:
    fail(
        ModelError,
        "AutoAmortized",
        f"read site {name!r}",
        got="a guide that was unpickled, without its model",
        because="the value or the mask of that site is no argument, so that only a run of the model shows it",
        fix="Make the guide anew from the model and load its state: guide(*args); guide.load_state_dict(state).",
    )


def default_encoder(observed: Sequence[Observed], sites: Sequence[LocalSite], reading: Reading, seen: Look):
    r"""Return an encoder of the observed values in the data plate.

    Raises:
        ModelError: There are none.
    """
    if not observed:
        fail(
            ModelError,
            "AutoAmortized",
            "make an encoder",
            got=f"a model that observes nothing in plate {reading.plate!r}",
            because="the default encoder reads the observed values of a datum",
            fix="Write encoder=, a torch.nn.Module, and encoder_input= to say what it reads. In an AutoGuideList, hide "
            "the other latents and not the data: poutine.block(model, hide=[...]).",
        )
    first = {}
    for site in observed:
        msg = seen.messages[site.name]
        first[site.name] = (msg["value"].expand(full_shape(msg)), leaf_mask(msg))
    served = {s.name: Served(tuple(s.plates), tuple(reading.plates[p].size for p in s.plates), s.width) for s in sites}
    return DefaultEncoder(observed, served, first)


def split_context(
    context: Any, sites: Sequence[LocalSite], reading: Reading, sizes: Mapping[str, int] | None
) -> dict[str, Tensor]:
    r"""Return each site's context ``(*batch, columns)`` from what an encoder returned.

    Args:
        context: ``(rows, columns)``, or by site ``(rows, *inner plates, columns of one value)``.
        sites: The local sites.
        reading: How the model opens its plates.
        sizes: The plates' sizes in this call; None if any number of rows will do.

    Raises:
        ModelError: It has another shape.
    """
    if len(sites) == 1 and _fits_one(context, sites[0], reading.plate, sizes):
        return {sites[0].name: sites[0].place(context)}
    known = sizes or {name: plate.size for name, plate in reading.plates.items()}
    shapes = {site.name: tuple(known[p] for p in list(site.plates)[1:]) for site in sites}
    widths = {site.name: math.prod(shapes[site.name]) * site.width for site in sites}
    if isinstance(context, Mapping):
        return _split_mapping(context, sites, shapes, None if sizes is None else sizes[reading.plate], reading.plate)
    rows = None if sizes is None else sizes[reading.plate]
    fits = isinstance(context, Tensor) and context.dim() == 2 and context.shape[1] == sum(widths.values())
    if not fits or rows not in (None, len(context)):
        _wrong_context(context, rows, widths, reading.plate)
    parts = context.split(list(widths.values()), -1)
    return {
        site.name: site.place(part.reshape(len(part), *shapes[site.name], site.width))
        for site, part in zip(sites, parts, strict=True)
    }


def _fits_one(context: Any, site: LocalSite, plate: str, sizes: Mapping[str, int] | None) -> bool:
    """Whether a context is that of the only site, in one plate: the common case, without tables of sizes."""
    fits = isinstance(context, Tensor) and len(site.plates) == 1 and context.dim() == 2
    return fits and context.shape[1] == site.width and (sizes is None or len(context) == sizes[plate])


def _split_mapping(context: Mapping, sites: Sequence[LocalSite], shapes: Mapping, rows: int | None, plate: str) -> dict:
    found = {}
    for site in sites:
        own = context.get(site.name)
        shape = getattr(own, "shape", ())
        expected = (rows if rows is not None else next(iter(shape), 0), *shapes[site.name], site.width)
        if tuple(shape) != expected:
            got = "nothing" if own is None else f"a tensor of shape {tuple(shape)}"
            fail(
                ModelError,
                "AutoAmortized",
                f"read the encoder's output for site {site.name!r}",
                got=got,
                because=f"it must be a tensor of shape {expected}: the plates {list(site.plates)}, then the columns of "
                "one value",
                fix="Let the encoder return such a tensor for each latent, by name.",
            )
        found[site.name] = site.place(own)
    return found


def _wrong_context(context: Any, rows: int | None, widths: dict[str, int], plate: str) -> None:
    got = f"a tensor of shape {tuple(context.shape)}" if isinstance(context, Tensor) else type(context).__name__
    first = rows if rows is not None else "rows"
    columns = " and ".join(f"{width} for {name!r}" for name, width in widths.items())
    fail(
        ModelError,
        "AutoAmortized",
        "read the encoder's output",
        got=got,
        because=f"it must be a tensor of shape ({first}, {sum(widths.values())}): one row for each of the data that "
        f"plate {plate!r} has in use, and columns {columns}",
        fix="Change the last layer's width, or what the encoder reads: encoder_input=lambda x, index: x[index].",
    )
