r"""The plates of the model, opened again around draws from a posterior."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ..particles import quiet

__all__ = ["in_plates", "plate_nesting"]


@contextlib.contextmanager
def in_plates(
    frames: Iterable, batch: Mapping[str, Tensor], made: dict[str, pyro.plate] | None = None
) -> Iterator[None]:
    """Open the plates of a site's frames, with the batch that the model's run had, by plate.

    Plates are made once and kept in `made`, for sites that share them: making one is a statement of that name.
    """
    made = {} if made is None else made
    with contextlib.ExitStack() as stack:
        for frame in sorted(frames, key=lambda frame: frame.dim):
            size = frame.full_size or frame.size
            if frame.name not in made:
                made[frame.name] = pyro.plate(frame.name, size, dim=frame.dim, subsample=batch.get(frame.name))
            stack.enter_context(made[frame.name])
        yield


def plate_nesting(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Return the number of plate dims of a model, by a quiet run."""
    with quiet(), torch.no_grad(), poutine.block():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
    return max([-frame.dim for site in sites for frame in site["cond_indep_stack"] if frame.vectorized], default=0)
