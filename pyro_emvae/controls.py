r"""Control variates with learned coefficients: the gradient by each leaf, with and without them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .estimators.base import Control, State
from .parameters import nodes_of
from .particles import Particles

__all__ = ["Known", "controlled", "leaves_of", "minus_coefficients", "moved", "stacked"]

WARM = 16


@dataclass(frozen=True)
class Known:
    """What is to be climbed, of which minus the gradient by each leaf is known."""

    leaves: list[Tensor]
    descent: list[Tensor]

    @property
    def tensor(self) -> Tensor:
        """A scalar zero that has this gradient."""
        return _Given.apply(len(self.leaves), *self.descent, *self.leaves)

    def by(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return minus the gradient by some leaves, where there is one."""
        known = {id(leaf): part for leaf, part in zip(self.leaves, self.descent, strict=True)}
        return {name: known[id(leaf)] for name, leaf in leaves.items() if id(leaf) in known}


class _Given(torch.autograd.Function):
    """A scalar zero, minus whose gradient by each leaf is given."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[:count])
        return tensors[-1].new_zeros(())

    @staticmethod
    def backward(ctx: Any, out: Tensor) -> tuple[Tensor | None, ...]:
        given, back = ctx.saved_tensors, -out
        return (None, *(None for _ in given), *(back * g for g in given))


def controlled(
    surrogate: Tensor,
    controls: Mapping[str, Mapping[str, Control]],
    particles: Particles,
    state: Mapping[str, State],
    following: dict[str, State],
    also: Known | None = None,
) -> tuple[Known, tuple[Tensor | None, ...]]:
    r"""Return the gradient of a surrogate with $\sum_l a_l c_l$ added; their moments are added to the states to follow.

    Args:
        surrogate: What is climbed, without controls.
        controls: The controls, by guide site and label.
        particles: The particles.
        state: The states by site, whose moments make the coefficients.
        following: The states of the next step.
        also: A known gradient by tensors on the way, to be added.

    Returns:
        The gradient by the leaves; and minus that without these controls by the tensors of `also`.
    """
    also = Known([], []) if also is None else also
    leaves = leaves_of(surrogate + also.tensor if also.leaves else surrogate, particles)
    names, tensors = list(leaves), list(leaves.values())
    roots, given = [surrogate, *also.leaves], [_filled(surrogate, -1.0), *also.descent]
    base = torch.autograd.grad(roots, [*tensors, *also.leaves], given, retain_graph=True, allow_unused=True)
    descent, rest = list(base[: len(tensors)]), base[len(tensors) :]
    for site, named in controls.items():
        for label, control in named.items():
            term = control.term.sum()
            if not term.requires_grad:  # a density without parameters
                continue
            share = _filled(term, -1 / particles.num_particles)
            found = torch.autograd.grad(term, tensors, share, retain_graph=True, allow_unused=True)
            parts = {i: part for i, part in enumerate(found) if part is not None}
            if not parts:
                continue
            keys = [f"{label}|{names[i]}" for i in parts]
            pairs = [(base[i], part) for i, part in parts.items()]
            new, coefficients = _learn(control, state.get(site, {}), keys, pairs)
            for (i, part), coefficient in zip(parts.items(), coefficients, strict=True):
                descent[i] = _plus(descent[i], part, coefficient)
            following.setdefault(site, {}).update(new)
    return Known(tensors, descent), rest


def _filled(like: Tensor, number: float) -> Tensor:
    return torch.full((), number, dtype=like.dtype, device=like.device)


def _learn(
    control: Control, old: State, keys: list[str], pairs: list[tuple[Tensor, Tensor]]
) -> tuple[State, tuple[Tensor, ...]]:
    """Return the next running moments of all parameter tensors, and their coefficients by the old ones.

    Args:
        keys: Under which the state has a tensor's moments: the covariance, and the square of the control's gradient.
        pairs: The gradient without controls, and the control's, by parameter tensor.
    """
    found = [_inner(one, part) for rest, part in pairs for one in (rest, part)]
    found = torch.stack(found[::2]), torch.stack(found[1::2])
    moments = stacked([old.get(key) for key in keys], found[0])
    minus = minus_coefficients(moments, control.decay, control.low, control.high)
    return dict(zip(keys, moved(moments, found, control.decay), strict=True)), minus.neg().unbind()


def stacked(old: list[Tensor | None], like: Tensor) -> Tensor:
    """Return running moments, one row each: the covariance, the control's square, and the weight of what was seen."""
    return torch.stack([like.new_zeros(3) if moments is None else moments for moments in old]).to(like)


def minus_coefficients(
    moments: Tensor, decay: float | Tensor, low: float = -math.inf, high: float = math.inf
) -> Tensor:
    """Return minus the coefficients by running moments: zero in the first 16 steps, or in half of what is kept.

    The ratio of two products of the same few draws may have no variance, or no mean.
    """
    covariance, square, weight = moments.unbind(1)
    seen = 1 - decay ** (WARM - 0.5)
    least = min(0.5, seen) if isinstance(decay, float) else seen.clamp(max=0.5)
    ratio = torch.nan_to_num(covariance / square, 0.0, 0.0, 0.0).clamp(-high, -low)
    return ratio * (weight >= least)


def moved(moments: Tensor, found: Sequence[Tensor], decay: float | Tensor) -> tuple[Tensor, ...]:
    """Return the next running moments, row by row; where a control is zero, as under a mask, nothing is learned.

    Args:
        found: The covariances, and the squares.
    """
    new = torch.stack([*found, torch.ones_like(found[0])], 1)
    new = moments.lerp(new, 1 - decay if isinstance(decay, float) else 1 - decay[:, None])
    return torch.where(found[1][:, None] > 0, new, moments).unbind()


def _inner(one: Tensor, two: Tensor) -> Tensor:
    """Return the inner product of two gradients."""
    return (one * two).sum() if one.is_sparse or two.is_sparse else torch.dot(one.flatten(), two.flatten())


def _plus(one: Tensor, two: Tensor, coefficient: Tensor) -> Tensor:
    sparse = one.is_sparse or two.is_sparse
    return one + coefficient * two if sparse else torch.addcmul(one, two, coefficient.to(two.dtype))


def leaves_of(surrogate: Tensor, particles: Particles) -> dict[str, Tensor]:
    """Return the leaves that a tensor was made from, by their names; without the values that stand for draws."""
    names = {id(leaf): name for params in particles.params.values() for name, leaf in params.items()}
    cut = {id(leaf) for run in particles.cuts for _, leaf in run} | {id(value) for value in particles.held}
    found: dict[str, Tensor] = {}
    for node in nodes_of([surrogate]):
        if (leaf := getattr(node, "variable", None)) is not None and id(leaf) not in cut:
            found[names.get(id(leaf), f"leaf_{len(found)}")] = leaf
    return found
