r"""What a default encoder reads: the observed values inside the data plate, and where they are in the arguments."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Unit
from torch import Tensor
from torch.distributions import constraints

from .._checks import ModelError, fail
from ._plate import Look

__all__ = [
    "Observed",
    "Source",
    "find_source",
    "follow",
    "full_shape",
    "leaf_mask",
    "observed_sites",
    "read",
    "refuse_change",
]

MAX_CATEGORIES = 256
COUNTS = (type(constraints.nonnegative_integer), constraints.multinomial, constraints.integer_interval)


@dataclass(frozen=True)
class Observed:
    r"""An observed site inside the data plate.

    Args:
        name: The site's name.
        event_dim: Event dims of the site.
        plates: The plates that it lies in with their dims, by name.
        kind: ``"real"``, ``"count"`` (non-negative integers) or ``"category"``.
        num_categories: How many columns a category takes, else 0.
        is_masked: Whether a mask says which of its values are there.
        dtype: Of its values.
    """

    name: str
    event_dim: int
    plates: Mapping[str, int]
    kind: str
    num_categories: int
    is_masked: bool
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Source:
    r"""Where an observed value is found in the arguments without a run of the model.

    Args:
        path: Keys that lead to the argument.
        shape: The shape in which the model observes it; None if as it is.
        full: The shape of the site, to which it is expanded; None if it has that shape.
        rows: The dim of the data plate in the argument, from the right.
        plate: The subsampled plate whose rows of the argument are observed, or None if all of it is.
        dim: The plate's dim in the argument, from the right.
        index: Keys that lead to the plate's indices; None if the plate draws them.
    """

    path: tuple
    shape: torch.Size | None
    full: torch.Size | None
    rows: int
    plate: str | None = None
    dim: int = 0
    index: tuple | None = None

    @property
    def any_size(self) -> bool:
        """Whether it holds for other numbers of rows too."""
        return self.shape is None and self.full is None and self.plate is None


def observed_sites(look: Look, plate: str) -> tuple[Observed, ...]:
    """Return the observed sites inside a plate that an encoder can read, in the model's order."""
    found = []
    for name, msg in look.messages.items():
        frames = {f.name: f.dim for f in msg["cond_indep_stack"] if f.vectorized}
        inside = msg["is_observed"] and plate in frames and isinstance(msg["value"], Tensor)
        if not inside or isinstance(msg["fn"], Unit) or _is_masked_out(msg):
            continue
        kind, categories = _kind(msg["fn"])
        masked, dtype = leaf_mask(msg) is not None, msg["value"].dtype
        found.append(Observed(name, msg["fn"].event_dim, frames, kind, categories, masked, dtype))
    return tuple(found)


def _is_masked_out(msg: Mapping[str, Any]) -> bool:
    """Whether a site is masked altogether, as what `pyro.infer.reparam` leaves of a latent: a value computed of it."""
    fn = msg["fn"]
    while getattr(fn, "_mask", None) is not False and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return msg["mask"] is False or getattr(fn, "_mask", None) is False


def _kind(fn: Any) -> tuple[str, int]:
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    probs = getattr(_base(fn), "logits", None) if "Categorical" in type(_base(fn)).__name__ else None
    if isinstance(probs, Tensor) and fn.support.event_dim == fn.event_dim and not _is_one_hot(support):
        return ("category", probs.shape[-1]) if probs.shape[-1] <= MAX_CATEGORIES else ("count", 0)
    lowest = torch.as_tensor(getattr(support, "lower_bound", 0))
    return ("count", 0) if isinstance(support, COUNTS) and bool((lowest >= 0).all()) else ("real", 0)


def _is_one_hot(support: Any) -> bool:
    return support is constraints.one_hot or support is constraints.simplex


def _base(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def full_shape(msg: Mapping[str, Any]) -> torch.Size:
    """Return the shape of a site's value: that of its distribution, which may leave dims to be broadcast."""
    return torch.broadcast_shapes(msg["fn"].shape(), msg["value"].shape)


def leaf_mask(msg: Mapping[str, Any]) -> Tensor | None:
    """Return which entries of a site's value count, broadcastable to it: its handler's and its distribution's masks."""
    masks = []
    if isinstance(msg["mask"], Tensor):
        masks.append(msg["mask"].reshape(msg["mask"].shape + (1,) * msg["fn"].event_dim))
    fn = msg["fn"]
    while fn is not None:
        own = getattr(fn, "_mask", None)
        if isinstance(own, Tensor):
            masks.append(own.reshape(own.shape + (1,) * fn.event_dim))
        fn = getattr(fn, "base_dist", None)
    if not masks:
        return None
    return functools.reduce(torch.logical_and, masks).bool()


def _tensors(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, (*path, key))
    elif isinstance(value, (tuple, list)) and len(value) < 64:
        for key, item in enumerate(value):
            yield from _tensors(item, (*path, key))


def follow(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def find_source(
    msg: Mapping[str, Any], look: Look, plate: str, args: tuple, kwargs: Mapping[str, Any]
) -> Source | None:
    """Return where the value of an observed site is in the arguments; None if only a run of the model can tell."""
    if leaf_mask(msg) is not None:
        return None
    value = msg["value"]
    if not isinstance(value, Tensor):
        return None
    full = full_shape(msg) if value.shape != full_shape(msg) else None
    rows = look.plates[plate].dim - msg["fn"].event_dim
    given = list(_tensors((args, kwargs)))
    found = [Source(path, None if t is value else value.shape, full, rows) for path, t in given if _is_same(t, value)]
    for name, other in look.plates.items() if not found else ():
        index, dim = look.indices.get(name), other.dim - msg["fn"].event_dim
        if other.size == other.full_size or not isinstance(index, Tensor):
            continue
        where = [path for path, t in given if t is index]
        if other.source == "given" and len(where) != 1:
            continue
        own = None if other.source == "drawn" else where[0]
        found += [
            Source(path, None, full, rows, name, dim, own)
            for path, t in given
            if t is not index and _is_rows(value, t, index, dim)
        ]
    return found[0] if len(found) == 1 else None


def _is_same(t: Tensor, value: Tensor) -> bool:
    """Whether a value is the argument itself, perhaps reshaped."""
    if t is value:
        return True
    flat = t.is_contiguous() and value.is_contiguous() and t.dtype == value.dtype and t.device == value.device
    return flat and t.numel() == value.numel() > 0 and t.data_ptr() == value.data_ptr()


def _is_rows(value: Tensor, x: Tensor, index: Tensor, dim: int) -> bool:
    if x.dim() != value.dim() or x.dim() < -dim or x.dtype != value.dtype or int(index.max()) >= x.shape[dim]:
        return False
    return torch.equal(torch.nan_to_num(x.index_select(dim, index.to(x.device))), torch.nan_to_num(value))


def read(source: Source, args: tuple, kwargs: Mapping[str, Any], plates: Mapping[str, Any] | None) -> Tensor:
    """Return the observed value at its place in the arguments; without plates, all rows that a drawn plate has."""
    value = follow((args, kwargs), source.path)
    if source.plate is None:
        value = value if source.shape is None else value.reshape(source.shape)
        return value if source.full is None else value.expand(source.full)
    if source.index is None and plates is None:
        return value
    index = plates[source.plate].indices if source.index is None else follow((args, kwargs), source.index)
    value = value.index_select(source.dim, index.to(value.device))
    return value if source.full is None else value.expand(source.full)


def refuse_change(name: str, got: str) -> None:
    fail(
        ModelError,
        "AutoAmortized",
        f"read the observed site {name!r}",
        got=got,
        because="the default encoder has one input for each column that it saw in its first call",
        fix="Keep the structure of the model the same in every call, or write encoder=.",
    )
