r"""The arguments of a step: what may be given, and what a recording depends on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._checks import DataError, EmvaeError, RecordingError, fail

__all__ = ["fitting_data", "map_tensors", "signature", "tensors_of"]


MISFITS = ("inside plate", "must match the size of tensor")


@contextlib.contextmanager
def fitting_data(args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Add the data's shapes to an error about sizes that do not fit."""
    try:
        yield
    except (ValueError, RuntimeError, IndexError) as cause:
        if isinstance(cause, EmvaeError) or not any(words in str(cause) for words in MISFITS):
            raise
        fail(
            DataError,
            "step",
            "use these data",
            got=f"{cause}; data of shapes {[tuple(t.shape) for t in tensors_of(args, kwargs)]}",
            because="data, plates and parameters have to fit in size",
            fix='Write pyro.plate("data", len(x)); for minibatches pyro.plate("data", N, subsample=index).',
            cause=cause,
        )


PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic, slice, range, Enum, torch.dtype, torch.device)


def signature(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Return what a recording depends on: the data's structure, layout, and its Python values.

    Raises:
        RecordingError: An argument holds data that are no tensors.
    """
    flat, spec = pytree.tree_flatten((args, dict(kwargs)))
    places = {id(x): i for i, x in reversed(list(enumerate(flat)))}
    return spec, tuple(_describe(x, places[id(x)]) for x in flat)


def _describe(x: Any, place: int) -> tuple:
    """Describe one argument; `place` is where it came first, as one tensor that is given twice is recorded as one."""
    if isinstance(x, Tensor):
        return tuple(x.shape), x.stride(), x.dtype, x.device, place
    if isinstance(x, PLAIN):
        return type(x), repr(x)
    if not callable(x):
        fail(
            RecordingError,
            'backend="graph"',
            f"record a step on an argument of type {type(x).__name__}",
            got=repr(x)[:80],
            because="only tensors change from call to call of a recorded step",
            fix='Pass tensors, alone or in tuples, lists and dicts, or write backend="eager".',
        )
    return type(x), x


def tensors_of(args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [x for x in pytree.tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor)]


def map_tensors(function: Callable[[Tensor], Any], args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict]:
    """Return the arguments with a function applied to every tensor, however nested."""
    return pytree.tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, (args, dict(kwargs)))
