r"""Which discrete sites of a guide can be summed over at little cost, and with the right numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import subsample_values
from .dependence import Dependence
from .quiet import quiet
from .run import draw
from .sites import Particles, Site

__all__ = ["BUDGET", "mixed_up", "summable"]

BUDGET = 64  # outcomes that meet in one density, per element of its plates

Pair = tuple[Callable, Callable, tuple, Mapping[str, Any]]


def summable(pair: Pair, nesting: int, counts: Mapping[str, int], depends: Dependence, follow: Collection) -> list[str]:
    r"""Return which of some discrete sites can be summed over in place of drawn.

    A site stays if the outcomes that meet in one density are at most `BUDGET`, if all that depends on it lies in its
    plates, if what the guide draws downstream is pathwise or summed over as well, and if guide and model say the same
    at all outcomes at once as at each of them alone. Nothing is changed.

    Args:
        pair: Model, guide, args and kwargs.
        nesting: Number of plate dims.
        counts: The number of outcomes of each site asked about.
        depends: Which draws reach which densities.
        follow: The guide's sites that may be drawn once per outcome.
    """
    with quiet(train=False, validate=False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        indices = subsample_values(*pair)
        one = draw(*pair, max_plate_nesting=nesting, values=indices)
        names = _cheap(one, counts, depends, follow)
        while names and not _same_alone(pair, one, names, indices):
            names = names[:-1] if len(names) > 1 else []
            names = _cheap(one, {name: counts[name] for name in names}, depends, follow)
    return names


def mixed_up(pair: Pair, nesting: int, names: list[str]) -> str | None:
    """Return the first of some summed sites at whose outcomes the densities are others together than alone, or None.

    At most `BUDGET` outcomes of a site are looked at. Nothing is changed. Where two runs on the same values differ, as
    by noise that is no site, nothing can be said.
    """
    with quiet(train=False, validate=False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        indices = subsample_values(*pair)
        one = draw(*pair, max_plate_nesting=nesting, values=indices)
        if any("summed_out" in site.infer for site in one.model.values()):
            return None  # the model's densities are then sums over its own latents
        if _same_alone(pair, one, names, indices) or not _repeats(pair, one, indices):
            return None
        return next((name for name in names if not _same_alone(pair, one, [name], indices)), names[0])


def _cheap(one: Particles, counts: Mapping[str, int], depends: Dependence, follow: Collection) -> list[str]:
    names = [name for name in counts if name in one.guide and not one.guide[name].is_observed]
    places = [(side, site) for side in ("guide", "model") for site in getattr(one, side).values()]
    while True:
        out = set()
        for side, site in places:
            here = [name for name in names if depends.moves(name, side, site.name)]
            drawn = side == "guide" and not site.is_observed and site.name not in (*names, *follow)
            if drawn or math.prod(counts[name] for name in here) > BUDGET:
                out |= set(here)
            out |= {name for name in here if not set(one.guide[name].frames) <= set(site.frames)}
        if not out:
            return names
        names = [name for name in names if name not in out]


def _same_alone(pair: Pair, one: Particles, names: list[str], indices: Mapping[str, Any]) -> bool:
    """Whether each outcome alone has the densities that it has among all."""
    nesting = one.max_plate_nesting
    values = {n: (s.value, None) for n, s in one.guide.items() if not s.is_observed and n not in names} | indices
    how = {"max_plate_nesting": nesting}
    try:
        every = draw(*pair, **how, values=values, enumerate_site=lambda msg: msg["name"] in names)
    except Exception:  # any failure of the user's code under further dims is the answer
        return False
    dims = {name: every.guide[name].infer["_enumerate_dim"] for name in every.enumerated}
    if set(dims) != set(names):
        return False
    for name in names:
        count = every.enumerated[name]
        for outcome in sorted({i * count // BUDGET for i in range(BUDGET)}):
            at = {n: outcome if n == name else 0 for n in names}
            given = {n: (_value(every.guide[n], dims[n], i, one.guide[n]), None) for n, i in at.items()}
            alone = draw(*pair, **how, values=values | given)
            sides = (("guide", alone.guide), ("model", alone.model))
            if not all(
                _close(site, getattr(every, side).get(n), {dims[m]: i for m, i in at.items()})
                for side, sites in sides
                for n, site in sites.items()
            ):
                return False
    return True


def _repeats(pair: Pair, one: Particles, indices: Mapping[str, Any]) -> bool:
    """Whether guide and model say the same twice on the same values."""
    values = {n: (s.value, None) for n, s in one.guide.items() if not s.is_observed} | indices
    first, second = (draw(*pair, max_plate_nesting=one.max_plate_nesting, values=values) for _ in range(2))
    sides = ((first.guide, second.guide), (first.model, second.model))
    return all(
        n in others and torch.allclose(site.log_prob, others[n].log_prob, equal_nan=True)
        for sites, others in sides
        for n, site in sites.items()
    )


def _value(site: Site, dim: int, outcome: int, like: Site) -> Tensor:
    """Return one outcome at all elements of the plates."""
    value = site.value.select(dim - site.fn.event_dim, outcome)
    event = site.value.shape[site.value.dim() - site.fn.event_dim :]
    return value.reshape((1,) * (like.value.dim() - len(event)) + tuple(event)).expand(like.value.shape)


def _close(one: Site, site: Site | None, at: Mapping[int, int]) -> bool:
    if site is None or site.outcomes is None:
        return False
    folded = site.mask is None and not isinstance(site.scale, Tensor) and site.scale == 1.0  # see `averaged`
    table, alone = site.outcomes, one.scaled if folded else one.log_prob
    for dim, outcome in at.items():
        if table.dim() >= -dim:
            table = table.narrow(dim, outcome if table.shape[dim] > 1 else 0, 1)
    while table.dim() > alone.dim() and table.shape[0] == 1:
        table = table.squeeze(0)
    tolerance = 1e-4 if alone.dtype == torch.float32 else 1e-8
    finite = alone[torch.isfinite(alone)]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    try:
        table, alone = torch.broadcast_tensors(table, alone)
    except RuntimeError:
        return False
    return bool(torch.allclose(table, alone, rtol=tolerance, atol=tolerance * scale, equal_nan=True))
