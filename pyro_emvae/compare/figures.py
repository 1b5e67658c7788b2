r"""From gradients to figures: bias, variance, signal-to-noise ratio, cosine; per block and per guide site."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from .._checks import EmvaeError, fail, nearest
from .coordinates import Coordinates
from .rows import Row

__all__ = ["METRICS", "assemble", "exact_by_block", "least_variance"]

METRICS = {
    "bias": "norm of the mean difference to the reference over the coordinates",
    "bias_z": "largest |z| of a coordinate's mean difference to the reference",
    "variance_mean": "variance of the gradient, mean over coordinates",
    "variance_max": "variance of the gradient, largest coordinate",
    "snr": "|mean| / standard deviation, mean over coordinates",
    "cosine": "cosine between one gradient and the reference, mean over replicates",
    "second_moment": "E|g|^2, sum over coordinates",
}
NOISE = math.sqrt(2 / math.pi)  # E|z| of a standard normal z


def figures(samples: Tensor, exact: Tensor | None, other: Tensor | None) -> dict[str, float]:
    """Return the figures of gradients ``(replicates, coordinates)`` against an exact one, or against another row's."""
    g = samples.double()
    reference = exact if exact is not None else None if other is None else other.double()
    mean, variance = g.mean(0), g.var(0)
    moving = variance > 0
    snr = float((mean.abs() / variance.sqrt())[moving].mean()) if bool(moving.any()) else math.inf
    bias, z = (math.nan, math.nan) if reference is None or other is samples else _bias(g, reference, samples.dtype)
    return {
        "bias": bias,
        "bias_z": z,
        "variance_mean": float(variance.mean()),
        "variance_max": float(variance.max()),
        "snr": snr,
        "cosine": math.nan if reference is None else _cosine(g, reference),
        "second_moment": float((g**2).sum(1).mean()),
    }


def _bias(g: Tensor, reference: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Return the norm of the mean difference and its largest |z|."""
    difference = g - reference
    mean, error = difference.mean(0), difference.std(0) / math.sqrt(len(difference))
    tiny = torch.finfo(dtype).eps * g.abs().mean(0).clamp(min=1e-30) * 10
    z = torch.where(mean.abs() <= tiny, torch.zeros_like(mean), mean.abs() / error.clamp(min=1e-300))
    return float(mean.norm()), float(z.max())


def _cosine(g: Tensor, reference: Tensor) -> float:
    """Return the mean cosine, 0 for a gradient of zero; a reference row's mean leaves out the replicate itself."""
    direction = reference if reference.dim() == 1 else reference.sum(0) - reference
    lengths = g.norm(dim=1), direction.norm(dim=-1)
    if not bool((lengths[1] > 0).all()):
        return math.nan
    return float(((g * direction).sum(1) / (lengths[0] * lengths[1]).clamp(min=1e-300)).mean())


def least_variance(rows: list[Row]) -> Row | None:
    """Return the unbiased row of least variance, if one is unbiased."""
    unbiased = [row for row in rows if row.unbiased and not row.too_dear]

    def total(row: Row) -> float:
        return sum(float(samples.double().var(0).sum()) for samples in row.samples.values())

    return min(unbiased, key=total, default=None)


def exact_by_block(reference: Mapping[str, Any] | None, coordinates: Coordinates) -> dict[str, Tensor]:
    """Return an exact gradient by parameter name as the kept coordinates of each block, or refuse it."""
    if reference is None:
        return {}
    leaves = coordinates.leaves
    reference = {name: torch.as_tensor(value) for name, value in reference.items()}
    for name, value in reference.items():
        if name not in leaves or tuple(value.shape) != tuple(leaves[name].shape):
            got = "an unknown parameter" if name not in leaves else f"shape {tuple(value.shape)}"
            fail(
                EmvaeError,
                "compare_gradients",
                f"use the reference of {name!r}",
                got=got,
                because="the exact gradient is by unconstrained parameter",
                fix=nearest(name, leaves),
            )
    for name in [name for names in coordinates.keep.values() for name in names if name not in reference]:
        fail(
            EmvaeError,
            "compare_gradients",
            f"measure the bias of the gradient by {name!r}",
            got=f"an exact gradient by {', '.join(map(repr, reference))} alone",
            because="a block's bias is over all its parameters",
            fix=f'Add reference={{"{name}": ...}}.',
        )
    single = {n: g[None] for n, g in reference.items()}
    return {block: coordinates.pick(single, block, 1)[0].double() for block in coordinates.keep}


def assemble(
    rows: list[Row],
    coordinates: Coordinates,
    sites: Mapping[str, Collection[str]],
    exact: Mapping[str, Tensor],
    minibatch: Mapping[str, Tensor] | None,
    num_replicates: int,
) -> Any:
    """Return the Dataset of a comparison over ``estimator``, ``block`` and ``site``."""
    import xarray as xr

    other = None if exact else least_variance(rows)
    groups: dict[str, dict[str, dict[str, Any]]] = {
        "block": {block: {block: slice(None)} for block in coordinates.keep},
        "site": {site: found for site, names in sites.items() if (found := coordinates.columns(names))},
    }
    variables: dict[str, Any] = {}
    known: dict[Any, dict[str, float]] = {}
    for dim, members in groups.items():
        table = [[_group(row, columns, exact, other, known) for columns in members.values()] for row in rows]
        if minibatch:
            table.append([_of_batches(minibatch, columns) for columns in members.values()])
        for name, meaning in METRICS.items():
            column = torch.tensor([[cell[name] for cell in line] for line in table], dtype=torch.float64)
            column = column.reshape(len(table), len(members)).numpy()
            variables["site_" * (dim == "site") + name] = (("estimator", dim), column, {"meaning": meaning})
    variables |= _costs(rows, variables, bool(minibatch))
    names = [row.name for row in rows] + (["minibatch"] if minibatch else [])
    coords = {"estimator": names} | {dim: list(members) for dim, members in groups.items()}
    reference = "the exact gradient" if exact else f"the row {other.name!r}" if other else "nothing"
    return xr.Dataset(variables, coords=coords, attrs={"reference": reference} | _limits(rows, num_replicates))


def _limits(rows: list[Row], num_replicates: int) -> dict[str, Any]:
    """Return what tells figures from chance."""
    live = next(row for row in rows if not row.too_dear)
    count = sum(samples.shape[1] for samples in live.samples.values())
    return {
        "num_replicates": num_replicates,
        "bias_z_limit": NormalDist().inv_cdf(1 - 0.0005 / max(1, count)),
        "snr_floor": 3 / math.sqrt(num_replicates),
        "snr_noise": NOISE / math.sqrt(num_replicates),
        "coordinates": count,
        "looped": [f"{row.name}: {row.looped}" for row in rows if row.looped],
        "too_dear": [row.too_dear for row in rows if row.too_dear],
        "biased": [row.name for row in rows if row.biased],
    }


def _group(row: Row, columns: Mapping[str, Any], exact: Mapping, other: Row | None, known: dict) -> dict[str, float]:
    """Return the figures of some columns of some blocks; those of whole blocks are taken once."""
    if row.too_dear:
        return dict.fromkeys(METRICS, math.nan)
    key = (id(row), *columns) if all(isinstance(index, slice) for index in columns.values()) else None
    if key is None or key not in known:
        samples = _gather(row.samples, columns)
        versus = samples if other is row else None if other is None else _gather(other.samples, columns)
        found = figures(samples, _gather(exact, columns) if exact else None, versus)
        if key is None:
            return found
        known[key] = found
    return known[key]


def _gather(tensors: Mapping[str, Tensor], columns: Mapping[str, Any]) -> Tensor:
    """Return the chosen columns of the blocks, side by side."""
    parts = [tensors[block][..., index] for block, index in columns.items()]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _of_batches(variance: Mapping[str, Tensor], columns: Mapping[str, Any]) -> dict[str, float]:
    """Return what is known of the choice of the batch: its variance."""
    chosen = _gather(variance, columns)
    known = {"variance_mean": float(chosen.mean()), "variance_max": float(chosen.max())}
    return dict.fromkeys(METRICS, math.nan) | known


def _costs(rows: list[Row], variables: Mapping[str, Any], minibatch: bool) -> dict[str, Any]:
    """Return what a gradient of each row costs, and the products of cost and noise."""
    tail = [math.nan] if minibatch else []
    ms = torch.tensor([row.milliseconds for row in rows] + tail, dtype=torch.float64).numpy()

    def column(of: Callable[[Row], float]) -> Any:
        cells = [math.nan if row.too_dear else float(of(row)) for row in rows]
        return torch.tensor(cells + tail, dtype=torch.float64).numpy()

    calls, particles = column(lambda row: row.evaluations), column(lambda row: row.loss.num_particles)
    repeats = column(lambda row: row.repeats)
    variance, moment = variables["variance_mean"][1], variables["second_moment"][1]
    return {
        "milliseconds": ("estimator", ms),
        "evaluations": ("estimator", calls),
        "particles": ("estimator", particles),
        "repeats": ("estimator", repeats),
        "variance_evaluations": (("estimator", "block"), variance * calls[:, None]),
        "variance_time": (("estimator", "block"), variance * ms[:, None]),
        "second_moment_evaluations": (("estimator", "block"), moment * calls[:, None]),
    }
