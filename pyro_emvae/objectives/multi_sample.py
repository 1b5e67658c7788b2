r"""Objectives of several particles, with one weight per datum and particle."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._checks import EmvaeError, fail
from ..particles import Particles, Site, reduce_to
from .base import Objective, Term, summands

__all__ = ["Bound", "MultiSample"]

Moves = Callable[[str, str, str], bool]


@dataclass(frozen=True)
class Bound:
    r"""An objective of several particles: $\tfrac1G\sum_g\sum_nc_n\,h(\ell_{g1n},\dots,\ell_{gLn})$ plus the rest.

    Args:
        objective: What has h.
        size: L, the particles of one h; there are G groups of them, one after the other.
        frames: The plates of n, shared by all local latents and what they reach.
        log_weight: The log weights $\ell$ of p over q, without c: ``(particles, *plates)``, nats; other plates have
            size 1.
        value: h per group and datum: ``(groups, *plates)``, nats.
        scale: c, the scale of the shared plates that subsample.
        terms: The summands in the log weights.
        rest: The summands that no local draw reaches: their mean over particles is added.
        above: The guide's sites that are drawn once per group: see ``num_local_particles``.
    """

    objective: MultiSample
    size: int
    frames: tuple
    log_weight: Tensor
    value: Tensor
    scale: float
    terms: list[Term] = field(repr=False)
    rest: list[Term] = field(repr=False)
    above: frozenset[str] = frozenset()
    _baselines: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def total(self) -> Tensor:
        """The objective: a scalar, nats."""
        constants = sum(term.value.sum() for term in self.rest) / len(self.log_weight)
        return self.scale * self.value.sum() / len(self.value) + self.objective.sign * constants

    def fold(self, rows: Tensor) -> Tensor:
        """Return rows with the particles of a group first: ``(L, G, *plates)``."""
        return rows.reshape(-1, self.size, *rows.shape[1:]).movedim(1, 0)

    def unfold(self, folded: Tensor) -> Tensor:
        """Return what `fold` folded, or one number per group for all its particles: ``(particles, *plates)``."""
        return folded.expand(self.size, *folded.shape[1:]).movedim(0, 1).reshape(-1, *folded.shape[2:])

    @functools.cached_property
    def held(self) -> Tensor:
        """The detached log weights, folded: ``(L, G, *plates)``."""
        return self.fold(self.log_weight.detach())

    def without(self, mean: str) -> Tensor:
        """Return `MultiSample.without` of the weights held, made once for all sites: ``(L, G, *plates)``."""
        if mean not in self._baselines:
            self._baselines[mean] = self.objective.without(self.held, mean)
        return self._baselines[mean]

    @property
    def signal(self) -> Tensor:
        """h of each particle's group, detached and scaled: ``(particles, *plates)``, nats."""
        return self.scale * self.unfold(self.value.detach().unsqueeze(0))

    def by_values(self, doubly: bool = False) -> list[Term]:
        """Return the summands, multiplied so that their mean has h's derivative by the drawn values and log q.

        Args:
            doubly: With the factors of the doubly reparameterised gradient.
        """
        h = self.objective
        return self._weighted(h.doubly(self.held) if doubly else h.slopes(self.held), h.sign)

    def by_model(self) -> list[Term]:
        """Return the summands, multiplied so that theta climbs by their mean's direct derivative."""
        return self._weighted(self.objective.model_slopes(self.held), 1.0)

    def _weighted(self, slopes: Tensor, sign: float) -> list[Term]:
        weight = self.size * self.unfold(slopes)
        inside = [term._replace(value=weight * term.value) for term in self.terms]
        return inside + (self.rest if sign == 1.0 else [term._replace(value=sign * term.value) for term in self.rest])


class MultiSample(Objective):
    r"""An objective of several particles, with one weight per datum and particle.

    $$\sum_n c_n\,h(\ell_{1n},\dots,\ell_{Kn}),\qquad \ell_{kn}=\log p(x_n,z_{kn})-\log q(z_{kn}),$$

    over the plates that all latents and data share; c is the scale N/B of those that subsample, outside h, so that a
    bound stays one. Pyro's `RenyiELBO` scales inside. A scale of the user's own stays inside the weight. h grows by s c
    if all $\ell$ grow by c, with s the `sign`.

    With ``num_local_particles=L`` the K particles are groups of L, and the objective is the mean over groups. A latent
    outside every plate is then drawn once per group, and

    $$\tfrac LK\sum_g\Big[\sum_nc_n\,h(\ell_{g1n},\dots,\ell_{gLn}\mid z_g)+\log p(z_g)-\log q(z_g)\Big],$$

    where $\ell$ holds what the local draws reach. For a lower bound h this is one: of $\log p(x|z_g)$ first.

    Raises:
        EmvaeError: Something that a draw reaches lies outside a plate that subsamples, or in a further one that does:
            one weight for all data is no bound once it is scaled. L does not divide K; no latent in a plate; a latent
            outside of them that depends on one inside.

    Source: Rainforth et al. 2018, "Tighter variational bounds are not necessarily better" (MIWAE), for groups.
    """

    sign: float = 1.0
    num_local_particles: int | None = None

    @abstractmethod
    def value(self, log_weight: Tensor) -> Tensor:
        """Return h over the first dim, which is kept with size 1."""

    @abstractmethod
    def slopes(self, log_weight: Tensor) -> Tensor:
        """Return the derivative of h by each log weight."""

    def model_slopes(self, log_weight: Tensor) -> Tensor:
        """Return by what theta climbs in place of `slopes`, if the trait ``splits_paths`` says that it does."""
        return self.slopes(log_weight)

    def doubly(self, log_weight: Tensor) -> Tensor:
        r"""Return $\partial_kh-\partial_k^2h$, the factors of the doubly reparameterised gradient by the values."""
        fail(
            EmvaeError,
            type(self).__name__,
            "reparameterise doubly",
            got=f"objective {self.name!r}",
            because="that needs its second derivatives, and it has no method doubly()",
            fix='Use estimator="pathwise".',
        )

    def without(self, log_weight: Tensor, mean: str) -> Tensor:
        """Return, for each particle, h with a mean of the others in its place, or of the others alone.

        Args:
            log_weight: Particles first.
            mean: ``"geometric"``: the mean of the others' log weights. ``"arithmetic"``: h of the others, that is
                their mean weight in its place.
        """
        rows = []
        for k in range(len(log_weight)):
            others = torch.cat([log_weight[:k], log_weight[k + 1 :]])
            filled = others if mean == "arithmetic" else torch.cat([others, others.mean(0, keepdim=True)])
            rows.append(self.value(filled))
        return torch.cat(rows)

    def check(self, num_particles: int) -> None:
        count = self.num_local_particles
        if count is not None and num_particles % count:
            fail(
                EmvaeError,
                type(self).__name__,
                "put particles into groups",
                got=f"num_particles={num_particles} and num_local_particles={count}",
                because="every draw of a global latent has the same number of local ones",
                fix=f"Write num_particles={count * max(1, round(num_particles / count))}.",
            )

    def is_above(self, frames: Collection) -> bool:
        """Whether a guide's site of these plates is drawn once per group."""
        return self.num_local_particles is not None and not frames

    def terms(self, particles: Particles) -> list[Term]:
        return summands(particles, {})

    def bound(self, particles: Particles, terms: list[Term], moves: Moves) -> Bound:
        drawn = {name: site for name, site in particles.guide.items() if not site.is_observed}
        above = frozenset(name for name, site in drawn.items() if self.is_above(site.frames))
        local = [name for name in drawn if name not in above]
        _check_groups(above, local, moves)
        inside, rest = [], []
        for term in terms:
            side = "guide" if term.kind == "entropy" else "model"
            reached = any(moves(name, side, term.site) for name in local)
            (inside if reached else rest).append(term._replace(value=particles.rows(term.value)))
        _check_loops([particles.guide[t.site] if t.kind == "entropy" else particles.model[t.site] for t in inside])
        nested = any(site.frames for site in drawn.values())
        frames = _shared(inside, type(self).__name__, nested)
        scale = math.prod((frame.full_size or frame.size) / frame.size for frame in frames)
        count = particles.num_particles
        parts = [reduce_to(term.value, term.frames, frames) for term in inside]
        empty = next(iter(particles.model.values())).log_prob.new_zeros(1, *(1,) * particles.max_plate_nesting)
        log_weight = sum(parts) / scale if parts else empty
        log_weight = log_weight.expand(count, *log_weight.shape[1:])
        size = self.num_local_particles or count
        folded = log_weight.reshape(-1, size, *log_weight.shape[1:]).movedim(1, 0)
        return Bound(self, size, frames, log_weight, self.value(folded)[0], scale, inside, rest, above)


def _check_groups(above: frozenset[str], local: list[str], moves: Moves) -> None:
    """Refuse global latents without local ones, or that depend on one."""
    if not above:
        return
    name = min(above)
    if not local:
        fail(
            EmvaeError,
            "MultiSample",
            f"draw local particles under site {name!r}",
            got="no latent in a plate",
            because="num_local_particles is for local latents under global ones",
            fix='Write objective="iwae" for whole data, or "elbo" for minibatches.',
        )
    found = [(one, other) for one in above for other in local if moves(other, "guide", one)]
    if found:
        fail(
            EmvaeError,
            "MultiSample",
            f"draw site {found[0][0]!r} once for several local particles",
            got=f"a distribution that depends on the draw of site {found[0][1]!r} in a plate",
            because="the local particles of a group have different draws",
            fix='Write objective="elbo".',
        )


def _check_loops(sites: list[Site]) -> None:
    """Refuse plates that are looped over and subsample: all data then are in one weight."""
    for site in sites:
        for frame in site.loops:
            fail(
                EmvaeError,
                "MultiSample",
                "weigh the particles of each datum",
                got=f"site {site.name!r} in a loop over plate {frame.name!r}, which subsamples {frame.size} of "
                f"{frame.full_size}",
                because="one weight for all data is no bound once it is scaled",
                fix=f'Write "with pyro.plate({frame.name!r}, ...)" in place of the loop, or give whole data.',
            )


def _shared(terms: list[Term], obj: str, nested: bool) -> tuple:
    """Return the plates that all summands share; the others must not subsample."""
    every = [set(term.frames) for term in terms]
    shared = set.intersection(*every) if every else set()
    for term in terms:
        for frame in term.frames:
            if frame not in shared and frame.full_size not in (None, frame.size):
                outside = next((t.site for t in terms if frame not in t.frames), term.site)
                local = f"Write objective={obj}(num_local_particles=...) for the global latent, or give whole data."
                fail(
                    EmvaeError,
                    obj,
                    "weigh the particles of each datum",
                    got=f"site {outside!r} outside plate {frame.name!r}, which subsamples {frame.size} of "
                    f"{frame.full_size}",
                    because="one weight for all data is no bound once it is scaled",
                    fix=local if nested else 'Give whole data, or write objective="elbo".',
                )
    return tuple(frame for frame in (terms[0].frames if terms else ()) if frame in shared)
