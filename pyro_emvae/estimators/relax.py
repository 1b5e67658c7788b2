r"""Score function with a control variate made from the relaxed Bernoulli draw: `Rebar` and `Relax`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .._checks import EstimatorError, fail
from .._registry import Traits, register
from ._network import NETWORK, Network, adam, moments_of
from .base import Estimator, SiteTerms, State
from .bernoulli import element_logits, lift, summed
from .relaxed import outwards

__all__ = ["Rebar", "Relax"]

DECAY = 0.95  # of the running moments that the control variate's coefficient is learned from


@dataclass(frozen=True)
class Rebar(Estimator):
    r"""Score function minus a reparameterised control variate: the model at a relaxed draw (REBAR).

    $$\hat g=\big(f(b)-\eta c(\tilde z)\big)(b-p)+\eta\nabla_\varphi c(z)-\eta\nabla_\varphi c(\tilde z)
      \quad\text{by the logit }\varphi,\qquad c(z)=f(\sigma(z/\lambda)),$$

    with $z=\varphi+\mathrm{logit}(u)$, $b=1[z>0]$ and $\tilde z$ a second draw of z given b. The coefficient $\eta$, 1
    at first and between 0 and 2, has the least variance by the logits, by moments of earlier steps. The temperature is
    moved by stochastic gradients of that variance, $\nabla_\lambda|\hat g|^2$, with the estimator's own rate and Adam.

    When to use: Bernoulli sites of a model that is smooth in their values, with one particle or more; logits may
    depend on other draws. Unbiased. Cost: 5K model evaluations: the draws, and two relaxed values each that are
    differentiated twice, by the values and for the temperature; 3K with ``lr=0``.

    Args:
        temperature: $\lambda$ at first.
        lr: Learning rate of $\log\lambda$; 0 leaves it.

    Raises:
        EstimatorError: A model that cannot take values between 0 and 1 (it indexes by them, compares them, or raises);
            a guide site downstream without ``rsample``, through which no derivative passes.

    Source: Tucker et al. 2017, "REBAR: low-variance, unbiased gradient estimates for discrete latent variable models".
    Differs: z is drawn given b, the coefficient is by lagged moments, the variance is that by the logits.

    Example:
        >>> Rebar(lr=0.0).traits.probes, Rebar().traits.probes
        ('differentiable', 'twice')
    """

    temperature: float = 0.5
    lr: float = 0.01

    def __post_init__(self) -> None:
        _require(self, "temperature", self.temperature > 0, "a temperature is positive")
        _require(self, "lr", self.lr >= 0, "a learning rate is zero or positive")

    @functools.cached_property
    def traits(self) -> Traits:  # type: ignore[override]
        return _twice(self.lr > 0)

    def noise(self, site: SiteTerms) -> tuple[int, ...] | None:
        return (2, *site.value.shape)

    def init(self, site: SiteTerms, signal: Tensor | None) -> State:
        start = torch.full_like(signal.sum(), self.temperature).log()
        return {"log_temperature": start, "products": start.new_zeros(2), **moments_of([start])}

    def probes(self, site: SiteTerms, rows: int, state: State) -> Tensor | None:
        return values_of(site, state).x

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Any]:
        return _surrogate(site, self._parts(site, signal, state))

    def update(self, site: SiteTerms, signal: Tensor | None, state: State) -> State:
        parts = self._parts(site, signal, state)
        new = state | {"products": parts.products(state)}
        if not self.lr:
            return new
        return new | adam(state, {"log_temperature": _by_temperature(site, parts.slopes(site), state)}, self.lr)

    def _parts(self, site: SiteTerms, signal: Tensor, state: State) -> Parts:
        return site.once("parts", state, lambda: _parts(site, signal, *_model(site, state), state))


@dataclass(frozen=True)
class Relax(Estimator):
    r"""Score function minus a learned control variate of the relaxed draw (RELAX).

    $$\hat g=\big(f(b)-\eta c(\tilde z)\big)(b-p)+\eta\nabla_\varphi c(z)-\eta\nabla_\varphi c(\tilde z),\qquad
      c(z)=f(\sigma(z/\lambda))+r_\rho(z)+\bar f,$$

    as `Rebar`, with r a network of one layer of ``tanh`` units over the elements of the event, and $\bar f$ an average
    of what was left of earlier signals. $\rho$ and $\lambda$ are moved by stochastic gradients of the variance by the
    logits, $\nabla_\rho|\hat g|^2$, and live in the estimator's state, with their own learning rate and Adam. r is 0 at
    first.

    When to use: as `Rebar`; with ``model=False`` the model is never run at relaxed values, so that it may index by
    them. Unbiased. Cost: that of `Rebar`, or K model evaluations with ``model=False``.

    Args:
        hidden: Number of units.
        temperature: $\lambda$ at first.
        lr: Learning rate of network and temperature; 0 leaves them.
        model: Whether c has the model's part $f(\sigma(z/\lambda))$.

    Raises:
        EstimatorError: As `Rebar`, unless ``model=False``.

    Source: Grathwohl et al. 2018, "Backpropagation through the void". Differs: as `Rebar`; the
    average; the network starts from fixed numbers, so that no generator moves.

    Example:
        >>> Relax(model=False).traits.probes
        'no'
    """

    hidden: int = 10
    temperature: float = 0.5
    lr: float = 0.01
    model: bool = True
    beta: ClassVar[float] = 0.9

    def __post_init__(self) -> None:
        _require(self, "hidden", self.hidden >= 1, "the network has units")
        _require(self, "temperature", self.temperature > 0, "a temperature is positive")
        _require(self, "lr", self.lr >= 0, "a learning rate is zero or positive")

    @functools.cached_property
    def traits(self) -> Traits:  # type: ignore[override]
        return _twice(self.lr > 0, self.model)

    @property
    def _names(self) -> tuple[str, ...]:
        return ("log_temperature",) * self.model + NETWORK

    def noise(self, site: SiteTerms) -> tuple[int, ...] | None:
        return (2, *site.value.shape)

    def init(self, site: SiteTerms, signal: Tensor | None) -> State:
        zero, width = torch.zeros_like(signal.sum()), max(1, site.fn.event_shape.numel())
        # multiples of the golden ratio spread evenly and need no generator
        spread = torch.arange(1.0, (width + 1) * self.hidden + 1, dtype=zero.dtype, device=zero.device)
        spread = (2 * (spread * 0.6180339887498949 % 1) - 1) / width**0.5
        weights = {
            "log_temperature": zero + torch.full_like(zero, self.temperature).log(),
            "weight_in": spread[self.hidden :].reshape(width, self.hidden),
            "bias_in": spread[: self.hidden],
            "weight_out": torch.zeros_like(spread[: self.hidden]),
        }
        averages = {"average": zero, "seen": zero, "products": zero.new_zeros(2)}
        return {**weights, **moments_of([weights[n] for n in self._names]), **averages}

    def probes(self, site: SiteTerms, rows: int, state: State) -> Tensor | None:
        return values_of(site, state).x if self.model else None

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Any]:
        return _surrogate(site, self._parts(site, signal, state)[0])

    def update(self, site: SiteTerms, signal: Tensor | None, state: State) -> State:
        parts, network = self._parts(site, signal, state)
        average = state["average"].lerp((signal - parts.c).mean() + self._average(site, state), 1 - self.beta)
        seen = self.beta * state["seen"] + (1 - self.beta)
        new = state | {"average": average, "seen": seen, "products": parts.products(state)}
        if not self.lr:
            return new
        slopes = parts.slopes(site)
        grads = network.by_weights(*slopes)
        if self.model:
            grads = {"log_temperature": _by_temperature(site, slopes, state), **grads}
        return new | adam(state, grads, self.lr)

    def _parts(self, site: SiteTerms, signal: Tensor, state: State) -> tuple[Parts, Network]:
        return site.once("parts", state, lambda: self._find(site, signal, state))

    def _find(self, site: SiteTerms, signal: Tensor, state: State) -> tuple[Parts, Network]:
        draws = relaxed(site)
        network = Network.at(draws.z, site.fn.event_dim, state)
        c, slope = network.value + self._average(site, state), network.slope
        if self.model:
            model_c, model_slope = _model(site, state)
            c, slope = c + model_c, slope + model_slope
        return _parts(site, signal, c, slope, state), network

    def _average(self, site: SiteTerms, state: State) -> Tensor:
        return site.once("average", state, lambda: state["average"] / state["seen"].clamp(min=1 - self.beta))


class Draws(NamedTuple):
    r"""Two draws of z given b, ``(2, *value.shape)``, the derivative of the second by the logits, and b - p.

    The first is z itself, whose derivative is 1; the second $\tilde z$, whose path keeps b.
    """

    z: Tensor
    slope: Tensor
    residual: Tensor


class Values(NamedTuple):
    r"""Relaxed values $x=\sigma(z/\lambda)$ of both draws, $z/\lambda$, and $x(1-x)/\lambda$, the derivative by z."""

    x: Tensor
    scaled: Tensor
    slope: Tensor


def relaxed(site: SiteTerms) -> Draws:
    """Return the draws of z that the site's uniform numbers stand for."""
    return site.once("draws", None, lambda: _relaxed(element_logits(site).detach(), site.value.detach(), site.noise))


def _relaxed(logits: Tensor, value: Tensor, noise: Tensor) -> Draws:
    sign = 2 * value - 1
    up, one, other = outwards(sign * logits)
    moved = other * noise
    top = one + moved
    z = sign * (up + (top / (1 - noise)).log())
    return Draws(z, moved[1] / top[1], value - logits.sigmoid())


def values_of(site: SiteTerms, state: State) -> Values:
    """Return the relaxed values at the state's temperature."""
    return site.once("values", state, lambda: _values(relaxed(site).z, state["log_temperature"].exp()))


def _values(z: Tensor, temperature: Tensor) -> Values:
    scaled = z / temperature
    x = scaled.sigmoid()
    return Values(x, scaled, (x - x * x) / temperature)


class Parts(NamedTuple):
    """Gradients by each logit: of the score, of the control variate, of both together; and c at the second draw."""

    draws: Draws
    score: Tensor
    control: Tensor
    coefficient: Tensor
    gradient: Tensor
    c: Tensor

    def slopes(self, site: SiteTerms) -> tuple[Tensor, Tensor]:
        """Return the derivatives of the squared gradient by c and by its slopes."""
        twice = 2 * self.coefficient * self.gradient
        return -summed(twice * self.draws.residual, site.fn), torch.stack([twice, -twice * self.draws.slope])

    def products(self, state: State) -> Tensor:
        """Return the running products of the control variate with the score, and with itself."""
        score, control = self.score.flatten(), self.control.flatten()
        return state["products"].lerp(torch.stack([torch.dot(score, control), torch.dot(control, control)]), 1 - DECAY)


def _parts(site: SiteTerms, signal: Tensor, c: Tensor, slope: Tensor, state: State) -> Parts:
    draws = relaxed(site)
    score, baseline = ((lift(f, site.fn) * draws.residual).reshape(draws.residual.shape) for f in (signal, c))
    control = slope[0] - slope[1] * draws.slope - baseline
    with_score, with_itself = state["products"].unbind()
    coefficient = torch.nan_to_num(-with_score / with_itself, 1.0, 1.0, 1.0).clamp(0.0, 2.0)
    return Parts(draws, score, control, coefficient, torch.addcmul(score, coefficient, control), c)


def _model(site: SiteTerms, state: State) -> tuple[Tensor, Tensor]:
    r"""Return $f(\sigma(z/\lambda))$ at the second draw, and its derivative by both draws."""
    return site.probed.signal[1].detach(), site.probed.gradient.detach() * values_of(site, state).slope


def _by_temperature(site: SiteTerms, slopes: tuple[Tensor, Tensor], state: State) -> Tensor:
    r"""Return the derivative of the squared gradient by $\log\lambda$, which moves the relaxed values x.

    With $s=x(1-x)/\lambda$, x moves by $-sz$ and s by $-s(1+(1-2x)z/\lambda)$.

    Args:
        slopes: The derivatives of the squared gradient by c and by its slopes.
    """
    (x, scaled, s), z, (by_c, by_slope) = values_of(site, state), relaxed(site).z, slopes
    gradient, held = site.probed.gradient, site.probed.gradient.detach()
    pairs = (
        [(gradient, by_slope * s)] if site.probed.inside else [(site.probed.signal[1], by_c), (gradient, by_slope * s)]
    )
    pairs = [(value, by.reshape(value.shape)) for value, by in pairs if value.requires_grad]
    moves = by_slope * held * (1 + (1 - 2 * x) * scaled)
    if pairs:
        values, given = zip(*pairs, strict=True)
        (by_x,) = torch.autograd.grad(values, site.probes, given, materialize_grads=True)  # none of a linear model
        moves = torch.addcmul(moves, by_x, z)
    total = (moves * s).sum()
    if site.probed.inside:  # the signal's derivative is known
        total = total + (lift(by_c, site.fn) * held[1] * z[1] * s[1]).sum()
    return -total


def _surrogate(site: SiteTerms, parts: Parts) -> dict[str, Any]:
    term = parts.gradient * element_logits(site)
    return {"value": term, "guide": term}


def _twice(learns: bool, model: bool = True) -> Traits:
    probes = ("twice" if learns else "differentiable") if model else "no"
    return Traits(support="binary", probes=probes, stateful=True)


def _require(part: Any, name: str, holds: bool, because: str) -> None:
    if not holds:
        act, fix = "relax a Bernoulli draw", f"Write {type(part).__name__}()."
        fail(EstimatorError, type(part).__name__, act, got=f"{name}={getattr(part, name)}", because=because, fix=fix)


register(
    "estimator",
    "rebar",
    Rebar,
    Rebar().traits,
    summary="score function minus the model at a relaxed Bernoulli draw",
    source="Tucker et al. 2017",
)
register(
    "estimator",
    "relax",
    Relax,
    Relax().traits,
    summary="score function minus a learned function of a relaxed Bernoulli draw",
    source="Grathwohl et al. 2018",
)
