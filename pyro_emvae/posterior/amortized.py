r"""The posterior that a guide with its present parameters stands for; it draws afresh each time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._checks import ModelError, fail, nearest
from ..particles import Particles, choose_vectorize, draw
from .base import Posterior, Support, expected_log_joint

__all__ = ["GuidePosterior"]


class GuidePosterior(Posterior):
    r"""$q_\phi(z|x)$ at the present phi.

    Args:
        model, guide: Pyro callables.
        args, kwargs: The data.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x): pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)
        >>> def guide(x): pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> posterior = GuidePosterior(model, guide, (torch.tensor(1.0),))
        >>> posterior.marginal("z").mean
        tensor(0.5000)
    """

    kind = "amortized"

    def __init__(
        self, model: Callable, guide: Callable, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, dict(kwargs or {})

    def particles(self, num_particles: int) -> Particles:
        """Draw from the guide and replay the model, from torch's generator as it stands; no gradients."""
        pair = (self.model, self.guide, self.args, self.kwargs)
        vectorize, nesting = choose_vectorize("GuidePosterior", None, num_particles, None, pair, stacklevel=3)
        self._vectorize = vectorize
        with torch.no_grad():
            return draw(
                *pair,
                num_particles=num_particles,
                vectorize=vectorize,
                max_plate_nesting=nesting,
            )

    def marginal(self, site: str) -> Any:
        """Return the guide's distribution at a site; for a site below others, given one draw of those."""
        sites = self.particles(1).guide
        if site not in sites:
            fail(
                ModelError,
                "GuidePosterior",
                f"give the marginal of {site!r}",
                got="no such site in the guide",
                because="the guide's sites are the latents",
                fix=nearest(site, sites),
            )
        return sites[site].fn

    def support(self, num_particles: int) -> Support:
        particles = self.particles(num_particles)
        nesting, latents = particles.max_plate_nesting, particles.latents
        values = {}
        for name in latents:
            event = particles.guide[name].fn.event_dim
            value = particles.guide[name].value
            batch = value.shape[: value.dim() - event]
            full = (1,) * (nesting + 1 - len(batch)) + tuple(batch)
            value = value.reshape(full + tuple(value.shape[len(batch) :]))
            values[name] = value.expand(num_particles, *value.shape[1:])
        first = next(iter(latents.values()))
        weights = first.log_prob.new_full((num_particles, *(1,) * nesting), -math.log(num_particles))
        return Support(values, weights, nesting, first.scale, first.mask, sampled=True)

    def sample(self, plates: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        self.guide(*self.args, **self.kwargs)
        return {}

    def held(self, num_particles: int) -> Callable[[], Tensor]:
        support = self.support(num_particles)
        return lambda: expected_log_joint(self.model, self.args, self.kwargs, support, self._vectorize)

    def expected_log_joint(self, num_particles: int) -> Tensor:
        return expected_log_joint(self.model, self.args, self.kwargs, self.support(num_particles), self._vectorize)
