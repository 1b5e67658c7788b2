r"""Is log p - log q what it is taken for: the same scales and masks on both sides, one density space, data apart?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..estimators.base import is_point_mass
from ..particles import Particles, Site, draw, quiet

__all__ = [
    "Unsound",
    "entangled_site",
    "kept",
    "mask_of",
    "own_masks",
    "scale_of",
    "unequal_handlers",
    "unpaired_auxiliaries",
]

ROUNDS = 6  # masks per plate: of 64 data, every pair is told apart


class Unsound(NamedTuple):
    """A site that makes log p - log q no bound of log p(x), why, and what mends it."""

    site: str
    message: str
    fix: str


# Scales and masks -----------------------------------------------------------------------------------------------------


def unequal_handlers(particles: Particles, skip: Sequence[str] = ()) -> Iterator[Unsound]:
    r"""Yield the latents whose scale or mask is not the same in model and guide.

    An auxiliary site carries the density of the point masses that are computed from it, and needs the scale of one.

    Args:
        particles: Of a single run.
        skip: Sites without a density in the guide, whose handlers there change nothing.
    """
    guide, latents = particles.guide, particles.latents
    pairs = [(name, site, guide[name]) for name, site in latents.items() if name in guide and name not in skip]
    for name, site, other in pairs:
        for kind, (text, tensor) in {"scale": (scale_of, _scale), "mask": (mask_of, kept)}.items():
            if not _equal(tensor(site), tensor(other)):
                one, two = (text(s) or "none" for s in (site, other))
                message = f"{kind} {one} in the model, {two} in the guide: log p - log q is no bound"
                message = message if one != two else f"{kind} {one}, of other elements in the guide than in the model"
                yield Unsound(name, message, f"Enter pyro.poutine.{kind}({kind}=...) around it in both.")
    points = [(name, site) for name, site, other in pairs if is_point_mass(other.fn)]
    for name, aux in _auxiliaries(particles).items():
        if points and not any(_equal(_scale(site), _scale(aux)) for _, site in points):
            other, site = points[0]
            message = f"scale {scale_of(aux)} in the guide, {scale_of(site)} of {other!r} in the model"
            fix = f"Enter the same plates and pyro.poutine.scale(scale=...) around it as around {other!r}."
            yield Unsound(name, f"{message}: log p - log q is no bound", fix)


def _equal(one: Tensor, two: Tensor) -> bool:
    try:
        return bool(torch.isclose(one.double(), two.double()).all())
    except RuntimeError:  # shapes that do not broadcast
        return False


def _scale(site: Site) -> Tensor:
    return torch.as_tensor(site.scale)


def scale_of(site: Site) -> str:
    """Return a site's scale, or its range, as text."""
    scale = site.scale
    if isinstance(scale, Tensor) and scale.numel() != 1:
        return f"{float(scale.min()):.4g} to {float(scale.max()):.4g}"
    return f"{float(scale):.4g}"


def mask_of(site: Site) -> str:
    """Return how many elements a site's masks keep, as text; nothing if all."""
    keep = kept(site)
    return "" if bool(keep.all()) or site.is_deterministic else f"{int(keep.sum())} of {keep.numel()}"


def kept(site: Site) -> Tensor:
    """Return which elements neither a handler nor the distribution masks: the batch shape."""
    masks = [torch.as_tensor(m).bool() for m in (site.mask, *own_masks(site.fn)) if m is not None]
    ones = torch.ones(site.fn.batch_shape, dtype=torch.bool, device=masks[0].device if masks else None)
    return torch.stack(torch.broadcast_tensors(ones, *masks)).all(0)


def own_masks(fn: Any) -> list[Any]:
    """Return the masks inside a distribution (``dist.Normal(0, 1).mask(...)``)."""
    found = []
    while fn is not None:
        found.append(getattr(fn, "_mask", None))
        fn = getattr(fn, "base_dist", None)
    return found


# Auxiliary sites ------------------------------------------------------------------------------------------------------


def _auxiliaries(particles: Particles) -> dict[str, Site]:
    """Return the guide's own sites: drawn, auxiliary, of a density in log q, and unknown to the model."""
    drawn = {n: s for n, s in particles.guide.items() if not s.is_observed and n not in particles.model}
    return {n: s for n, s in drawn.items() if s.infer.get("is_auxiliary") and not s.infer.get("is_density_free")}


def unpaired_auxiliaries(model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[Unsound]:
    r"""Yield the auxiliary guide sites from which no point mass at a latent is computed.

    log q is then a density over more than the latents, as it is if auxiliary sites have more coordinates than the point
    masses that are computed from them. A ``pyro.factor`` in the guide may make up for that; such a guide passes.
    """

    def treat(msg: Mapping[str, Any]) -> str:
        return "probe" if (msg["infer"] or {}).get("is_auxiliary") else "attach"

    with quiet(train=False), torch.enable_grad():
        particles = draw(model, guide, args, kwargs, treat=treat)
        auxiliaries = _auxiliaries(particles)
        if not auxiliaries or any(s.is_observed and not s.is_deterministic for s in particles.guide.values()):
            return
        points = {n: s for n, s in particles.guide.items() if n in particles.latents and is_point_mass(s.fn)}
        idle = [n for n in _idle(auxiliaries, points) if not _moves(n, model, guide, args, kwargs, particles, points)]
    fix = "Add it to the model, or delete it; a marginal log q over it cannot be computed from one draw."
    for name in idle:
        message = "an auxiliary guide site from which no Delta site is computed: log p - log q is no bound"
        yield Unsound(name, message, fix)
    many, few = (sum(math.prod(s.fn.shape()) for s in sites.values()) for sites in (auxiliaries, points))
    if not idle and many > few:
        message = f"{many} auxiliary coordinates, but {few} of Delta sites: log p - log q is no bound"
        yield Unsound(next(iter(auxiliaries)), message, "Compute as many coordinates of Delta sites as are drawn.")


def _idle(auxiliaries: Mapping[str, Site], points: Mapping[str, Site]) -> list[str]:
    """Return the auxiliary sites that no gradient of a point mass reaches."""
    outputs = [s.value.sum() for s in points.values() if s.value.requires_grad]
    leaves = {n: s.value for n, s in auxiliaries.items() if s.value.requires_grad}
    if not outputs or not leaves:
        return list(auxiliaries)
    grads = torch.autograd.grad(torch.stack(outputs).sum(), list(leaves.values()), allow_unused=True)
    reached = {n for n, g in zip(leaves, grads, strict=True) if g is not None}
    return [n for n in auxiliaries if n not in reached]


def _moves(name: str, model, guide, args, kwargs, particles: Particles, points: Mapping[str, Site]) -> bool:
    """Whether a point mass has another value at another draw of one auxiliary site, all else being equal."""
    with torch.no_grad():
        other = draw(model, guide, args, kwargs).guide[name].value
        drawn = {n: s.value.detach() for n, s in particles.guide.items() if not s.is_observed and n not in points}
        held = {n: (value, None) for n, value in drawn.items()}
        again = draw(model, guide, args, kwargs, values=held | {name: (other, None)})
    return any(not torch.equal(again.guide[n].value, s.value) for n, s in points.items())


# Plates ---------------------------------------------------------------------------------------------------------------


def entangled_site(
    model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any], frames: Sequence[Any]
) -> str | None:
    r"""Return a site in the plates `frames` whose density at one element moves with another element's latents, or None.

    Two draws are mixed, element by element, and scored again: each element has to have the density of the draw that
    it came from. A run that fails at the mixed values says nothing.
    """
    with quiet(train=False, validate=False), torch.no_grad():
        try:
            return _entangled(model, guide, args, kwargs, frames)
        except Exception:  # the user's code may refuse values that were never drawn together
            return None


def _entangled(model, guide, args, kwargs, frames: Sequence[Any]) -> str | None:
    first, other = (draw(model, guide, args, kwargs) for _ in range(2))
    local, held, sides = _split(first, frames)
    held = {name: (site.value, None) for name, site in held.items()}
    taken = {name: (_drawn(other, name).value, None) for name in local}
    second = draw(model, guide, args, kwargs, values=held | taken)
    scored = [(side, n) for side in sides for n, s in getattr(first, side).items() if set(frames) <= set(s.frames)]
    for mask in _masks(frames, first):
        mixed = {name: (_mix(mask, *(_drawn(run, name) for run in (first, second))), None) for name in local}
        third = draw(model, guide, args, kwargs, values=held | mixed)
        for side, name in scored:
            one, two, found = (run.rows(getattr(run, side)[name].scaled)[0] for run in (first, second, third))
            if not _close(found, torch.where(mask, one, two)):
                return name
    return None


def _split(particles: Particles, frames: Sequence[Any]) -> tuple[list[str], dict[str, Site], tuple[str, ...]]:
    """Return the sites to be mixed, those to be held, and the sides to be scored.

    Point masses follow from what is mixed. If all of the plates' latents are computed from draws outside of them, as in
    `AutoDiagonalNormal`, their own values are mixed, and the model alone is scored.
    """
    sites = {n: s for n, s in [*particles.model.items(), *particles.guide.items()] if not s.is_observed}
    drawn = {n: s for n, s in sites.items() if not is_point_mass(s.fn)}
    local = [n for n, s in drawn.items() if set(frames) <= set(s.frames)]
    if local:
        return local, {n: s for n, s in drawn.items() if n not in local}, ("model", "guide")
    local = [n for n, s in particles.latents.items() if set(frames) <= set(s.frames)]
    return local, {n: s for n, s in particles.latents.items() if n not in local}, ("model",)


def _masks(frames: Sequence[Any], particles: Particles) -> Iterator[Tensor]:
    """Yield masks over the plates' elements: binary digits of their numbers, in random order."""
    shape = [1] * particles.max_plate_nesting
    for site in (s for s in particles.model.values() if set(frames) <= set(s.frames)):
        for frame in frames:
            shape[frame.dim] = max(shape[frame.dim], particles.rows(site.log_prob).shape[frame.dim])
            device = site.log_prob.device
    number = math.prod(shape)
    order = torch.randperm(number).reshape(shape)
    for digit in range(min(ROUNDS, max(number - 1, 0).bit_length())):
        yield ((order >> digit) % 2 == 0).to(device)


def _drawn(particles: Particles, name: str) -> Site:
    return particles.guide[name] if name in particles.guide else particles.model[name]


def _mix(mask: Tensor, one: Site, two: Site) -> Tensor:
    """Return a value with elements of the first site where the mask is true, and else of the second."""
    batch, event = one.value.dim() - one.fn.event_dim, (1,) * one.fn.event_dim
    return torch.where(mask.reshape((*mask.shape[mask.dim() - batch :], *event)), one.value, two.value)


def _close(found: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-4 if found.dtype == torch.float32 else 1e-8
    finite = expected[torch.isfinite(expected)]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    found, expected = torch.broadcast_tensors(found, expected)
    return bool(torch.allclose(found, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True))
