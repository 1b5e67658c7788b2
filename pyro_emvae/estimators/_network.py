r"""The network of `Relax`, written out with its derivatives, and the step that moves it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import State

__all__ = ["NETWORK", "Network", "adam", "moments_of"]

NETWORK = ("weight_in", "bias_in", "weight_out")


@dataclass(frozen=True)
class Network:
    r"""$r(z)=w^\top\tanh(W^\top\tanh(z/2)+b)$ over the elements of an event, written out with its derivatives.

    Args:
        weights: W, b and w, by their names in the state.
        inputs: $\tanh(z/2)$ of both draws: ``(2, particles?, *plates, elements)``.
        units: Their hidden units: ``(2, particles?, *plates, hidden)``.
        shape: That of both draws.
    """

    weights: State
    inputs: Tensor
    units: Tensor
    shape: torch.Size

    @classmethod
    def at(cls, z: Tensor, event_dim: int, state: State) -> Network:
        inputs = (0.5 * z).tanh().reshape(*z.shape[: z.dim() - event_dim], -1)
        weights = {name: state[name].detach() for name in NETWORK}
        units = nn.functional.linear(inputs, weights["weight_in"].mT, weights["bias_in"]).tanh()
        return cls(weights, inputs, units, z.shape)

    @property
    def value(self) -> Tensor:
        """r at the second draw, ``(particles?, *plates)``."""
        return self.units[1] @ self.weights["weight_out"]

    @property
    def slope(self) -> Tensor:
        """The derivative of r by both draws, in their shape."""
        return (self.weighted @ self.weights["weight_in"].mT * self.spread).reshape(self.shape)

    @functools.cached_property
    def weighted(self) -> Tensor:
        """The derivative of r by what goes into the units."""
        return self.bends * self.weights["weight_out"]

    @functools.cached_property
    def bends(self) -> Tensor:
        """The derivative of the units by what goes into them."""
        return 1 - self.units * self.units

    @functools.cached_property
    def spread(self) -> Tensor:
        """The derivative of the inputs by z."""
        return 0.5 * (1 - self.inputs * self.inputs)

    def by_weights(self, by_value: Tensor, by_slope: Tensor) -> State:
        """Return the derivative by the weights of something, given its derivatives by `value` and by `slope`."""
        size = len(self.weights["weight_out"])
        into = by_slope.reshape(self.inputs.shape) * self.spread
        by_bends = into @ self.weights["weight_in"]
        by_sum = -2 * self.units * self.weighted * by_bends
        by_value = by_value.reshape(*by_sum.shape[1:-1], 1)
        by_sum = torch.stack([by_sum[0], torch.addcmul(by_sum[1], by_value, self.weighted[1])])
        wide, rows = (-1, self.inputs.shape[-1]), by_sum.reshape(-1, size)
        return {
            "weight_in": torch.addmm(
                self.inputs.reshape(wide).mT @ rows, into.reshape(wide).mT, self.weighted.reshape(-1, size)
            ),
            "bias_in": rows.sum(0),
            "weight_out": (by_bends * self.bends).reshape(-1, size).sum(0)
            + (self.units[1] * by_value).reshape(-1, size).sum(0),
        }


def moments_of(params: list[Tensor]) -> State:
    """Return Adam's state before the first step, of all parameters in one vector."""
    zero = torch.cat([torch.zeros_like(p).flatten() for p in params])
    return {"mean": zero, "square": zero, "count": zero[0]}


def adam(state: State, grads: Mapping[str, Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> State:
    """Return parameters and moments after one step of Adam (Kingma and Ba 2015)."""
    count = state["count"] + 1
    grad = torch.cat([g.flatten() for g in grads.values()])
    mean = state["mean"].lerp(grad, 1 - betas[0])
    square = state["square"].lerp(grad * grad, 1 - betas[1])
    seen = [-torch.expm1(count * math.log(beta)) for beta in betas]
    step = lr * mean / seen[0] / ((square / seen[1]).sqrt() + 1e-8)
    moves = step.split([g.numel() for g in grads.values()])
    moved = {name: state[name] - move.view_as(state[name]) for name, move in zip(grads, moves, strict=True)}
    return moved | {"count": count, "mean": mean, "square": square}
