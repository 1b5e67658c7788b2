r"""Score function with a control variate made from the relaxed Bernoulli draw: `Rebar` and `Relax`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .._checks import EstimatorError, fail
from .._registry import Traits, register
from .base import Control, Estimator, SiteTerms, State
from .bernoulli import element_logits, lift

__all__ = ["Rebar", "Relax"]

CONTROL = "relaxed"  # the name of the control variate, with which its learned moments start


@dataclass(frozen=True)
class Rebar(Estimator):
    r"""Score function minus a reparameterised control variate: the model at a relaxed draw (REBAR).

    $$\hat g=\big(f(b)-c(\tilde z)\big)(b-p)+\nabla_\varphi c(z)-\nabla_\varphi c(\tilde z)\quad\text{by the logit }
      \varphi,\qquad c(z)=f(\sigma(z/\lambda)),$$

    with $z=\varphi+\mathrm{logit}(u)$, $b=1[z>0]$ and $\tilde z$ a second draw of z given b. The control variate's
    coefficient, 1 at first, is learned per parameter from earlier steps. The temperature is moved by stochastic
    gradients of the variance, $\nabla_\lambda|\hat g|^2$ by the logits, with the estimator's own rate and Adam.

    When to use: Bernoulli sites of a model that is smooth in their values, with one particle or more; logits may
    depend on other draws. Unbiased. Cost: 3K model and guide runs, two backwards and one for the coefficient, and a
    further one for the temperature.

    Args:
        temperature: $\lambda$ at first.
        lr: Learning rate of $\log\lambda$; 0 leaves it.

    Raises:
        EstimatorError: A model that cannot take values between 0 and 1 (it indexes by them, compares them, or raises);
            a guide site downstream without ``rsample``, through which no derivative passes.

    Source: Tucker et al. 2017, "REBAR: low-variance, unbiased gradient estimates for discrete latent variable models",
    eqs. 3 and 5. Differs: z is drawn given b, one coefficient per parameter tensor by lagged moments, the variance is
    that by the logits.

    Example:
        >>> Rebar(lr=0.0).traits.probes, Rebar().traits.probes
        ('differentiable', 'twice')
    """

    temperature: float = 0.5
    lr: float = 0.01

    def __post_init__(self) -> None:
        _require(self, "temperature", self.temperature > 0, "a temperature is positive")
        _require(self, "lr", self.lr >= 0, "a learning rate is zero or positive")

    @property
    def traits(self) -> Traits:  # type: ignore[override]
        return _twice(self.lr > 0)

    def noise(self, site: SiteTerms) -> tuple[int, ...] | None:
        return (2, *site.value.shape)

    def init(self, site: SiteTerms, signal: Tensor | None) -> State:
        start = torch.full_like(signal.sum(), self.temperature).log()
        return {"log_temperature": start, **_moments({"log_temperature": start})}

    def probes(self, site: SiteTerms, rows: int, state: State) -> Tensor | None:
        return relaxed(site).at(state)

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Any]:
        draws = relaxed(site)
        return _surrogate(site, signal, draws, *_model(site, draws, state))

    def update(self, site: SiteTerms, signal: Tensor | None, state: State) -> State:
        own = {name: value for name, value in state.items() if not name.startswith(CONTROL)}
        return _descend(site, signal, own, ("log_temperature",), _model, self.lr)[0]


@dataclass(frozen=True)
class Relax(Estimator):
    r"""Score function minus a learned control variate of the relaxed draw (RELAX).

    $$\hat g=\big(f(b)-c(\tilde z)\big)(b-p)+\nabla_\varphi c(z)-\nabla_\varphi c(\tilde z),\qquad
      c(z)=f(\sigma(z/\lambda))+r_\rho(z)+\bar f,$$

    as `Rebar`, with r a network of one layer of ``tanh`` units over the elements of the event, and $\bar f$ an average
    of what was left of earlier signals. $\rho$ and $\lambda$ are moved by stochastic gradients of the variance by the
    logits, $\nabla_\rho|\hat g|^2$, and live in the estimator's state, with their own learning rate and Adam. r is 0 at
    first.

    When to use: as `Rebar`; with ``model=False`` the model is never run at relaxed values, so that it may index by
    them. Unbiased. Cost: 3K model and guide runs, or K with ``model=False``; backwards as `Rebar`.

    Args:
        hidden: Number of units.
        temperature: $\lambda$ at first.
        lr: Learning rate of network and temperature; 0 leaves them.
        model: Whether c has the model's part $f(\sigma(z/\lambda))$.

    Raises:
        EstimatorError: As `Rebar`, unless ``model=False``.

    Source: Grathwohl et al. 2018, "Backpropagation through the void", eq. 8 and section 3.2. Differs: as `Rebar`; the
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

    @property
    def traits(self) -> Traits:  # type: ignore[override]
        return _twice(self.lr > 0, self.model)

    @property
    def _names(self) -> tuple[str, ...]:
        return ("log_temperature",) * self.model + ("weight_in", "bias_in", "weight_out")

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
        return {**weights, **_moments({n: weights[n] for n in self._names}), "average": zero, "seen": zero}

    def probes(self, site: SiteTerms, rows: int, state: State) -> Tensor | None:
        return relaxed(site).at(state) if self.model else None

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Any]:
        draws = relaxed(site)
        return _surrogate(site, signal, draws, *self._c(site, draws, state))

    def update(self, site: SiteTerms, signal: Tensor | None, state: State) -> State:
        own = {name: value for name, value in state.items() if not name.startswith(CONTROL)}
        new, c = _descend(site, signal, own, self._names, self._c, self.lr)
        left = (signal - c).mean() + self._average(own)
        average = self.beta * own["average"] + (1 - self.beta) * left
        return {**new, "average": average, "seen": self.beta * own["seen"] + (1 - self.beta)}

    def _average(self, state: State) -> Tensor:
        return state["average"] / state["seen"].clamp(min=1 - self.beta)

    def _c(self, site: SiteTerms, draws: Draws, state: State) -> tuple[Tensor, Tensor]:
        """Return c at the second draw, ``(particles?, *plates)``, and its derivative by both draws."""
        s = draws.z.sigmoid()
        flat = (2 * s - 1).reshape(*s.shape[: s.dim() - site.fn.event_dim], -1)
        units = (flat @ state["weight_in"] + state["bias_in"]).tanh()
        value = units[1] @ state["weight_out"] + self._average(state)
        slope = (((1 - units**2) * state["weight_out"]) @ state["weight_in"].mT).reshape(s.shape) * 2 * s * (1 - s)
        if not self.model:
            return value, slope
        model_value, model_slope = _model(site, draws, state)
        return value + model_value, slope + model_slope


class Draws(NamedTuple):
    r"""Two draws of z given b, ``(2, *value.shape)``, their derivatives by the logits, and b - p.

    The first is z itself, whose derivative is 1; the second $\tilde z$, whose path keeps b.
    """

    z: Tensor
    slope: Tensor
    residual: Tensor

    def at(self, state: State) -> Tensor:
        """Return the relaxed values at the state's temperature."""
        return (self.z / state["log_temperature"].exp()).sigmoid()


def relaxed(site: SiteTerms) -> Draws:
    """Return the draws of z that the site's uniform numbers stand for."""
    logits, value = element_logits(site).detach(), site.value.detach()
    sign = 2 * value - 1
    inner = torch.logit(site.noise) + softplus(sign * logits)
    given = inner[1].sigmoid() * (sign * logits).sigmoid()
    return Draws(sign * softplus(inner), torch.stack([torch.ones_like(given), given]), value - logits.sigmoid())


def _model(site: SiteTerms, draws: Draws, state: State) -> tuple[Tensor, Tensor]:
    r"""Return $f(\sigma(z/\lambda))$ at the second draw, and its derivative by both draws."""
    x = draws.at(state)
    return site.probed.signal[1], site.probed.gradient * x * (1 - x) / state["log_temperature"].exp()


def _by_logits(site: SiteTerms, signal: Tensor, draws: Draws, c: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient by each logit: the score's part, and the control variate."""
    paths = slope * draws.slope
    control = paths[0] - paths[1] - lift(c, site.fn) * draws.residual
    return lift(signal, site.fn) * draws.residual, control


def _surrogate(site: SiteTerms, signal: Tensor, draws: Draws, c: Tensor, slope: Tensor) -> dict[str, Any]:
    score, control = (part.detach() for part in _by_logits(site, signal, draws, c, slope))
    logits = element_logits(site)
    term = (score + control) * logits
    return {"value": term, "guide": term, "controls": {CONTROL: Control(control * logits, low=-1.0, high=1.0)}}


def _descend(
    site: SiteTerms, signal: Tensor, state: State, names: tuple[str, ...], function: Callable[..., Any], lr: float
) -> tuple[State, Tensor]:
    """Return the state after one step of Adam down the squared gradient by the logits, and c at the second draw."""
    draws = relaxed(site)
    if not lr:
        return state, function(site, draws, state)[0].detach()
    leaves = {name: state[name].detach().requires_grad_() for name in names}
    with torch.enable_grad():
        c, slope = function(site, draws, {**state, **leaves})
        score, control = _by_logits(site, signal, draws, c, slope)
        squares = ((score + control) ** 2).sum()
        wanted = [*leaves.values(), *([site.probes] if site.probes is not None else [])]
        found = torch.autograd.grad(squares, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)
        grads = dict(zip(leaves, found, strict=False))
        if site.probes is not None:  # the model moves with the temperature through the values that it was run at
            x = draws.at(leaves)
            (through,) = torch.autograd.grad((x * found[-1].detach()).sum(), leaves["log_temperature"])
            grads["log_temperature"] = grads["log_temperature"] + through
    return {**state, **_adam(state, grads, lr)}, c.detach()


def _moments(params: Mapping[str, Tensor]) -> State:
    """Return Adam's state before the first step."""
    zeros = {f"{n}|{kind}": torch.zeros_like(p) for n, p in params.items() for kind in ("mean", "square")}
    return {**zeros, "count": torch.zeros_like(next(iter(params.values())).sum())}


def _adam(state: State, grads: Mapping[str, Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> State:
    """Return parameters and moments after one step of Adam (Kingma and Ba 2015)."""
    count = state["count"] + 1
    new: State = {"count": count}
    for name, grad in grads.items():
        mean = betas[0] * state[f"{name}|mean"] + (1 - betas[0]) * grad
        square = betas[1] * state[f"{name}|square"] + (1 - betas[1]) * grad**2
        step = mean / (1 - betas[0] ** count) / ((square / (1 - betas[1] ** count)).sqrt() + 1e-8)
        new |= {name: state[name] - lr * step, f"{name}|mean": mean, f"{name}|square": square}
    return new


def _twice(learns: bool, model: bool = True) -> Traits:
    probes = ("twice" if learns else "differentiable") if model else "no"
    return Traits(support="binary", probes=probes, controls=True, stateful=True)


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
