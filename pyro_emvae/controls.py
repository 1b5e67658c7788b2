r"""Control variates with learned coefficients: the gradient by each leaf, with and without them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .estimators.base import Control, State
from .particles import Particles

__all__ = ["Known", "controlled", "leaves_of"]


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
        given = ctx.saved_tensors
        return (None, *(None for _ in given), *(-out * g for g in given))


def controlled(
    surrogate: Tensor,
    controls: Mapping[str, Mapping[str, Control]],
    particles: Particles,
    state: Mapping[str, State],
    following: dict[str, State],
) -> Known:
    r"""Return the gradient of a surrogate with $\sum_l a_l c_l$ added; their moments are added to the states to follow.

    Args:
        surrogate: What is climbed, without controls.
        controls: The controls, by guide site and label.
        particles: The particles.
        state: The states by site, whose moments make the coefficients.
        following: The states of the next step.
    """
    leaves = leaves_of(surrogate, particles)
    names, tensors = list(leaves), list(leaves.values())
    base = torch.autograd.grad(surrogate, tensors, _filled(surrogate, -1.0), retain_graph=True)
    descent = list(base)
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
    return Known(tensors, descent)


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
    found = torch.stack([_inner(one, part) for rest, part in pairs for one in (rest, part)]).reshape(-1, 2)
    moments = torch.stack([old.get(key, torch.zeros_like(found[0])) for key in keys]).to(found)
    covariance, square = moments.unbind(1)
    coefficients = torch.nan_to_num(covariance / square, 0.0, 0.0, 0.0).clamp(-control.high, -control.low).neg()
    return dict(zip(keys, moments.lerp(found, 1 - control.decay).unbind(), strict=True)), coefficients.unbind()


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
    seen: set[Any] = set()  # of nodes, so that none is freed and its id used again
    found: dict[str, Tensor] = {}
    stack = [surrogate.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        parents = node.next_functions
        if not parents and (leaf := getattr(node, "variable", None)) is not None and id(leaf) not in cut:
            found[names.get(id(leaf), f"leaf_{len(found)}")] = leaf
        stack.extend([parent for parent, _ in parents])
    return found
