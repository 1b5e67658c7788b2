r"""The score-function gradient with a baseline that a network predicts from the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._checks import EstimatorError, fail
from .._registry import Traits, register
from ..particles import Particles
from .base import SiteTerms, State
from .score import ScoreFunction

__all__ = ["NeuralBaseline"]

RATE = 0.05  # of the running mean and variance of the signal


@dataclass(frozen=True)
class NeuralBaseline(ScoreFunction):
    r"""Score-function gradient with a baseline predicted from the data (NVIL).

    $$\hat g=\tfrac1K\sum_k (f_k-b_\psi(x))\,\nabla_\phi\log q_\phi(z_k),\qquad
      b_\psi(x)=m+s\,h_\psi(x),$$

    with the running mean m and standard deviation s of earlier signals. The network h is fitted to
    $(f-m)/s$ by least squares, one step of RMSprop after each gradient, so that the baseline of a step knows earlier
    draws only: the gradient is unbiased. When to use: one particle, a site without ``rsample``, and data that say how
    large f will be. Cost: as `Score`, and the network.

    Args:
        network: A module from features ``(..., num_features)`` to ``(..., 1)``; by default one hidden layer of 32 tanh
            units, which starts at 0. It is a template: its parameters are copied into ``loss.state`` and trained there.
        inputs: A function of the `Particles` that returns the features, ``(particles or 1, *plates, num_features)``. It
            must not look at the site's own draw or at what lies downstream. By default the observed values in the
            site's plates, further plates and event dims flattened.
        learning_rate: Of RMSprop.

    Source: Mnih and Gregor 2014, "Neural variational inference and learning in belief networks", sections 2.3 to 2.5.
    Differs: the signal is not divided by its running standard deviation, which would scale the gradient.

    Example:
        >>> NeuralBaseline(learning_rate=1e-3).traits.stateful
        True
    """

    network: nn.Module | None = field(default=None, repr=False)
    inputs: Callable[[Particles], Tensor] | None = field(default=None, repr=False)
    learning_rate: float = 1e-2
    traits: ClassVar[Traits] = Traits(stateful=True, objectives=("any",), higher_order=True)

    def __post_init__(self) -> None:
        if not 0.0 < self.learning_rate < math.inf:
            fail(
                EstimatorError,
                "NeuralBaseline",
                "train its network",
                got=f"learning_rate={self.learning_rate}",
                because="a learning rate is positive and finite",
                fix="Write learning_rate=0.01.",
            )

    def init(self, site: SiteTerms, signal: Tensor | None) -> State:
        params = _default(self._features(site)) if self.network is None else dict(self.network.named_parameters())
        zero = torch.zeros_like(signal.sum())
        network = {f"network|{name}": p.detach().clone() for name, p in params.items()}
        average = torch.cat([torch.zeros_like(p).flatten() for p in params.values()])
        return {"mean": zero, "square": zero, "weight": zero, "average": average, **network}

    def advantage(self, site: SiteTerms, signal: Tensor, rows: int, state: State) -> Tensor:
        fit = self._fit(site, signal, state)
        return fit.residual * fit.scale

    def update(self, site: SiteTerms, signal: Tensor | None, state: State) -> State:
        fit = self._fit(site, signal, state)
        by_output = (fit.residual * (-2 / fit.residual.numel())).sum_to_size(fit.output.shape)  # of the mean square
        grads = torch.autograd.grad(fit.output, list(fit.params.values()), by_output.to(fit.output))
        grad = torch.cat([g.flatten() for g in grads])
        average = state["average"].lerp(grad * grad, 0.01)
        step = self.learning_rate * grad / (average.sqrt() + 1e-8)  # RMSprop
        moves = step.split([p.numel() for p in fit.params.values()])
        moved = {f"network|{n}": p.detach() - m.view_as(p) for (n, p), m in zip(fit.params.items(), moves, strict=True)}
        return moved | {
            "mean": torch.lerp(state["mean"], signal.mean(), RATE),
            "square": torch.lerp(state["square"], (signal * signal).mean(), RATE),
            "weight": state["weight"] * (1 - RATE) + RATE,
            "average": average,
        }

    def _fit(self, site: SiteTerms, signal: Tensor, state: State) -> Fit:
        return site.once("fit", state, lambda: self._find(site, signal, state))

    def _find(self, site: SiteTerms, signal: Tensor, state: State) -> Fit:
        mean, scale = _moments(state)
        params = {name: p.detach().requires_grad_() for name, p in _network(state).items()}
        with torch.enable_grad():
            output = self._predict(site, params)
        return Fit(params, output, (signal - mean) / scale - output.detach().to(signal), scale)

    def _predict(self, site: SiteTerms, params: dict[str, Tensor]) -> Tensor:
        features = self._features(site)
        if self.network is None:
            hidden = torch.tanh(features @ params["first"] + params["bias"])
            return hidden @ params["last"]
        out = functional_call(self.network, params, (features,))
        if out.shape != (*features.shape[:-1], 1):
            fail(
                EstimatorError,
                "NeuralBaseline",
                f"predict the signal of site {site.name!r}",
                got=f"an output of shape {tuple(out.shape)} from features of shape {tuple(features.shape)}",
                because="there is one baseline per particle and element of the site's plates",
                fix=f"Let the network return shape {(*features.shape[:-1], 1)}.",
            )
        return out.squeeze(-1)

    def _features(self, site: SiteTerms) -> Tensor:
        if self.inputs is not None:
            return self.inputs(site.particles)
        return _observed(site)


class Fit(NamedTuple):
    """The network's parameters and output, with the path between them; what is left of the signal, and its scale."""

    params: dict[str, Tensor]
    output: Tensor
    residual: Tensor
    scale: Tensor


def _observed(site: SiteTerms) -> Tensor:
    """Return the observed values in the site's plates, a row of features per element; a constant if there are none."""
    particles = site.particles
    nesting, sizes = particles.max_plate_nesting, {f.dim: f.size for f in particles.guide[site.name].frames}
    columns = []
    for other in particles.observed.values():
        if sizes.keys() <= {frame.dim for frame in other.frames} and isinstance(other.value, Tensor):
            value = other.value.detach().to(site.log_q)
            value = value.reshape((1,) * (nesting + 1 + other.fn.event_dim - value.dim()) + value.shape)
            value = value.expand(-1, *[sizes.get(dim, -1) for dim in range(-nesting, 0)], *[-1] * other.fn.event_dim)
            own = [0, *(nesting + 1 + dim for dim in range(-nesting, 0) if dim in sizes)]
            rest = [dim for dim in range(value.dim()) if dim not in own]
            plates = [sizes.get(dim, 1) for dim in range(-nesting, 0)]
            columns.append(value.permute(*own, *rest).reshape(len(value), *plates, -1))
    rows = max(map(len, columns), default=1)
    columns = [column.expand(rows, *column.shape[1:]) for column in columns]
    if len(columns) == 1:
        return columns[0]
    return torch.cat(columns, -1) if columns else site.log_q.new_ones(1, *(1,) * nesting, 1)


def _default(features: Tensor) -> dict[str, Tensor]:
    """Return a hidden layer of 32 units whose output is 0, without a draw from any generator in use."""
    count = features.shape[-1]
    normal = np.random.default_rng(0).standard_normal((count, 32)) / math.sqrt(count)
    first = torch.from_numpy(normal).to(features)
    return {"first": first, "bias": first.new_zeros(32), "last": first.new_zeros(32)}


def _network(state: State) -> dict[str, Tensor]:
    return {key.removeprefix("network|"): value for key, value in state.items() if key.startswith("network|")}


def _moments(state: State) -> tuple[Tensor, Tensor]:
    """Return the running mean and standard deviation of earlier signals; 0 and 1 before there are any."""
    weight = state["weight"].clamp(min=RATE)
    mean = state["mean"] / weight
    variance = state["square"] / weight - mean * mean
    return mean, torch.where(variance > 0, variance, torch.ones_like(variance)).sqrt()


register(
    "estimator",
    "neural_baseline",
    NeuralBaseline,
    aliases=("nvil",),
    summary="score function minus a network's prediction from the data",
    source="Mnih & Gregor 2014",
)
