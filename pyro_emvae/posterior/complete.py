r"""The complete-data log density per datum, as a function of theta: what Louis's formula and scores per datum need."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._checks import StepError, fail
from ..particles import hold_batch, replay
from ._runs import may_vectorize
from .amortized import GuidePosterior
from .base import Posterior, Support
from .conjugate import ConjugatePosterior
from .gaussian import GaussianPosterior
from .quadrature import QuadraturePosterior
from .samples import SamplesPosterior

__all__ = ["CompleteData", "complete_data", "second_order_support"]


@dataclass(frozen=True)
class CompleteData:
    r"""$\log p_\theta(x_n,z_{sn})$ at weighted values of the latents of each datum.

    Args:
        log_p: ``(S, N)``, nats, with the model's scale and mask; to be differentiated by theta.
        weights: ``(S, N)``; they sum to one over S; those of a cubature may be negative.
        scale: How often each datum counts: ``(N,)``.
        rest: What belongs to no datum, such as `pyro.factor` outside the plates; a scalar, nats.
        drawn: Whether the values are draws, so that averages over them have a Monte Carlo error.
    """

    log_p: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    scale: Tensor = field(repr=False)
    rest: Tensor = field(repr=False)
    drawn: bool

    @property
    def num_data(self) -> int:
        return self.log_p.shape[1]


def complete_data(
    posterior: Posterior, support: tuple[Support, Tensor] | None = None, num_particles: int = 100
) -> CompleteData:
    r"""Run the model at the present theta on the values of a posterior's support, and sum its sites datum by datum.

    A datum is an element of the plates that all latents share; without such plates there is one.

    Args:
        posterior: What the E-step left.
        support: Its values if they are known, from `second_order_support`.
        num_particles: Draws, where they have to be taken.

    Raises:
        StepError: Latents that all data share, of a Gaussian posterior or one on nodes: these are one grid per datum.
    """
    support, weights = second_order_support(posterior, num_particles) if support is None else support
    count, nesting = len(weights), support.num_plates
    if _vectorizes(posterior) or count == 1:
        runs = [(support.values, count)]
    else:
        each = _without_outer_plates(posterior, support)
        runs = [({n: v[s] for n, v in each.items()}, 1) for s in range(count)]
    units = _units(support, weights)
    found, rest = [], None
    for values, rows in runs:
        with hold_batch(_batch(posterior)):
            particles = replay(
                posterior.model,
                _draw_nothing,
                values,
                posterior.args,
                posterior.kwargs,
                num_particles=rows,
                max_plate_nesting=nesting,
            )
        terms, rest = [], 0.0
        for site in particles.model.values():
            row = particles.rows(site.scaled)
            if any(row.shape[dim] < units[dim] for dim in range(1, nesting + 1)):
                rest = rest + row.sum() / len(row)
                continue
            others = [dim for dim in range(1, nesting + 1) if units[dim] == 1 and row.shape[dim] > 1]
            row = row.sum(others, keepdim=True) if others else row
            terms.append(row.expand(rows, *units[1:]).reshape(rows, -1))
        found.append(torch.stack(terms).sum(0))
    log_p = torch.cat(found)
    weights = weights.expand(count, *units[1:]).reshape(count, -1)
    scale = _scale(support, units, log_p)
    log_p = torch.where(weights != 0, log_p, 0.0)
    return CompleteData(log_p, weights, scale, torch.as_tensor(rest).to(log_p), support.sampled)


def second_order_support(posterior: Posterior, num_particles: int = 100) -> tuple[Support, Tensor]:
    r"""Return values and weights that give the expectations of *products* of scores.

    Where scores are quadratic in Gaussian latents their products have degree 4. The rule of degree 5 with
    $2D^2+1$ nodes, of D coordinates per datum, is exact for these.

    Source: McNamee and Stenger 1967, "Construction of fully symmetric numerical integration formulas".
    """
    if not isinstance(posterior, GaussianPosterior | QuadraturePosterior):
        support = posterior.support(num_particles)
        return support, support.log_weights.exp()
    joint = posterior.joint
    in_one_block = not joint.plates and any(latent.frames for latent in joint.locals)
    if joint.commons or not joint.separable or in_one_block:
        fail(
            StepError,
            "Louis's formula",
            "take the posterior covariance of the scores",
            got="latents that depend on each other across the data",
            because="scores are taken datum by datum, and the data are independent only given these latents",
            fix='Write standard_errors(fit, ..., method="hessian").',
        )
    if isinstance(posterior, QuadraturePosterior):
        posterior.require_products("take the posterior covariance of the scores")
        support = posterior.support()
        return support, support.weights
    noise, weights = _degree_five(posterior.mean.local.shape[-1], posterior.mean.local)
    values = posterior.values_of(noise)
    first, nesting = joint.locals[0], joint.nesting
    weights = weights.reshape(-1, *(1,) * nesting)
    return Support(values, weights.abs().log(), nesting, first.scale, first.mask), weights


def _degree_five(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes ``(2 D^2 + 1, D)`` and weights of a standard normal."""
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    i, j = torch.triu_indices(size, size, 1)
    plus, minus = eye[i] + eye[j], eye[i] - eye[j]
    far, near = math.sqrt(size + 2), math.sqrt((size + 2) / 2)
    nodes = [eye[:1] * 0, far * eye, -far * eye, near * plus, -near * plus, near * minus, -near * minus]
    axis, pair = (4 - size) / (2 * (size + 2) ** 2), 1 / (size + 2) ** 2
    weights = [2 / (size + 2)] + [axis] * (2 * size) + [pair] * (4 * len(i))
    return torch.cat(nodes), like.new_tensor(weights)


def _units(support: Support, weights: Tensor) -> list[int]:
    """Return ``[S, *plates]`` with the sizes of the plates that all latents share, 1 for other plates."""
    values = support.values.values()
    sizes = [weights.shape[0]]
    for dim in range(1, support.num_plates + 1):
        shared = min(value.shape[dim] for value in values)
        sizes.append(max(shared, weights.shape[dim]))
    return sizes


def _scale(support: Support, units: list[int], like: Tensor) -> Tensor:
    scale = support.scale
    if not isinstance(scale, Tensor):
        return like.new_full((like.shape[1],), float(scale))
    scale = scale.reshape((1,) * (support.num_plates - scale.dim()) + scale.shape)
    return scale.expand(units[1:]).reshape(-1).to(like)


def _batch(posterior: Posterior) -> Any:
    batch = getattr(posterior, "batch", {})
    return getattr(batch, "indices", batch)


def _vectorizes(posterior: Posterior) -> bool:
    if isinstance(posterior, GaussianPosterior | ConjugatePosterior):
        return may_vectorize(posterior)
    if isinstance(posterior, GuidePosterior):
        return posterior._vectorize
    return getattr(posterior, "vectorize", True)


def _without_outer_plates(posterior: Posterior, support: Support) -> dict[str, Tensor]:
    """Return values without the outermost plate dims that a latent lacks, for runs one by one."""
    lacking = posterior.lacking if isinstance(posterior, SamplesPosterior) else {}
    return {n: v.reshape(len(v), *v.shape[1 + lacking.get(n, 0) :]) for n, v in support.values.items()}


def _draw_nothing(*args: Any, **kwargs: Any) -> None:
    """A guide for a model whose values are all given."""
