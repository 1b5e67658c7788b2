r"""What is asked, and what one run of guide and model tells about the weights: plates, minibatches, point masses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import positive_int, require_data
from ..estimators.base import is_point_mass
from ..particles import Recorder, hold_batch, is_subsample, plates_of

__all__ = ["Layout", "Request", "look"]


@dataclass(frozen=True)
class Request:
    r"""What every method is asked: model, guide, data, and how to draw.

    Args:
        obj: The public function that asks, for its errors.
        model, guide, args, kwargs: As in Pyro.
        num_particles: K.
        vectorize_particles: One run under a particle plate (True), a loop (False), or whichever is right (None).
        max_plate_nesting: Number of plate dims; found out if None.
        chunk_size: Particles per run of the model; from a memory budget if None.
        seed: Of a forked generator; None goes on from the present state.
    """

    obj: str
    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    num_particles: int = 1000
    vectorize_particles: bool | None = None
    max_plate_nesting: int | None = None
    chunk_size: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        positive_int(self.obj, "num_particles", self.num_particles)
        if self.chunk_size is not None:
            positive_int(self.obj, "chunk_size", self.chunk_size)
        if self.max_plate_nesting is not None:
            positive_int(self.obj, "max_plate_nesting", self.max_plate_nesting, minimum=0)
        require_data(self.obj, self.args, self.kwargs)

    @property
    def program(self) -> tuple[Callable, Callable, tuple, Mapping[str, Any]]:
        """Model and guide with their arguments."""
        return self.model, self.guide, self.args, self.kwargs


@dataclass(frozen=True)
class Layout:
    r"""What one run of guide and model tells about the weights.

    Args:
        shared: The vectorized plates that all latent sites share, by dim; None without any latent.
        subsampled: Plates that hold a minibatch inside the weights: of sites with the shared plates, without these.
        all_subsampled: All plates that hold a minibatch, the shared ones included.
        given: Guide sites that are point masses.
        indices: What the plates drew at random, for all chunks to see the same data.
        floats: About how many numbers one particle takes.
    """

    shared: tuple | None
    subsampled: tuple[str, ...]
    all_subsampled: tuple[str, ...]
    given: tuple[str, ...]
    indices: dict[str, Tensor]
    floats: int

    @property
    def scale(self) -> float:
        """full size / size of the shared plates."""
        return math.prod(float(f.full_size) / float(f.size) for f in self.shared or ())


def look(request: Request) -> Layout:
    """Run guide and model once, twice with a point mass in the guide, and return what that tells."""
    guide, model, indices, floats = _run_once(request)
    guide, model = ({n: m for n, m in run.items() if not is_subsample(m)} for run in (guide, model))
    given = _point_masses(request, guide, indices)
    latents = [m for n, m in [*guide.items(), *model.items()] if not m["is_observed"] and n not in given]
    shared = _common_plates(latents)
    sites = [*guide.values(), *model.values()]
    inside = [] if shared is None else [m for m in sites if set(shared) <= set(plates_of(m))]
    return Layout(shared, _subsampled(inside, shared or ()), _subsampled(sites, ()), given, indices, floats)


def _run_once(request: Request) -> tuple[dict, dict, dict[str, Tensor], int]:
    """Run guide and model once; return their messages, drawn indices, and about how many numbers that took."""
    widest = 0

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal widest
        widest = max(widest, output.numel() if isinstance(output, Tensor) else 0)

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        with Recorder() as guide_run:
            request.guide(*request.args, **request.kwargs)
        drawn = {n: (m["value"], m["infer"]) for n, m in guide_run.messages.items() if not m["is_observed"]}
        with Recorder(drawn) as model_run:
            request.model(*request.args, **request.kwargs)
    finally:
        handle.remove()
    guide, model = guide_run.messages, model_run.messages
    sizes = [math.prod(m["fn"].shape()) for m in [*guide.values(), *model.values()] if not is_subsample(m)]
    indices = {n: run.messages[n]["value"] for run in (model_run, guide_run) for n in run.subsampled}
    return guide, model, indices, 4 * sum(sizes) + 3 * widest + 1


def _point_masses(request: Request, guide: Mapping[str, dict], indices: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the guide's latents that take one value: a second run tells them from functions of auxiliary draws."""
    deltas = {n: m["value"] for n, m in guide.items() if not m["is_observed"] and is_point_mass(m["fn"])}
    if not deltas:
        return ()
    with hold_batch(indices), Recorder() as again:
        request.guide(*request.args, **request.kwargs)
    return tuple(n for n, value in deltas.items() if torch.equal(value, again.messages[n]["value"]))


def _common_plates(latents: list[dict]) -> tuple | None:
    if not latents:
        return None
    common = set.intersection(*(set(plates_of(msg)) for msg in latents))
    return tuple(sorted(common, key=lambda plate: plate.dim))


def _subsampled(messages: list[dict], without: tuple) -> tuple[str, ...]:
    known = {plate.name for plate in without}
    frames = [f for m in messages for f in m["cond_indep_stack"] if f.name not in known]
    return tuple(sorted({f.name for f in frames if int(f.full_size) != int(f.size)}))
