r"""Gibbs sampling of discrete latents on all data at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..._checks import StepError, fail, positive_int
from .base import Draws, Sampler, Target, Values, draw_nothing
from .chains import Chains

__all__ = ["Gibbs"]


@dataclass(frozen=True)
class Gibbs(Sampler):
    r"""Draw one site at a time from its exact conditional, for all data and chains at once.

    $$z_i\sim p_\theta(z_i\,|\,z_{-i},x)\propto p_\theta(x,z_i,z_{-i}).$$

    The conditional is found by running the model with every outcome of the site; elements of a site in its plates are
    independent given all other sites. Chains go on where the E-step before left them.

    When to use: discrete latents with too many joint outcomes for `Enumerated`. Sites that are strongly dependent mix
    slowly. A model with a single discrete site per datum is drawn exactly.

    Args:
        num_sweeps: Passes over all sites per E-step.
        num_warmup: Passes of a datum's chains before their first draw.

    Raises:
        StepError: A latent has no finite support that Pyro enumerates; elements of a site are joined by another one.

    Cost: per pass and site, one run of the model on (outcomes x chains) particles.

    Source: Geman and Geman 1984.

    Example:
        >>> Gibbs()
        Gibbs(num_sweeps=1, num_warmup=20)
    """

    name: ClassVar[str] = "gibbs"
    latents: ClassVar[str] = "discrete"
    persistent: ClassVar[bool] = True
    num_particles: ClassVar[int] = 10

    num_sweeps: int = 1
    num_warmup: int = 20

    def __post_init__(self) -> None:
        positive_int("MonteCarlo", "num_sweeps", self.num_sweeps)
        positive_int("MonteCarlo", "num_warmup", self.num_warmup, 0)

    def prepare(self, target: Target) -> Target:
        for site, msg in target.latents.items():
            if not _is_enumerable(msg["fn"]):
                fail(
                    StepError,
                    "MonteCarlo",
                    f"draw site {site!r} by gibbs",
                    got=f"{type(msg['fn']).__name__}{tuple(msg['fn'].shape())}",
                    because="its conditional is found from all outcomes, and it has no finite support that Pyro "
                    "enumerates",
                    fix='Use MonteCarlo("hmc") for continuous latents, or give the site\'s elements a plate in place '
                    "of .to_event().",
                )
        return target

    @torch.no_grad()
    def sample(self, target: Target, chains: Chains | None, num_particles: int) -> tuple[Draws, Chains]:
        shapes = {name: target.value_shape(name) for name in target.latents}
        sweeps = self.num_sweeps
        if chains is None or bool((chains.count == 0).any()):
            start = target.lay_out(target.draw(draw_nothing, num_particles))
            flat = target.flatten({n: v.double() for n, v in start.items()}).transpose(0, 1)
            if chains is None:
                chains = Chains.new(math.prod(target.sizes), num_particles, flat.shape[-1], flat)
            chains = chains.resized(num_particles)
            fresh = (chains.count == 0)[:, None, None]
            chains, sweeps = (
                chains._replace(position=torch.where(fresh, flat, chains.position)),
                sweeps + self.num_warmup,
            )
        chains = chains.resized(num_particles)
        values = target.unflatten(chains.position.transpose(0, 1), shapes)
        values = {name: value.to(target.latents[name]["value"]) for name, value in values.items()}
        for _ in range(sweeps):
            for name in values:
                values[name] = _draw_site(target, values, name)
        flat = target.flatten({n: v.to(chains.position) for n, v in values.items()}).transpose(0, 1)
        weights = target.unit_shape(flat.new_full((num_particles, len(flat)), -math.log(num_particles)))
        ess = flat.new_full(target.sizes, float(num_particles))
        return Draws(values, weights, ess=ess), chains._replace(position=flat, count=chains.count + sweeps)


def _is_enumerable(fn: Any) -> bool:
    try:
        fn.enumerate_support(expand=False)
    except NotImplementedError:
        return False
    return True


def _draw_site(target: Target, values: Values, name: str) -> Tensor:
    """Return a draw of one site given all others: ``(chains, *plates, *event)``."""
    fn, old = target.latents[name]["fn"], values[name]
    outcomes = fn.enumerate_support(expand=False)
    outcomes = outcomes.reshape(len(outcomes), *fn.event_shape)
    count, chains = len(outcomes), len(old)
    spread = outcomes.reshape(count, 1, *(1,) * target.nesting, *fn.event_shape).expand(count, *old.shape)
    tiled = {n: v.repeat(count, *(1,) * (v.dim() - 1)) for n, v in values.items()}
    tiled[name] = spread.reshape(count * chains, *old.shape[1:])
    logits = _conditional(target, tiled, name, chains).reshape(count, chains, *old.shape[1 : 1 + target.nesting])
    logits = logits.movedim(0, -1)
    impossible = logits.amax(-1, keepdim=True).isneginf()
    which = torch.distributions.Categorical(logits=torch.where(impossible, 0.0, logits), validate_args=False).sample()
    return outcomes[which]


def _conditional(target: Target, values: Values, name: str, chains: int) -> Tensor:
    r"""Return $\beta\log p(x,z)$ up to a constant, per element of a site in its plates: ``(particles, *plates)``."""
    frames = {f.name for f in target.frames(name)}
    keep = {target.nesting + 1 + frame.dim for frame in target.frames(name)}
    shape = [len(values[name]), *values[name].shape[1 : 1 + target.nesting]]
    rows: list[Tensor] = []
    outside: dict[str, list[Tensor]] = {}
    for particles in target.replay(values):
        total: Any = 0.0
        for site in particles.model.values():
            term = target.spelled(particles, site)
            if frames <= {f.name for f in site.frames}:
                others = [dim for dim in range(1, term.dim()) if dim not in keep]
                total = total + (term.sum(others, keepdim=True) if others else term) / target.scale
            else:
                outside.setdefault(site.name, []).append(term.expand(particles.num_particles, *term.shape[1:]))
        rows.append(total.expand(particles.num_particles, *shape[1:]))
    for other, terms in outside.items():
        _check_outside(torch.cat(terms), chains, name, other)
    return target.tempered(torch.cat(rows))


def _check_outside(term: Tensor, chains: int, name: str, other: str) -> None:
    """Raise if a site outside the plates of the one that is drawn depends on it."""
    term = term.reshape(-1, chains, *term.shape[1:])
    if not torch.allclose(term, term[:1].expand_as(term), equal_nan=True):
        fail(
            StepError,
            "MonteCarlo",
            f"draw site {name!r} by gibbs",
            got=f"site {other!r}, outside its plates, that depends on it",
            because="elements of a site are drawn at once, so they have to be independent given all other sites",
            fix="Take the site out of the plate, one site per element, or use steps.Enumerated().",
        )
