r"""Draw from the guide in chunks and reduce the draws to moments of log weights: jointly, and per datum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import EmvaeError, ModelError, NonFiniteError, fail
from ..particles import Particles, Site, check_match, check_plates, choose_vectorize, draw, hold_batch, quiet
from .layout import Layout, Request, look
from .moments import Moments
from .soundness import Unsound, entangled_site, unequal_handlers, unpaired_auxiliaries

__all__ = ["Weights", "collect", "require_bound"]

CHUNK_FLOATS = 20_000_000


@dataclass
class Weights:
    r"""Moments of the log weights of K draws.

    Args:
        num_particles: K.
        layout: What the sites share.
        joint: Of log p - log q of a whole draw, with all scales.
        per_datum: Of a datum's log p - log q, without the scale of its plates; None without such plates.
        constant: Sum of the terms that belong to no datum, with all scales.
        entangled: A site without the shared plates whose log density differs between draws, or None. There is
            then one weight for everything.
        crossed: A site in the shared plates whose log density at one datum moves with another datum's latents, or
            None. The same holds.
        unsound: What makes log p - log q no bound, or None.
    """

    num_particles: int
    layout: Layout
    joint: Moments
    per_datum: Moments | None
    constant: float = 0.0
    entangled: str | None = None
    crossed: str | None = None
    unsound: Unsound | None = None

    @property
    def by_datum(self) -> bool:
        """Whether the data have weights of their own."""
        return self.per_datum is not None and self.entangled is None and self.crossed is None

    @property
    def together(self) -> str:
        """Why the data of shared plates have one weight together, or nothing."""
        if self.per_datum is None or self.by_datum:
            return ""
        if self.crossed is not None:
            return f"site {self.crossed!r} of one datum depends on another's latent sites"
        return f"site {self.entangled!r} outside the data's plates depends on their latent sites"


def collect(request: Request) -> Weights:
    r"""Draw K particles in chunks and return the moments of their log weights.

    Every chunk sees the same minibatch. Generators, modes and buffers are as before when it ends.

    Raises:
        ModelError: Sites of model and guide do not match, or have batch dims that no plate declares.
        NonFiniteError: A log weight is NaN or +inf; names the first site.
    """
    with quiet(seed=request.seed, train=False), torch.no_grad():
        layout = look(request)
        weights, reference = _empty(request.num_particles, layout), {}
        with hold_batch(layout.indices):
            weights.unsound = _check_one(request, layout)
            if any(int(frame.size) != 1 for frame in layout.shared or ()):
                weights.crossed = entangled_site(*request.program, layout.shared)
            for particles in _chunks(request, layout.floats):
                _take(weights, reference, particles, request.obj)
    if weights.per_datum is not None:
        weights.constant = sum(float(row.double().sum()) for row in reference.values())
    return weights


def _check_one(request: Request, layout: Layout) -> Unsound | None:
    """Say what is wrong with the model before anything is made of it; return what makes log p - log q no bound."""
    particles = draw(*request.program)
    if not particles.model:
        fail(
            ModelError,
            request.obj,
            "average log p - log q",
            got="a model without any pyro.sample",
            because="there is nothing to take the density of",
            fix="Write pyro.sample(..., obs=data) in the model.",
        )
    check_match(particles)
    check_plates(particles, request.obj)
    _check_nesting(request, particles)
    _check_finite(sum(_joint(term) for _, _, term in _terms(particles)), particles, request.obj)
    unequal = unequal_handlers(particles, skip=layout.given)
    return next(unequal, None) or next(unpaired_auxiliaries(*request.program), None)


def _check_nesting(request: Request, particles: Particles) -> None:
    needed, given = particles.max_plate_nesting, request.max_plate_nesting
    if given is not None and given < needed:
        fail(
            EmvaeError,
            request.obj,
            f"use max_plate_nesting={given}",
            got=f"plates of {needed} dims",
            because="particles lie to the left of all plates",
            fix=f"Write max_plate_nesting={needed}, or leave it out.",
        )


# Chunks of particles ---------------------------------------------------------------------------------------------


def _chunks(request: Request, floats: int) -> Iterator[Particles]:
    vectorize, nesting = choose_vectorize(
        request.obj,
        request.vectorize_particles,
        request.num_particles,
        request.max_plate_nesting,
        request.program,
        stacklevel=6,
    )
    size = request.chunk_size or max(1, CHUNK_FLOATS // floats)
    for start in range(0, request.num_particles, size):
        yield draw(
            *request.program,
            num_particles=min(size, request.num_particles - start),
            vectorize=vectorize,
            max_plate_nesting=nesting,
        )


# From particles to moments ---------------------------------------------------------------------------------------


def _empty(num_particles: int, layout: Layout) -> Weights:
    per_datum = Moments(num_particles) if layout.shared else None
    return Weights(num_particles, layout, Moments(num_particles), per_datum)


def _take(weights: Weights, reference: dict[str, Tensor], particles: Particles, obj: str) -> None:
    """Add a chunk's log weights to the moments."""
    shared, by_datum = weights.layout.shared or (), weights.per_datum is not None
    joint = local = eps = 0.0
    for key, site, term in _terms(particles):
        joint = joint + _joint(term)
        eps = max(eps, torch.finfo(term.dtype).eps)
        if by_datum and set(shared) <= set(site.frames):
            local = local + _per_datum(particles, term, weights.layout)
        elif by_datum and weights.crossed is None and not _same(reference.setdefault(key, term[:1]), term):
            weights.entangled = site.name
    _check_finite(joint, particles, obj)
    weights.joint.update(joint, eps=eps)
    if by_datum:
        weights.per_datum.update(local, eps=eps)


def _terms(particles: Particles) -> Iterator[tuple[str, Site, Tensor]]:
    """Yield the sites with their terms of log p - log q: ``(particles, *plates)``."""
    for side, sign in (("model", 1), ("guide", -1)):
        for name, site in getattr(particles, side).items():
            term = particles.rows(sign * site.scaled)
            yield f"{side} {name}", site, term.expand(particles.num_particles, *term.shape[1:])


def _joint(term: Tensor) -> Tensor:
    """Return the sum of a term over all plates: ``(particles,)``."""
    return term.reshape(len(term), -1).sum(1, dtype=torch.float64)


def _per_datum(particles: Particles, term: Tensor, layout: Layout) -> Tensor:
    """Return a term without the shared plates' scale, summed over all other dims: ``(particles, *plates)``."""
    keep = {particles.max_plate_nesting + 1 + frame.dim for frame in layout.shared}
    others = [dim for dim in range(1, term.dim()) if dim not in keep]
    term = term.sum(others, dtype=torch.float64) if others else term.double()
    sizes = [max(int(frame.size), -1) for frame in layout.shared]  # -1: a plate without a size keeps the tensor's
    return term.expand(particles.num_particles, *sizes) / layout.scale


def _same(reference: Tensor, term: Tensor) -> bool:
    """Whether a term has one value for all particles, up to rounding."""
    tolerance = 16 * torch.finfo(term.dtype).eps * reference.abs()
    return bool(((term == reference) | ((term - reference).abs() <= tolerance)).all())


def _check_finite(joint: Tensor, particles: Particles, obj: str) -> None:
    bad = torch.isnan(joint) | torch.isposinf(joint)
    if bool(bad.any()):
        fail(
            NonFiniteError,
            obj,
            "weigh draws",
            got=f"a log weight of {float(joint[bad][0])} with "
            f"{particles.first_non_finite() or 'finite sites whose sum is not'}",
            because="log p - log q has to be a number below infinity",
            fix="Check the data and the support and scale at that site; a guide of drawn values has no density there.",
        )


def require_bound(request: Request, weights: Weights) -> None:
    r"""Raise if the weights' mean is not an estimate of p(x).

    Raises:
        ModelError: log p - log q is no bound.
        EmvaeError: One weight covers a minibatch of a subsampled plate, or the guide has nothing but point masses.
    """
    layout = weights.layout
    if weights.unsound is not None:
        site, message, fix = weights.unsound
        fail(
            ModelError,
            request.obj,
            f"weigh draws of site {site!r}",
            got=message,
            because="the mean of p / q is p(x) only for one measure, scale and mask on both sides",
            fix=fix,
        )
    if layout.shared is None and layout.given:
        fail(
            EmvaeError,
            request.obj,
            "integrate over the latent sites",
            got=f"a guide that is a point mass at {', '.join(map(repr, layout.given))}",
            because="importance sampling needs draws from a density",
            fix="Use a guide with a density such as AutoLaplaceApproximation, "
            "or emvae.elbo(...) for the log joint density at the point.",
        )
    plates = layout.subsampled if weights.by_datum or layout.shared is None else layout.all_subsampled
    if not plates:
        return
    if weights.together:
        why = weights.together
    elif layout.shared:
        why = f"not all latent sites have the plate {plates[0]!r}"
    else:
        why = "a latent site lies outside of all plates"
    fail(
        EmvaeError,
        request.obj,
        "estimate the evidence from a minibatch",
        got=f"a subsampled plate {plates[0]!r} while {why}",
        because="one weight then covers the whole minibatch, and scaled up it bounds nothing",
        fix=f"Call it with all data and no subsampling in {plates[0]!r}, or use emvae.elbo(...).",
    )
