r"""The guide as a map from data to distributions of latents: draws scored under every datum's posterior."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from .._checks import ModelError, fail, nearest
from ..estimators.base import base, is_point_mass
from ..information import log_mean_exp
from ..particles import Particles, Site, check_match, draw, score

__all__ = ["Encoder", "refuse"]

CHUNK_FLOATS = 4_000_000


@dataclass(frozen=True)
class Encoder:
    """The guide's latents in the plate of the data, of one run."""

    guide: Callable
    args: tuple
    kwargs: Mapping[str, Any]
    sites: dict[str, Site]
    particles: Particles
    frame: Any

    @classmethod
    def of(cls, obj: str, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any], plate: str | None):
        particles = draw(model, guide, args, kwargs)
        check_match(particles)
        latents = {n: s for n, s in particles.guide.items() if not s.is_observed and not is_point_mass(s.fn)}
        local = {n: s for n, s in latents.items() if (plate in {f.name for f in s.frames} if plate else s.frames)}
        if not local:
            got = f"latents {list(latents)}" + (f", none of them in plate {plate!r}" if plate else " outside of plates")
            refuse(obj, got, "a datum has to have latents of its own with a density", "Write pyro.plate, pyro.sample.")
        common = {f.name: f for f in set.intersection(*(set(s.frames) for s in local.values()))}
        if plate is None and len(common) != 1:
            refuse(
                obj, f"plates {sorted(common)}", "one plate is that of the data", f"Write plate=: {nearest('', common)}"
            )
        for name, site in local.items():
            if site.mask is not None and not bool(torch.as_tensor(site.mask).all()):
                refuse(obj, f"a mask at {name!r}", "masked latents have no density to compare", "Pass whole data.")
        return cls(guide, args, kwargs, local, particles, common[plate or next(iter(common))])

    @property
    def batch(self) -> dict[str, Tensor]:
        return self.particles.subsample

    @property
    def nesting(self) -> int:
        return self.particles.max_plate_nesting

    @property
    def size(self) -> int:
        return int(self.frame.size)

    @property
    def rows_at_once(self) -> int:
        width = sum(site.fn.event_shape.numel() * site.fn.batch_shape.numel() for site in self.sites.values())
        return max(CHUNK_FLOATS // max(width, 1), 1)

    @property
    def alone(self) -> Site | None:
        """The site, if there is but one, whose distribution then depends on no other draw."""
        drawn = [site for site in self.particles.guide.values() if not site.is_observed]
        return drawn[0] if len(drawn) == 1 else None

    def held(self) -> dict[str, Tensor]:
        """Values of latents outside of the data's plate."""
        sites = self.particles.guide.items()
        return {n: s.value for n, s in sites if not s.is_observed and n not in self.sites and not is_point_mass(s.fn)}

    def draw(self, num_particles: int) -> dict[str, Tensor]:
        """Return draws of the latents ``(S, *plates, *event)``."""
        if self.alone is not None:
            site = self.alone
            return {site.name: self._spelled(site, site.fn.sample((num_particles,)))}
        runs = [score(self.guide, self.held(), self.args, self.kwargs)[0] for _ in range(num_particles)]
        return {n: torch.cat([self._spelled(s, run[n].value[None]) for run in runs]) for n, s in self.sites.items()}

    def _spelled(self, site: Site, value: Tensor) -> Tensor:
        """Return a value ``(S, *batch, *event)`` with all plate dims."""
        event = site.fn.event_dim
        batch = value.shape[1 : value.dim() - event]
        return value.reshape(len(value), *(1,) * (self.nesting - len(batch)), *value.shape[1:])

    def densities(self, values: dict[str, Tensor], chunk_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield of each chunk of draws their log density under their own datum, and under the aggregate."""
        dim = 1 + self.nesting + self.frame.dim
        rows = {name: value.movedim(dim, 1).flatten(0, 1) for name, value in values.items()}
        count = len(next(iter(rows.values())))
        together = self.alone is not None or self._agrees(rows, dim)
        for start in range(0, count, chunk_size):
            index = torch.arange(start, min(start + chunk_size, count))
            chunk = {name: value[index].unsqueeze(dim) for name, value in rows.items()}
            scores = self._scores(chunk, together)
            own = scores.gather(1, (index % self.size).to(scores.device)[:, None])[:, 0]
            yield own, log_mean_exp(scores)

    def _agrees(self, rows: dict[str, Tensor], dim: int) -> bool:
        """Whether two draws scored in one run get what they get in a run each."""
        two = {name: value[[0, -1]].unsqueeze(dim) for name, value in rows.items()}
        try:
            return torch.allclose(self._scores(two, True), self._scores(two, False), rtol=1e-4, atol=1e-4)
        except (RuntimeError, ValueError):  # any failure of the guide under an extra dim is the answer
            return False

    def _scores(self, rows: dict[str, Tensor], together: bool) -> Tensor:
        """Return log densities of draws ``(C, *plates, *event)``, of size 1 in the data's, under all data: (C, N)."""
        if self.alone is not None:
            return self._sum(self.alone.fn.log_prob(rows[self.alone.name]))
        count = len(next(iter(rows.values())))
        if not together:
            return torch.cat([self._scores({n: v[i : i + 1] for n, v in rows.items()}, True) for i in range(count)])
        full = {
            n: v.expand(count, *self._spelled(s, s.value[None]).shape[1:])
            for n, v in rows.items()
            for s in [self.sites[n]]
        }
        if count == 1:
            full = {n: v.reshape(self.sites[n].value.shape) for n, v in full.items()}
        sites, _ = score(self.guide, self.held() | full, self.args, self.kwargs, count, self.nesting)
        inside = [s for s in sites.values() if self.frame.name in {f.name for f in s.frames}]
        return torch.stack([self._sum(site.log_prob).expand(count, self.size) for site in inside]).sum(0)

    def _sum(self, log_prob: Tensor) -> Tensor:
        """Sum a log density over all plates but the data's: (C, N)."""
        full = log_prob.reshape((1,) * (self.nesting + 1 - log_prob.dim()) + log_prob.shape)
        keep = 1 + self.nesting + self.frame.dim
        others = [d for d in range(1, full.dim()) if d != keep]
        return full.sum(others) if others else full

    def variances(self, names: list[str], num_particles: int) -> dict[str, Tensor]:
        """Return the variance over the data of each dimension's posterior mean."""
        if self.alone is not None:
            mean = _mean(self.alone.fn)
            if mean is not None:
                return {self.alone.name: self._over_data(self._spelled(self.alone, mean[None])[0])}
        draws = self.draw(num_particles)
        found = {}
        for name in names:
            value = draws[name].to(torch.get_default_dtype()) if not draws[name].is_floating_point() else draws[name]
            noise = value.var(0).movedim(self.nesting + self.frame.dim, 0).mean(0) / num_particles
            raw = self._over_data(value.mean(0))
            found[name] = (raw - noise.reshape(raw.shape)).clamp(min=0)
        return found

    def _over_data(self, mean: Tensor) -> Tensor:
        """Return the variance over the data of ``(*plates, *event)``, without dims of size 1."""
        mean = mean.movedim(self.nesting + self.frame.dim, 0)
        variance = mean.var(0, correction=0)
        return variance.reshape([n for i, n in enumerate(variance.shape) if n != 1 or i >= self.nesting - 1])

    def kl(self, name: str) -> Tensor | None:
        """Return the KL of each dimension, averaged over the data; None if it is not known."""
        q, p = base(self.sites[name].fn), base(self.particles.model[name].fn) if name in self.particles.model else None
        if p is None or q.event_dim or p.event_dim:
            return None
        try:
            kl = kl_divergence(q, p)
        except NotImplementedError:
            return None
        event = self.sites[name].fn.event_dim
        dims = list(range(kl.dim() - event))
        return kl.mean(dims) if dims else None


def _mean(fn: Any) -> Tensor | None:
    try:
        return fn.mean
    except NotImplementedError:
        return None


def refuse(obj: str, got: str, because: str, fix: str) -> None:
    fail(ModelError, obj, "tell the data's latents", got=got, because=because, fix=fix)
