r"""Moves of Hamiltonian Monte Carlo: pure functions over tensors, one accept or reject per chain.

Positions are ``(*chains, D)``, log densities ``(*chains)``: chains are independent, so that a move of all of them costs
as many evaluations of the density as a move of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DualAveraging", "Move", "Point", "adapt", "hmc", "leapfrog", "metropolis", "start_averaging"]

GAMMA, KAPPA, DELAY = 0.05, 0.75, 10.0


class Point(NamedTuple):
    """Positions ``(*chains, D)``, their log densities ``(*chains)`` in nats and the slopes ``(*chains, D)``."""

    position: Tensor
    log_density: Tensor
    slope: Tensor


class Move(NamedTuple):
    """Where a move ended, and the probability ``(*chains)`` with which each chain accepted its proposal."""

    point: Point
    acceptance: Tensor


Density = Callable[[Tensor], tuple[Tensor, Tensor]]


def leapfrog(
    density: Density, point: Point, momentum: Tensor, step_size: Tensor, num_leapfrog: int
) -> tuple[Point, Tensor]:
    r"""Follow Hamilton's equations of unit mass: volume is kept, and the way back is the way with momentum reversed.

    $$r\leftarrow r+\tfrac\epsilon2\nabla\log p(u),\quad u\leftarrow u+\epsilon r,\quad
      r\leftarrow r+\tfrac\epsilon2\nabla\log p(u).$$

    Args:
        density: Returns log p and its slope at positions.
        point: The start; its slope is used, so that each step costs one evaluation.
        momentum: ``(*chains, D)``.
        step_size: ``(*chains)``, or broadcastable to it.
        num_leapfrog: Number of steps.

    Returns:
        The end, and the momentum there.

    Source: Neal 2011, "MCMC using Hamiltonian dynamics", section 2.3.

    Example:
        >>> def density(u): return -0.5 * u.square().sum(-1), -u
        >>> u = torch.tensor([[1.0]])
        >>> point, momentum = leapfrog(density, Point(u, *density(u)), torch.zeros(1, 1), torch.tensor(0.1), 5)
        >>> back, _ = leapfrog(density, point, -momentum, torch.tensor(0.1), 5)
        >>> f"{point.position.item():.3f} {back.position.item():.3f}"
        '0.877 1.000'
    """
    step = step_size.unsqueeze(-1)
    momentum = momentum + 0.5 * step * point.slope
    for left in reversed(range(num_leapfrog)):
        position = point.position + step * momentum
        point = Point(position, *density(position))
        momentum = momentum + (step if left else 0.5 * step) * point.slope
    return point, momentum


def metropolis(old: Point, new: Point, log_ratio: Tensor) -> Move:
    r"""Accept each chain's proposal with probability $\min(1,e^{\mathrm{log\_ratio}})$; NaN is rejected.

    Args:
        old, new: Positions before and after.
        log_ratio: ``(*chains)``, nats.

    Example:
        >>> old, new = Point(torch.zeros(2, 1), *torch.zeros(2, 2)), Point(torch.ones(2, 1), *torch.zeros(2, 2))
        >>> metropolis(old, new, torch.tensor([0.0, float("nan")])).point.position.flatten()
        tensor([1., 0.])
    """
    acceptance = log_ratio.nan_to_num(nan=-math.inf, neginf=-math.inf).clamp(max=0.0).exp()
    accepted = torch.rand_like(acceptance) < acceptance
    pairs = zip(new, old, strict=True)
    return Move(Point(*(_where(accepted, one, other) for one, other in pairs)), acceptance)


def _where(accepted: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(accepted.unsqueeze(-1) if new.dim() > accepted.dim() else accepted, new, old)


def hmc(density: Density, point: Point, step_size: Tensor, num_leapfrog: int, jitter: float = 0.2) -> Move:
    r"""Draw a momentum, take leapfrog steps, accept or reject each chain by itself.

    $$a=\min\big(1,\,e^{H(u,r)-H(u',r')}\big),\qquad H(u,r)=-\log p(u)+\tfrac12 r^\top r.$$

    Leaves the density invariant, whatever the step size.

    Args:
        density: Returns log p ``(*chains)`` and its slope at positions ``(*chains, D)``.
        point: Where the chains are.
        step_size: ``(*chains)``, or broadcastable to it.
        num_leapfrog: Steps; one evaluation of the density each.
        jitter: Each chain's step size is uniform within this share around `step_size`, against trajectories that
            return to where they began.

    Source: Duane et al. 1987; Neal 2011, section 3.2 for the jitter.

    Example:
        >>> def density(u): return -0.5 * u.square().sum(-1), -u
        >>> _ = torch.manual_seed(0)
        >>> u = torch.zeros(4, 3)
        >>> move = hmc(density, Point(u, *density(u)), torch.tensor(0.3), 5)
        >>> move.acceptance.shape, bool((move.acceptance > 0.9).all())
        (torch.Size([4]), True)
    """
    momentum = torch.randn_like(point.position)
    step_size = step_size * (1 + jitter * (2 * torch.rand_like(point.log_density) - 1))
    new, end = leapfrog(density, point, momentum, step_size, num_leapfrog)
    kinetic = 0.5 * (momentum.square() - end.square()).sum(-1)
    return metropolis(point, new, new.log_density - point.log_density + kinetic)


class DualAveraging(NamedTuple):
    r"""Nesterov's dual averaging of log step sizes, one for each unit: all ``(*units)``.

    Args:
        log_step: The step size to use while it is being adapted.
        log_average: The average that the sequence converges to, to be used afterwards.
        error: Running mean of target minus acceptance.
        count: Updates made.
        anchor: What log_step is drawn to, $\log10\epsilon_0$.
    """

    log_step: Tensor
    log_average: Tensor
    error: Tensor
    count: Tensor
    anchor: Tensor


def start_averaging(step_size: Tensor) -> DualAveraging:
    """Return the state before the first update, at a first guess of the step sizes."""
    log_step, zero = step_size.log(), torch.zeros_like(step_size)
    return DualAveraging(log_step, log_step, zero, zero, log_step + math.log(10.0))


def adapt(state: DualAveraging, acceptance: Tensor, target: float) -> DualAveraging:
    r"""Move log step sizes so that the acceptance comes to the target.

    $$\bar h\leftarrow\Big(1-\tfrac1{t+t_0}\Big)\bar h+\tfrac{\delta-a}{t+t_0},\quad
      \log\epsilon=\mu-\tfrac{\sqrt t}\gamma\bar h,\quad
      \overline{\log\epsilon}\leftarrow t^{-\kappa}\log\epsilon+(1-t^{-\kappa})\overline{\log\epsilon}.$$

    Args:
        state: As returned before.
        acceptance: Mean acceptance probability of each unit's chains: ``(*units)``.
        target: The acceptance that is wanted, delta.

    The gain vanishes with the count t, so that chains adapted for ever still converge.

    Source: Hoffman and Gelman 2014, "The no-U-turn sampler", section 3.2.1, with their constants.

    Example:
        >>> state = start_averaging(torch.ones(1))
        >>> for _ in range(500):
        ...     state = adapt(state, (-state.log_step.exp()).exp(), target=0.8)
        >>> f"{state.log_average.exp().item():.2f}"
        '0.23'
    """
    count = state.count + 1
    gain = 1 / (count + DELAY)
    error = (1 - gain) * state.error + gain * (target - acceptance)
    log_step = state.anchor - count.sqrt() / GAMMA * error
    share = count**-KAPPA
    return DualAveraging(log_step, share * log_step + (1 - share) * state.log_average, error, count, state.anchor)
