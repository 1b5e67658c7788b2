r"""The plates of the model, opened again around draws from a posterior."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from .._pyro import Messenger
from ..particles import is_subsample, quiet

__all__ = ["Batch", "in_plates", "plate_nesting"]


@contextlib.contextmanager
def in_plates(
    frames: Iterable, batch: Mapping[str, Tensor], made: dict[str, Any], scale: Any = None, mask: Any = None
) -> Iterator[None]:
    """Open the plates of a site's frames, with the batch that the model's run had, by plate.

    ``made`` holds the plates of one run by name, for a plate is stated once and opened around each of its sites.
    ``scale`` and ``mask`` are the model's at the site: what of the scale is not the plates', and the mask, are set too.
    """
    with contextlib.ExitStack() as stack:
        rest = 1.0 if scale is None else scale / math.prod((f.full_size or f.size) / f.size for f in frames)
        if isinstance(rest, Tensor) or abs(rest - 1.0) > 1e-12:
            stack.enter_context(poutine.scale(scale=rest))
        if isinstance(mask, Tensor) or mask is False:
            stack.enter_context(poutine.mask(mask=mask))
        for frame in sorted(frames, key=lambda frame: frame.dim):
            if frame.name not in made:
                size = frame.full_size or frame.size
                made[frame.name] = pyro.plate(frame.name, size, dim=frame.dim, subsample=batch.get(frame.name))
            stack.enter_context(made[frame.name])
        yield


class Batch(Messenger):
    """Note the indices of every plate that is smaller than its data, and which plates drew theirs at random."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: dict[str, Tensor] = {}
        self.drawn: list[str] = []

    def _pyro_sample(self, msg: dict) -> None:
        if is_subsample(msg) and msg["value"] is None and (msg["fn"].subsample_size or math.inf) < msg["fn"].size:
            self.drawn.append(msg["name"])

    def _pyro_post_sample(self, msg: dict) -> None:
        if is_subsample(msg) and len(msg["value"]) < msg["fn"].size:
            self.indices[msg["name"]] = msg["value"]


def plate_nesting(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Return the number of plate dims of a model, by a quiet run."""
    with quiet(), torch.no_grad(), poutine.block():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
    return max([-frame.dim for site in sites for frame in site["cond_indep_stack"] if frame.vectorized], default=0)
