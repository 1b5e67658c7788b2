r"""One evaluation of a loss: what is reported, what is climbed, and the estimators' next state."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .controls import Known, leaves_of
from .particles import Particles
from .sticking import Sticking
from .surrogate import States

__all__ = ["Evaluation"]


@dataclass(frozen=True)
class Evaluation:
    """The objective, what is climbed, the particles, and the estimators' states.

    Args:
        objective: Scalar, nats.
        climbed: A scalar whose gradient is the estimate, or that gradient where it is known already.
        particles: The particles.
        states: The next states of all estimators but those whose controls are in `sticking`.
        sticking: Controls whose moments are found with the gradient.
    """

    objective: Tensor
    climbed: Tensor | Known = field(repr=False)
    particles: Particles = field(repr=False)
    states: States = field(repr=False)
    sticking: Sticking | None = field(default=None, repr=False)

    @property
    def surrogate(self) -> Tensor:
        """A scalar to be *maximised*; its value is of no meaning."""
        self.state  # noqa: B018  (while there is a graph)
        return self._tensor

    @functools.cached_property
    def _tensor(self) -> Tensor:
        if isinstance(self.climbed, Known):
            return self.climbed.tensor
        return self.climbed + self._controls.tensor if self._controls.leaves else self.climbed

    @property
    def _controls(self) -> Known:
        """What is climbed besides, by tensors on the way from the leaves."""
        return Known([], []) if self.sticking is None else self.sticking.known

    @functools.cached_property
    def state(self) -> States:
        """The estimators' next state; a gradient is taken to learn of, unless one has been."""
        found = self._grad(self._controls.leaves, retain_graph=True) if self._controls.leaves else None
        return self._followed(found)

    def _followed(self, descent: Sequence[Tensor | None] | None) -> States:
        if self.sticking is None:
            return self.states
        return {**self.states, **(self.sticking.old if descent is None else self.sticking.follow(descent))}

    def _grad(self, tensors: list[Tensor], retain_graph: bool | None = None) -> tuple[Tensor | None, ...]:
        """Return minus the gradient, that of the controls included."""
        roots, given = list(self._controls.leaves), list(self._controls.descent)
        if self.climbed.requires_grad:
            roots, given = [-self.climbed, *roots], [None, *given]
        return torch.autograd.grad(roots, tensors, given, retain_graph=retain_graph, allow_unused=True)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The leaves that there is a gradient by."""
        return leaves_of(self._tensor, self.particles)

    def descent(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return minus the gradient by some leaves, where there is one; once."""
        if isinstance(self.climbed, Known):
            return self.climbed.by(leaves)
        if not leaves or not (self.climbed.requires_grad or self._controls.leaves):
            return {}
        watched = self._controls.leaves if self._is_guided(leaves) else []
        found = self._grad([*leaves.values(), *watched])
        vars(self).setdefault("state", self._followed(found[len(leaves) :] if watched else None))
        return {name: g for name, g in zip(leaves, found, strict=False) if g is not None}

    def _is_guided(self, leaves: Mapping[str, Tensor]) -> bool:
        """Whether any leaf is not the model's alone."""
        ids = {side: {id(leaf) for leaf in params.values()} for side, params in self.particles.params.items()}
        return any(id(leaf) in ids["guide"] or id(leaf) not in ids["model"] for leaf in leaves.values())

    def backward(self, retain_graph: bool | None = None) -> None:
        """Add minus the gradient to ``.grad`` of the leaves."""
        if not self._tensor.requires_grad:
            return
        watched = self._controls.leaves
        found: list[Tensor | None] = [None] * len(watched)
        hooks = [tensor.register_hook(functools.partial(found.__setitem__, i)) for i, tensor in enumerate(watched)]
        try:
            (-self._tensor).backward(retain_graph=retain_graph)
        finally:
            for hook in hooks:
                hook.remove()
        vars(self).setdefault("state", self._followed(found if watched else None))
