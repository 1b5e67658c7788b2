r"""What one run leaves behind: its sites with their densities, in one layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._pyro import scale_and_mask
from .handlers import is_computed

__all__ = ["Particles", "Site", "reduce_to"]


@dataclass(frozen=True)
class Site:
    r"""One sample statement of one run.

    Args:
        name: The site's name.
        fn: Its distribution, batch shape ``(particles?, *plates)``.
        value: The value in use: drawn, replayed or observed.
        log_prob: log density of the value, *unscaled and unmasked*, in nats; plate dims from the right, particles
            at ``-1 - max_plate_nesting``.
        scale, mask: What the program's handlers multiply by and keep.
        frames: The vectorized plates, without the particle plate.
        loops: The plates that are looped over and subsample; their scale is in `scale`, too.
        infer: The site's annotations.
        is_observed: Whether the value was given (``obs=``, ``factor``, ``deterministic``).
        runs: The same site of each run, if it was stacked from a loop; `fn` is then that of the first run.
        outcomes: log density by outcome of the guide's enumerated sites, whose expectation `log_prob` then is.
        average: Takes the expectation of such a tensor; None where nothing is enumerated in the guide.
        density: Returns the log density of a value at this site of one run.
    """

    name: str
    fn: Any
    value: Tensor
    log_prob: Tensor = field(repr=False)
    scale: Any
    mask: Any
    frames: tuple
    infer: Mapping[str, Any] = field(repr=False)
    is_observed: bool
    runs: tuple[Site, ...] = field(default=(), repr=False)
    loops: tuple = field(default=(), repr=False)
    outcomes: Tensor | None = field(default=None, repr=False)
    average: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    density: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def each(self, function: Callable[[Site], Tensor]) -> Tensor:
        """Apply a function of shape ``batch_shape`` to the site, run by run if it was stacked: as `log_prob`."""
        if not self.runs:
            return function(self)
        plates = self.log_prob.dim() - 1
        rows = [function(run) for run in self.runs]
        return torch.stack([row.reshape((1,) * (plates - row.dim()) + row.shape) for row in rows])

    @property
    def scaled(self) -> Tensor:
        """log density times scale where the mask is true, else 0."""
        if self.mask is None and isinstance(self.scale, float) and self.scale == 1.0:
            return self.log_prob
        return scale_and_mask(self.log_prob, self.scale, self.mask)

    @property
    def is_deterministic(self) -> bool:
        """Whether the value was computed: by `pyro.deterministic`, or by `pyro.infer.reparam` from other sites."""
        return is_computed({"fn": self.fn, "is_observed": self.is_observed, "infer": self.infer})


@dataclass(frozen=True)
class Particles:
    r"""Draws of the guide and the model replayed on them.

    Args:
        num_particles: K.
        max_plate_nesting: Number of plate dims; particles are at dim ``-1 - max_plate_nesting`` if K > 1.
        guide: The guide's sites in order of execution.
        model: The model's sites in order of execution.
        params: Unconstrained leaves met, by name, for each of the two runs.
        result: What the model returned.
        ignored: Model sites whose ``infer={"estimator": ...}`` the guide's replay replaced.
        constraints: What the parameter statements declared, by name.
        subsample: Indices that plates drew at random, by plate; of particles run one by one, those of the first.
        batches: The indices of each run, if particles were run one by one: each draws a minibatch of its own.
        weights: Of guide sites whose particles are weighted, by name, K times the weights: ``(particles, *plates)``.
        enumerated: Number of outcomes of the guide's sites that are summed over, by name.
        cuts: Per run, the pairs of a value as drawn and the leaf that stands for it downstream, in order.
        held: Values that are leaves, so that the model can be differentiated by them, and have no path.
    """

    num_particles: int
    max_plate_nesting: int
    guide: dict[str, Site]
    model: dict[str, Site]
    params: dict[str, dict[str, Tensor]] = field(repr=False)
    result: Any = field(default=None, repr=False)
    cuts: tuple[tuple[tuple[Tensor, Tensor], ...], ...] = field(default=(), repr=False)
    ignored: tuple[str, ...] = ()
    constraints: dict[str, Any] = field(default_factory=dict, repr=False)
    subsample: dict[str, Tensor] = field(default_factory=dict, repr=False)
    batches: tuple[dict[str, Tensor], ...] = field(default=(), repr=False)
    weights: dict[str, Tensor] = field(default_factory=dict, repr=False)
    enumerated: dict[str, int] = field(default_factory=dict, repr=False)
    held: tuple[Tensor, ...] = field(default=(), repr=False)

    @property
    def num_outcomes(self) -> int:
        """The most outcomes of enumerated sites of the guide at which one density was evaluated."""
        rows = [site.runs or (site,) for side in (self.guide, self.model) for site in side.values()]
        tables = [(s.outcomes.numel(), s.log_prob.numel()) for run in rows for s in run if s.outcomes is not None]
        return max([1, *(table // max(1, mean) for table, mean in tables)])

    @property
    def latents(self) -> dict[str, Site]:
        """The model's unobserved sites."""
        return {name: site for name, site in self.model.items() if not site.is_observed}

    @property
    def observed(self) -> dict[str, Site]:
        """The model's observed sites, without deterministic ones."""
        return {n: s for n, s in self.model.items() if s.is_observed and not s.is_deterministic}

    def rows(self, tensor: Tensor) -> Tensor:
        """Return a log density with all dims spelled out: ``(particles, *plates)``; a missing dim has size 1."""
        return tensor.reshape((1,) * (self.max_plate_nesting + 1 - tensor.dim()) + tensor.shape)

    def values(self, name: str) -> Tensor:
        """Return a site's value, particles first: ``(particles, *plates, *event)`` with the site's own plates."""
        site = self.guide[name] if name in self.guide else self.model[name]
        event_dim = site.fn.event_dim
        value = site.value
        batch = value.shape[: value.dim() - event_dim]
        event = value.shape[value.dim() - event_dim :]
        nest = self.max_plate_nesting
        full = (1,) * (nest + 1 - len(batch)) + tuple(batch)
        keep = {frame.dim for frame in site.frames}
        plates = tuple(n for i, n in enumerate(full[1:]) if (i - nest) in keep or n != 1)
        return value.reshape((full[0], *plates, *event)).expand((self.num_particles, *plates, *event))

    def total(self, sites: Iterable[Site]) -> Tensor:
        """Return the scaled and masked log density of `sites`, summed over plates: ``(particles,)``, nats."""
        rows = [self.rows(site.scaled) for site in sites]
        terms = [row.reshape(len(row), -1).sum(1).expand(self.num_particles) for row in rows]
        if terms:
            return torch.stack(terms).sum(0)
        like = next(iter(self.model.values())).log_prob if self.model else torch.zeros(())
        return like.new_zeros(self.num_particles)

    @property
    def log_p(self) -> Tensor:
        """log p(x, z) per particle: ``(particles,)``, nats."""
        return self.total(self.model.values())

    @property
    def log_q(self) -> Tensor:
        """log q(z) per particle: ``(particles,)``, nats."""
        return self.total(self.guide.values())

    def first_non_finite(self) -> str | None:
        """Return a description of the first site whose value or log density is not finite."""
        for run in ("guide", "model"):
            for site in getattr(self, run).values():
                bad_value = site.value.is_floating_point() and not bool(torch.isfinite(site.value).all())
                if bad_value or not bool(torch.isfinite(site.scaled).all()):
                    what = "value" if bad_value else "log density"
                    return f"a non-finite {what} at the {run}'s site {site.name!r}"
        return None


def reduce_to(term: Tensor, frames: Iterable, target: Iterable) -> Tensor:
    r"""Sum a log density over the plates that `target` does not have, keeping dims.

    Source: Rao-Blackwellization over plates (`pyro.infer.util.MultiFrameTensor`).
    """
    target = set(target)
    for frame in frames:
        if frame not in target and term.dim() >= -frame.dim and term.shape[frame.dim] != 1:
            term = term.sum(frame.dim, keepdim=True)
    return term
