r"""Do model and guide fit, and may particles be vectorized?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from .._checks import ModelError, fail, nearest
from .._distributions import base_of
from .handlers import Recorder, is_subsample
from .quiet import quiet
from .run import draw, run_pair, stack_runs
from .sites import Particles, Site

__all__ = ["check_match", "choose_vectorize", "subsample_values", "vectorizable"]


def vectorizable(
    model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any], rtol: float | None = None
) -> tuple[bool, int, str]:
    r"""Replay two particles vectorized and one by one and compare log p and log q per site.

    Returns:
        Whether they agree, the number of plate dims, and otherwise what disagreed first.

    Raises:
        ModelError: If the sites of model and guide do not match.

    A model with ``z - z.mean()`` passes every shape check and gives wrong numbers when vectorized; this finds it.
    """
    with quiet(train=False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = run_pair(model, guide, args, kwargs, 1, None, None, None)
        check_match(first)
    with quiet(train=False, validate=False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nesting = first.max_plate_nesting
        indices = subsample_values(model, guide, args, kwargs)
        loops = [run_pair(model, guide, args, kwargs, 1, nesting, None, indices) for _ in range(2)]
        computed = _computed(*loops)
        moved = {n: value for n, value in _apart(*loops).items() if n not in computed}
        if moved:  # two equal draws would not show that particles are mixed
            again = {n: (s.value, None) for n, s in loops[1].guide.items() if not (s.is_observed or n in computed)}
            loops[1] = run_pair(model, guide, args, kwargs, 1, nesting, None, indices | again | moved)
        looped = stack_runs(loops)
        drawn = {n: s.value for n, s in looped.guide.items() if not (s.is_observed or n in computed)}
        given = {n: (value, None) for n, value in drawn.items()} | indices
        try:
            together = draw(
                model, guide, args, kwargs, num_particles=2, vectorize=True, max_plate_nesting=nesting, values=given
            )
        except Exception as error:  # any failure of the user's code under an extra dim is the answer
            return False, nesting, f"{type(error).__name__} in the vectorized run: {error}"
        for side in ("guide", "model"):
            for name, site in getattr(looped, side).items():
                other = getattr(together, side).get(name)
                if other is None or not _same(site, other, looped, rtol):
                    return False, nesting, f"log density of the {side}'s site {name!r}"
    return True, nesting, ""


def _computed(one: Particles, two: Particles) -> set[str]:
    """Return the point masses that follow other draws: replayed, they would be scored at values off by rounding."""
    found = {n for n, s in two.guide.items() if type(base_of(s.fn)).__name__ == "Delta" and not s.is_observed}
    return {n for n in found if not torch.equal(one.guide[n].value, two.guide[n].value)}


def _apart(one: Particles, two: Particles) -> dict[str, tuple[Tensor, None]]:
    """Return other values for the second particle, at latents where the two are equal or nearly so anywhere."""
    moved = {}
    for name, site in two.guide.items():
        if site.is_observed:
            continue
        first, second = one.guide[name].value, site.value
        near = (first - second).abs() < 0.1 * (1 + first.abs()) if first.is_floating_point() else first == second
        if bool(near.any()):
            fns = [base_of(pair[name].fn) for pair in (two.guide, two.model) if name in pair]
            fn = next((fn for fn in fns if fn.has_enumerate_support), site.fn)
            for dim in range(base_of(fn).event_dim):  # a vector moves as a whole, so that it stays in its support
                near = near.any(-1 - dim, keepdim=True)
            moved[name] = (torch.where(near, _other(fn, first), second), None)
    return moved


def _other(fn: Any, value: Tensor) -> Tensor:
    """Return a value of the support that differs from `value` everywhere, or for one-hot vectors in two places."""
    inner = base_of(fn)
    if inner.has_enumerate_support and inner.event_dim:
        return value.roll(1, -1)
    if inner.has_enumerate_support:
        outcomes = inner.enumerate_support(expand=False).flatten()
        return outcomes[((value.unsqueeze(-1) == outcomes).long().argmax(-1) + 1) % len(outcomes)].to(value)
    if fn.has_enumerate_support:
        return value.roll(1, -1)  # another one-hot vector
    if not value.is_floating_point():
        return value + 1
    try:
        transform = biject_to(fn.support)
        return transform(transform.inv(value) + 1.0)
    except NotImplementedError:
        return value + 1.0 + value.abs()


def choose_vectorize(
    obj: str,
    wanted: bool | None,
    num_particles: int,
    max_plate_nesting: int | None,
    pair: tuple[Callable, Callable, tuple, Mapping[str, Any]],
    stacklevel: int = 4,
) -> tuple[bool, int | None]:
    r"""Return whether to run particles under a plate, and the number of plate dims (None: to be guessed).

    Args:
        obj: The public object that asks.
        wanted: True, False, or None: if both ways agree; if they do not, a warning names the site.
        pair: Model, guide, args and kwargs.

    Raises:
        ModelError: If it is wanted, and vectorized and single runs disagree.
    """
    if num_particles == 1 or wanted is False:
        return False, max_plate_nesting
    agrees, nesting, what = vectorizable(*pair)
    if not agrees and wanted:
        fail(
            ModelError,
            obj,
            "vectorize particles",
            got=what,
            because="two particles vectorized have to equal the same two run one by one",
            fix="Let the model index from the right (sum over dim=-1, not over all dims), "
            "or write vectorize_particles=False.",
        )
    if not agrees:
        warnings.warn(
            f"particles are run one by one: {what} differs between a vectorized and a single run. Let the model "
            "index from the right, or write vectorize_particles=False to silence this.",
            stacklevel=stacklevel,
        )
    return agrees, nesting if max_plate_nesting is None else max_plate_nesting


def _same(site: Site, other: Site, particles: Particles, rtol: float | None) -> bool:
    one, two = particles.rows(site.scaled), particles.rows(other.scaled)
    if one.dim() != two.dim():
        return False
    tolerance = rtol or (1e-4 if one.dtype == torch.float32 else 1e-8)
    try:
        one, two = torch.broadcast_tensors(one, two)
    except RuntimeError:
        return False
    finite = one[torch.isfinite(one)]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    return bool(torch.allclose(one, two, rtol=tolerance, atol=tolerance * scale, equal_nan=True))


def subsample_values(model, guide, args, kwargs) -> dict[str, Any]:
    """Draw the plates' indices once, to be shared by both ways of running."""
    with Recorder() as run:
        guide(*args, **kwargs)
    given = {n: (m["value"], m["infer"]) for n, m in run.messages.items() if not m["is_observed"]}
    with Recorder(given) as model_run:
        model(*args, **kwargs)
    both = {**run.messages, **model_run.messages}
    return {n: (m["value"], m["infer"]) for n, m in both.items() if is_subsample(m)}


def check_match(particles: Particles) -> None:
    r"""Raise unless model and guide have the same latents, of the same shape.

    Raises:
        ModelError: Naming the first site that one of them lacks or whose event dims differ.
    """
    guide = {n: s for n, s in particles.guide.items() if not s.is_observed and not s.infer.get("is_auxiliary")}
    latents = particles.latents
    for name in guide:
        if name not in latents:
            where = "observed in the model" if name in particles.model else "a site that the model lacks"
            fail(
                ModelError,
                "guide",
                f"draw site {name!r}",
                got=where,
                because="every guide site is a latent of the model, or auxiliary",
                fix=f"Rename it ({nearest(name, latents)}), or add it to the model. infer={{'is_auxiliary': True}} is "
                "for a site from which a Delta site of a latent is computed.",
            )
    for name, site in latents.items():
        if name not in particles.guide:
            fail(
                ModelError,
                "guide",
                f"draw site {name!r}",
                got="no such site in the guide",
                because="every latent of the model needs a value",
                fix=f"Add pyro.sample({name!r}, ...) to the guide, or observe it in the model with obs=.",
            )
        if name in guide and guide[name].fn.event_dim != site.fn.event_dim:
            fail(
                ModelError,
                "guide",
                f"draw site {name!r}",
                got=f"event_dim {guide[name].fn.event_dim} in the guide and {site.fn.event_dim} in the model",
                because="both have to agree on what one value is",
                fix="Use .to_event() in the same way in both.",
            )
        if name in guide:
            _check_shapes(name, guide[name], site)


def check_plates(particles: Particles, obj: str = "MonteCarloELBO") -> None:
    r"""Raise unless every batch dim of every site belongs to a plate.

    Elements of a batch dim without a plate may depend on each other, and would yet be told apart: by the learning
    signal, or as if they were particles.

    Raises:
        ModelError: Naming the first site with such a dim.
    """
    for site in (*particles.guide.values(), *particles.model.values()):
        shape, dims = site.log_prob.shape, {frame.dim for frame in site.frames}
        if particles.num_particles > 1:
            dims.add(-1 - particles.max_plate_nesting)
        stray = [dim for dim in range(-len(shape), 0) if shape[dim] != 1 and dim not in dims]
        if stray and not site.is_deterministic:
            fail(
                ModelError,
                obj,
                f"lay out site {site.name!r}",
                got=f"batch shape {tuple(shape)}, of which no plate declares dim {stray[0]}",
                because="only what lies in a plate is independent",
                fix="Write .to_event(1) at its distribution, or put it into a pyro.plate.",
            )


def _check_shapes(name: str, guide: Site, model: Site) -> None:
    one, two = tuple(guide.fn.shape()), tuple(model.fn.shape())
    if one != two and {f.name for f in guide.frames} != {f.name for f in model.frames}:
        fail(
            ModelError,
            "guide",
            f"draw site {name!r}",
            got=f"shape {one} in the guide and {two} in the model",
            because="both have to draw the same values in the same plates",
            fix="Put the site into the same pyro.plate in both.",
        )
