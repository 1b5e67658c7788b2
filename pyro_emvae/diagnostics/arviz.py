r"""`to_arviz`: draws of the guide, the model's and the guide's density at them, the data and the fit's history."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import ModelError, fail, positive_int, require_data
from ..evidence.soundness import own_masks
from ..parameters import materialize
from ..particles import Particles, Site, check_match, check_plates, draw, quiet, subsample_values, vectorizable
from .container import Array, attributes, dataset, finalize, fit_stats, name_dims, unknown

__all__ = ["to_arviz"]

ELEMENTS = 2**22  # numbers in all sites of one vectorized run; more draws than that are drawn in turns
STATS = {
    "lp": "log p(x, z) of the draw, nats",
    "log_q": "log q(z) of the draw, nats",
    "log_weight": "lp - log_q, nats; its mean is the ELBO",
}


def to_arviz(
    model: Callable,
    guide: Callable,
    *args: Any,
    fit: Any = None,
    num_samples: int = 1000,
    seed: int | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    **kwargs: Any,
) -> Any:
    r"""Draw from the guide and return what ArviZ works with.

    Groups: ``posterior`` (latents in constrained space and deterministic sites; without auxiliary, factor and subsample
    sites), ``sample_stats`` (``lp`` $=\log p(x,z)$, ``log_q`` $=\log q(z)$, ``log_weight`` $=$ lp $-$ log_q, all with
    scale and mask, so the mean of ``log_weight`` estimates the ELBO), ``observed_data`` (NaN where a mask says that
    nothing was observed), and with `fit` ``fit_stats`` (``elbo``, ``phase`` 0 = E, 1 = M, 2 = joint, ...). Dims are
    ``(chain=1, draw, *plates, *event)``; draws of a guide are independent, and ``r_hat`` and ``ess`` say nothing of q.

    Args:
        model, guide: Pyro callables.
        args, kwargs: The data.
        fit: Anything with ``.history``, such as what ``run`` returned.
        num_samples: Number of draws, vectorized where particles can be. Of `guides.AutoMCMC` all draws are written,
            in their chains and order.
        seed: Seed of the draws; None goes on from the generators' present state, and leaves them there.
        coords: Labels by dim, or by plate. A subsampled plate takes labels of all its data or of the batch.
        dims: Names by site: of its event dims, or of all its dims.

    A plate is a dim of its name (with the ending ``_dim`` if a site has that name); a subsampled one has the size of
    the batch, the same batch for all draws, with the indices as labels, and ``lp`` is scaled to all data. Unnamed event
    dims are ``{site}_dim_{i}``. Modules run in eval mode; generators, buffers and modes are as before when it ends, but
    parameters that do not exist yet are made, as the first step of a fit would make them.

    Returns:
        ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with 1.x.

    Raises:
        ModelError: Sites of model and guide do not match, there is no latent, or a site has dims that are no plate's.
        DataError: The data are empty; `coords`, `dims` or `fit` do not fit.

    Source: the groups of ArviZ's InferenceData schema; ``fit_stats`` as in pymc-extras.

    Example:
        >>> from pyro_emvae.diagnostics import to_arviz
        >>> from pyro_emvae.problems import local_global
        >>> problem = local_global()
        >>> data = to_arviz(problem.model, problem.guide, *problem.args, num_samples=50, seed=0)
        >>> dict(data["posterior"]["z"].sizes)
        {'chain': 1, 'draw': 50, 'data': 6}
    """
    positive_int("to_arviz", "num_samples", num_samples)
    require_data("to_arviz", args, kwargs)
    draws = _sample(model, guide, args, kwargs, num_samples, seed)
    arrays = {"posterior": draws.values, "sample_stats": draws.stats, "observed_data": _observed(draws.single)}
    num_chains = guide.num_chains if hasattr(guide, "in_order") else 1
    named, renamed = name_dims(arrays, dims or {}, num_chains)
    labels = _labels(named, renamed, draws, coords or {})
    plates = ", ".join(f"{name}: {f.size} of {f.full_size}" for name, f in _subsampled(draws.single).items())
    common = {"model": _name_of(model), "guide": _name_of(guide), "seed": seed, "subsampled": plates or None}
    groups = {
        group: dataset(variables, labels, attributes(num_samples=draws.count, **common)) if variables else None
        for group, variables in named.items()
    }
    for name, text in STATS.items():
        groups["sample_stats"][name].attrs["description"] = text
    if fit is not None:
        groups["fit_stats"] = fit_stats(fit, **common)
    return finalize(groups, attributes(**common))


# Drawing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """One run that tells the layout, the draws by site, the densities, and the indices of each plate."""

    single: Particles
    values: dict[str, Array] = field(repr=False)
    stats: dict[str, Array] = field(repr=False)
    indices: dict[str, Any] = field(repr=False)
    count: int = 0


def _sample(model: Callable, guide: Callable, args: tuple, kwargs: Mapping, num_samples: int, seed: int | None):
    materialize(model, guide, args, kwargs)
    with quiet(seed=seed, train=False), torch.no_grad():
        with quiet():
            indices = subsample_values(model, guide, args, kwargs)
            single = draw(model, guide, args, kwargs, values=indices)
        check_match(single)
        _check(single)
        chunk = _chunk(model, guide, args, kwargs, single, indices, num_samples)
        runs, in_order = [], getattr(guide, "in_order", contextlib.nullcontext)
        with in_order() as count:
            num_samples = num_samples if count is None else count
            for start in range(0, num_samples, chunk):
                run = _vectorized(model, guide, args, kwargs, min(chunk, num_samples - start), single, indices)
                density = {"lp": run.log_p, "log_q": run.log_q}
                runs.append((_rows(run, single), density))
    values = {n: Array(_join([v[n] for v, _ in runs]), _layout(single.model[n])[0]) for n in runs[0][0]}
    stats = {n: Array(_join([s[n] for _, s in runs]), ()) for n in ("lp", "log_q")}
    stats["log_weight"] = Array(stats["lp"].values - stats["log_q"].values, ())
    return Draws(single, values, stats, {n: _numpy(v) for n, (v, _) in indices.items()}, num_samples)


def _vectorized(model, guide, args, kwargs, size: int, single: Particles, indices: dict) -> Particles:
    """Draw `size` particles in one run, all on the batch of `single`."""
    return draw(
        model,
        guide,
        args,
        kwargs,
        num_particles=size,
        vectorize=True,
        max_plate_nesting=single.max_plate_nesting,
        values=indices,
    )


def _chunk(model, guide, args, kwargs, single: Particles, indices: dict, num_samples: int) -> int:
    """Return how many draws one run makes: 1 if particles cannot be vectorized, else what memory allows."""
    if num_samples == 1 or not vectorizable(model, guide, args, kwargs)[0]:
        return 1
    if not _deterministics_agree(model, guide, args, kwargs, single, indices):
        return 1
    sites = [*single.model.values(), *single.guide.values()]
    return max(2, min(num_samples, ELEMENTS // max(1, sum(s.value.numel() + s.log_prob.numel() for s in sites))))


def _deterministics_agree(model, guide, args, kwargs, single: Particles, indices: dict) -> bool:
    """Compare deterministic sites of two vectorized draws with those of two runs; densities cannot tell."""
    names = [n for n, s in single.model.items() if s.is_deterministic]
    if not names:
        return True
    with quiet():
        pair = _vectorized(model, guide, args, kwargs, 2, single, indices)
        for k in range(2):
            drawn = [s for s in single.guide.values() if not s.is_observed]
            given = {s.name: (pair.values(s.name)[k].reshape(s.value.shape), None) for s in drawn}
            one = draw(model, guide, args, kwargs, values=given | indices)
            for name in names:
                rows = _unstack(pair.model[name].value, one.model[name].value.shape, 2)
                if rows is None or not _close(rows[k], one.model[name].value):
                    return False
    return True


def _close(one: Tensor, two: Tensor) -> bool:
    return torch.allclose(one.double(), two.double(), rtol=1e-4, equal_nan=True)


def _rows(run: Particles, single: Particles) -> dict[str, np.ndarray]:
    """Return latents and deterministic sites as ``(draw, *plates, *event)``."""
    found = {}
    for name, site in single.model.items():
        given = site.is_observed and (not site.is_deterministic or _is_data(single, name))
        if site.infer.get("is_auxiliary") or given:
            continue
        shape = (run.num_particles, *_layout(site)[1])
        if site.is_deterministic:
            values = _unstack(run.model[name].value, site.value.shape, run.num_particles)
        else:
            values = run.values(name)
        if values is None:
            fail(
                ModelError,
                "to_arviz",
                f"stack the draws of site {name!r}",
                got=f"shapes {tuple(site.value.shape)} and {tuple(run.model[name].value.shape)}",
                because="all draws of a site have one shape",
                fix="Record a value whose shape does not depend on the latents.",
            )
        values = values.reshape(shape) if values.numel() == math.prod(shape) else values.expand(shape)
        found[name] = _numpy(values)
    return found


def _unstack(value: Tensor, shape: torch.Size, rows: int) -> Tensor | None:
    """Return a deterministic site's value, whose event dims may have swallowed the particles, with these first."""
    if value.shape == shape:
        return value.expand(rows, *shape)
    if value.dim() and value.shape[0] == rows and value.numel() == rows * shape.numel():
        return value.reshape(rows, *shape)
    return None


def _check(single: Particles) -> None:
    """Raise if there is no latent, or a site has batch dims of no plate, which could be taken for particles."""
    if not single.latents:
        fail(
            ModelError,
            "to_arviz",
            "write the posterior",
            got="a model without latent sites",
            because="the group holds the guide's draws",
            fix='Add pyro.sample("z", ...) to model and guide.',
        )
    check_plates(single, "to_arviz")


def _layout(site: Site) -> tuple[tuple[str | None, ...], tuple[int, ...]]:
    """Return the dims (a plate's name, or None) and their sizes of one run's value, without empty batch dims."""
    shape, frames = tuple(site.value.shape), {frame.dim: frame for frame in site.frames}
    num_batch = len(shape) - site.fn.event_dim
    if site.is_deterministic and num_batch == 0 and all(_at(shape, dim) == f.size for dim, f in frames.items()):
        num_batch = len(shape) if frames else 0  # pyro.deterministic takes all dims for event dims, plates too
    batch, event = shape[:num_batch], shape[num_batch:]
    batch = (1,) * (max([-dim for dim in frames] + [0]) - num_batch) + batch
    pairs: list[tuple[str | None, int]] = []
    for i, size in enumerate(batch):
        frame = frames.get(i - len(batch))
        if frame is not None:
            pairs.append((frame.name, max(size, int(frame.size))))
        elif size != 1:
            pairs.append((None, size))
    pairs += [(None, size) for size in event]
    return tuple(name for name, _ in pairs), tuple(size for _, size in pairs)


def _at(shape: tuple[int, ...], dim: int) -> int:
    """Return the size of a dim that is counted from the right, 1 if there is none."""
    return shape[dim] if -dim <= len(shape) else 1


def _observed(single: Particles) -> dict[str, Array]:
    """Return the data by site, NaN where they are masked."""
    found = {}
    computed = {n: replace(s, fn=s.fn.base_dist) for n, s in single.model.items() if _is_data(single, n)}
    for name, site in (single.observed | computed).items():
        if site.infer.get("is_auxiliary"):
            continue
        names, shape = _layout(site)
        values = site.value.reshape(shape) if site.value.numel() == math.prod(shape) else site.value.expand(shape)
        found[name] = Array(_masked(np.array(_numpy(values)), site), names)
    return found


def _is_data(single: Particles, name: str) -> bool:
    """Whether `pyro.infer.reparam` computed a site from data, which are then observed under a longer name."""
    computed = single.model[name].is_deterministic and not single.model[name].infer.get("_deterministic")
    return computed and any(n.startswith(f"{name}_") and s.is_observed for n, s in single.model.items())


def _masked(values: np.ndarray, site: Site) -> np.ndarray:
    for mask in (site.mask, *own_masks(site.fn)):
        if mask is None or mask is True:
            continue
        shape = (*values.shape[: values.ndim - site.fn.event_dim], *(1,) * site.fn.event_dim)
        keep = _numpy(torch.as_tensor(mask).expand(site.fn.batch_shape).reshape(shape))
        if not keep.all():
            values = np.where(keep, values, np.asarray(np.nan, np.result_type(values.dtype, np.float32)))
    return values


# Naming -------------------------------------------------------------------------------------------------------------


def _labels(named: Mapping, renamed: Mapping[str, str], draws: Draws, coords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the labels by dim; subsampled plates are labelled by their indices."""
    dims = {dim for group in named.values() for variable in group.values() for dim in variable.dims}
    plates = {renamed[name]: frame for name, frame in _subsampled(draws.single).items() if name in renamed}
    labels: dict[str, Any] = {dim: draws.indices[frame.name] for dim, frame in plates.items()}
    for key, values in coords.items():
        dim = key if key in dims else renamed.get(key, key)
        if dim not in dims:
            unknown("coords", key, dims)
        whole = dim in plates and len(values) == plates[dim].full_size
        labels[dim] = np.asarray(values)[draws.indices[plates[dim].name]] if whole else values
    return labels


def _subsampled(single: Particles) -> dict[str, Any]:
    """Return the plates that hold a batch of their data."""
    frames = {frame.name: frame for site in single.model.values() for frame in site.frames}
    return {name: f for name, f in frames.items() if f.full_size is not None and int(f.size) != int(f.full_size)}


def _name_of(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _join(parts: list) -> np.ndarray:
    return np.concatenate([p if isinstance(p, np.ndarray) else _numpy(p) for p in parts])


def _numpy(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
