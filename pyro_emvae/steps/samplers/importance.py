r"""Independent draws, weighted per datum: from a guide, or from the prior."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..._checks import NonFiniteError, StepError, fail
from ...particles import Particles, check_match
from ...posterior import Prior as PriorGuide
from ...psis import psis, tail_size
from .base import Draws, Sampler, Target
from .chains import Chains

__all__ = ["Importance", "Prior", "check_weights", "per_unit"]

MIN_TAIL = 5


@dataclass(frozen=True)
class Importance(Sampler):
    r"""Draws from a guide, each datum with self-normalised weights of its own.

    $$w_{sn}\propto\frac{p_\theta(x_n,z_{sn})}{q_\phi(z_{sn}|x_n)},\qquad\sum_sw_{sn}=1.$$

    When to use: a guide that covers the posterior; see `ess` and `khat`. With a latent outside of the data's plates
    there is one weight for all data, which is hopeless for many.

    Args:
        guide: The proposal; by default the user's guide, which then is trained by nothing but its other uses.

    Source: Rubin 1988; for EM: Levine and Casella 2001. Differs: weights per datum, without the batch's scale.

    Example:
        >>> Importance()
        Importance(guide=None)
    """

    name: ClassVar[str] = "importance"
    guide: Callable | None = None

    @property
    def needs_guide(self) -> bool:
        return self.guide is None

    def sample(self, target: Target, chains: Chains | None, num_particles: int) -> tuple[Draws, None]:
        proposal = target.guide if self.guide is None else self.guide
        if proposal is None:
            fail(
                StepError,
                "MonteCarlo",
                "draw by importance",
                got="no guide",
                because="its proposal is the guide",
                fix='Write EM(model, guide, ...), MonteCarlo("importance", guide=proposal), or MonteCarlo("prior").',
            )
        return weighted(target, proposal, num_particles), None


@dataclass(frozen=True)
class Prior(Sampler):
    r"""Draws from the model's prior, weighted per datum by the likelihood: the naive "half-hearted" EM.

    $$w_{sn}\propto p_\theta(x_n|z_{sn}),\qquad z_{sn}\sim p_\theta(z).$$

    When to use: to see why a better proposal is needed. Its effective number of draws falls exponentially with the
    dimension of a datum's latents.

    Example:
        >>> Prior()
        Prior()
    """

    name: ClassVar[str] = "prior"

    def sample(self, target: Target, chains: Chains | None, num_particles: int) -> tuple[Draws, None]:
        return weighted(target, PriorGuide(target.model), num_particles), None


@torch.no_grad()
def weighted(target: Target, guide: Callable, num_particles: int) -> Draws:
    r"""Draw from a guide, and weigh.

    The estimate of the evidence is $\log\hat p(x)=c+\frac NB\sum_n\log\frac1S\sum_sw_{sn}$, with c the terms outside
    the units' plates; its expectation is a lower bound of log p(x). In an annealed run draws are weighted by
    $w_{sn}=p_\theta(x_n,z_{sn})^\beta/q$, and what is estimated is the bound of $q_\beta\propto p^\beta$, which is
    $E_{q_\beta}[\log p]+H(q_\beta)=(1-\beta)E_{q_\beta}[\log p]+\log\int p^\beta$ per datum.

    Raises:
        NonFiniteError: A log weight is NaN or +inf, or all weights of a datum are zero.
        StepError: A site outside the data's plates depends on the latents, on a minibatch.
    """
    particles = target.draw(guide, num_particles)
    check_match(particles)
    log_p, constant = per_unit(target, particles, "model")
    log_q, outside = per_unit(target, particles, "guide")
    log_weights = target.tempered(log_p) - log_q
    check_weights(log_weights, particles)
    total = log_weights.logsumexp(0)
    power = total - math.log(num_particles)
    normalized = log_weights - total
    weights = normalized.exp()
    mean = torch.where(weights > 0, weights * log_p, 0.0).sum(0)
    objective = power if target.beta == 1.0 else power + (1.0 - target.beta) * mean
    evidence = float(constant - outside + target.scale * objective.sum())
    khat = math.nan
    if tail_size(num_particles) >= MIN_TAIL:
        khat = psis(log_weights, dim=0).khat.reshape(target.sizes)
    return Draws(
        target.lay_out(particles),
        target.unit_shape(normalized),
        log_evidence=evidence,
        entropy=evidence - float(constant + target.scale * mean.sum()),
        ess=weights.square().sum(0).reciprocal().reshape(target.sizes),
        khat=khat,
    )


def per_unit(target: Target, particles: Particles, side: str) -> tuple[Tensor, Any]:
    """Return one side's log density per unit ``(S, units)``, and the sum of its sites outside the units' plates."""
    count, rows, constant = particles.num_particles, [], 0.0
    for site in getattr(particles, side).values():
        if target.is_inside(site):
            term = particles.rows(site.scaled)
            rows.append(target.reduce(term).expand(count, -1))
        else:
            constant = constant + particles.rows(site.scaled)[0].sum()
    return torch.stack(rows).sum(0), constant


def check_weights(log_weights: Tensor, particles: Particles) -> None:
    bad = torch.isnan(log_weights) | torch.isposinf(log_weights)
    empty = log_weights.amax(0).isneginf()
    if not bool(bad.any() or empty.any()):
        return
    if bool(bad.any()):
        got = f"a log weight of {float(log_weights[bad][0])}"
    else:
        got = f"{len(log_weights)} weights that are all zero at datum {int(empty.nonzero()[0, 0])}"
    fail(
        NonFiniteError,
        "MonteCarlo",
        "weigh draws",
        got=f"{got} ({particles.first_non_finite() or 'every site by itself is finite'})",
        because="log p - log q has to be below infinity, and above minus infinity at some draw",
        fix="Let the guide draw where the model has mass, and raise num_particles.",
    )
