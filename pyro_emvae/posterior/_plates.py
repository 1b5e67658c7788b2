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

__all__ = ["Batch", "Plates", "plate_nesting"]


class Plates:
    """The plates of the model, each made once, with the batch that the model's run had.

    Args:
        batch: Indices by plate, of those that are smaller than their data.
    """

    def __init__(self, batch: Mapping[str, Tensor]) -> None:
        self.batch, self.made = batch, {}

    @contextlib.contextmanager
    def of(self, frames: Iterable) -> Iterator[None]:
        """Open the plates of a site's frames."""
        with contextlib.ExitStack() as stack:
            for frame in sorted(frames, key=lambda frame: frame.dim):
                if frame.name not in self.made:
                    size, index = frame.full_size or frame.size, self.batch.get(frame.name)
                    self.made[frame.name] = pyro.plate(frame.name, size, dim=frame.dim, subsample=index)
                stack.enter_context(self.made[frame.name])
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
