r"""What mean field adds to the conjugate families: discrete factors, steps between members, tensors to keep."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from .._checks import StepError, fail, nearest
from ._conjugacy import _as_factor, _family
from ._families import (
    BetaFactor,
    DirichletFactor,
    Factor,
    GammaFactor,
    GivenFactor,
    NormalFactor,
    NormalGammaFactor,
    Values,
)
from ._vectors import NormalWishartFactor, VectorFactor, WishartFactor
from .enumerated import _distribution

__all__ = [
    "DiscreteFactor",
    "as_factor",
    "blend",
    "displaced",
    "family_of",
    "tensors",
    "toward",
    "with_tensors",
]


@dataclass(frozen=True)
class DiscreteFactor(Factor):
    r"""$q(k)\propto e^{f(k)}$ over the outcomes of a discrete latent.

    Args:
        name: The site.
        logits: ``(*batch, outcomes)``.
        outcomes: ``(outcomes, *event)``.
        fn: The model's distribution, for the kind of distribution.
    """

    name: str
    logits: Tensor = field(repr=False)
    outcomes: Tensor = field(repr=False)
    fn: Any = field(repr=False, default=None)
    family = "Categorical"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def num_nodes(self) -> int:
        return len(self.outcomes)

    @property
    def log_weights(self) -> Tensor:
        """Log probabilities, ``(outcomes, *batch)``."""
        return self.logits.log_softmax(-1).movedim(-1, 0)

    @classmethod
    def start(cls, name: str, fn: Any) -> DiscreteFactor:
        return cls.of(name, fn, fn)

    @classmethod
    def of(cls, name: str, fn: Any, prior: Any) -> DiscreteFactor:
        """Return the factor with the probabilities of a distribution."""
        outcomes = prior.enumerate_support(expand=False)
        outcomes = outcomes.reshape(outcomes.shape[0], *prior.event_shape)
        shape = (len(outcomes), *prior.batch_shape, *prior.event_shape)
        wide = outcomes.reshape(len(outcomes), *(1,) * len(prior.batch_shape), *prior.event_shape).expand(shape)
        return cls(name, fn.log_prob(wide).detach().movedim(0, -1), outcomes, prior)

    def _positive(self) -> tuple[Tensor, ...]:
        return (self.logits.softmax(-1).sum(-1),)

    def conditional(self, name: str, values: Values) -> Any:
        return _distribution(self.fn, self.logits)

    def entropy(self, name: str) -> Tensor:
        return dist.Categorical(logits=self.logits).entropy()

    def around(self, noise: Values, wide: bool) -> dict[str, Tensor]:
        raise NotImplementedError

    def fit(self, values: list[Values], slopes: list[Values]) -> tuple[Factor, Tensor]:
        raise NotImplementedError

    def nodes(self) -> tuple[dict[str, Tensor], Tensor]:
        batch, event = self.logits.shape[:-1], self.outcomes.shape[1:]
        values = self.outcomes.reshape(len(self.outcomes), *(1,) * len(batch), *event)
        return {self.name: values.expand(len(self.outcomes), *batch, *event)}, self.log_weights

    def pair(self) -> dict[str, Tensor]:
        raise NotImplementedError


# Natural parameters -----------------------------------------------------------------------------------------------


def _normal(f: NormalFactor) -> tuple[Tensor, ...]:
    precision = f.scale.square().reciprocal()
    return precision, precision * f.loc


def _from_normal(f: NormalFactor, eta: list[Tensor]) -> NormalFactor:
    return replace(f, loc=eta[1] / eta[0], scale=eta[0].rsqrt())


def _normal_gamma(f: NormalGammaFactor) -> tuple[Tensor, ...]:
    return f.a, f.b + 0.5 * f.count * f.m.square(), f.count * f.m, f.count


def _from_normal_gamma(f: NormalGammaFactor, eta: list[Tensor]) -> NormalGammaFactor:
    a, b, h, count = eta
    return replace(f, a=a, b=b - 0.5 * h.square() / count, m=h / count, count=count)


def _as_they_are(f: Factor) -> tuple[Tensor, ...]:
    return tuple(tensors(f).values())


def _with_them(f: Factor, eta: list[Tensor]) -> Factor:
    return with_tensors(f, dict(zip(tensors(f), eta, strict=True)))


_NATURAL: dict[type, tuple[Callable, Callable]] = {
    NormalFactor: (_normal, _from_normal),
    NormalGammaFactor: (_normal_gamma, _from_normal_gamma),
    VectorFactor: (VectorFactor.natural, VectorFactor.member),
    NormalWishartFactor: (NormalWishartFactor.natural, NormalWishartFactor.member),
}


def blend(old: Factor, new: Factor, rate: float) -> Factor:
    r"""Return the member with $\eta=(1-\rho)\eta_{old}+\rho\,\eta_{new}$, a natural-gradient step of length $\rho$."""
    if rate == 1.0:
        return new
    if isinstance(new, DiscreteFactor):
        logits = [torch.log_softmax(f.logits, -1) for f in (old, new)]
        return replace(new, logits=torch.lerp(*logits, rate))
    return toward(old, _NATURAL.get(type(new), (_as_they_are, None))[0](new), rate)


def toward(old: Factor, eta: Sequence[Tensor], rate: float) -> Factor:
    r"""Return the member with $\eta=(1-\rho)\eta_{old}+\rho\,\eta$, which need not be those of a member themselves."""
    natural, member = _NATURAL.get(type(old), (_as_they_are, _with_them))
    return member(old, [torch.lerp(a, b, rate) for a, b in zip(natural(old), eta, strict=True)])


# Starts -----------------------------------------------------------------------------------------------------------


def displaced(factor: Factor, noise: Callable[[Tensor], Tensor]) -> Factor:
    """Return a factor moved off its mean by standard noise, so that factors that are alike do not stay so."""
    if isinstance(factor, DiscreteFactor):
        return replace(factor, logits=factor.logits + noise(factor.logits))
    if isinstance(factor, NormalFactor):
        return replace(factor, loc=factor.loc + factor.scale * noise(factor.loc))
    if isinstance(factor, VectorFactor):
        return replace(factor, loc=factor.around({factor.name: noise(factor.loc)}, wide=True)[factor.name])
    if isinstance(factor, WishartFactor):
        return replace(factor, inverse=factor.inverse * (0.5 * noise(factor.df)).exp()[..., None, None])
    if isinstance(factor, GammaFactor):
        return replace(factor, b=factor.b * (0.5 * noise(factor.b)).exp())
    if isinstance(factor, BetaFactor | DirichletFactor):
        moved = {name: x * (0.5 * noise(x)).exp() for name, x in tensors(factor).items()}
        return with_tensors(factor, moved)
    return factor


def family_of(fn: Any) -> type[Factor] | None:
    """Return the family of a continuous latent by the support of its prior."""
    support = None if fn.has_enumerate_support else fn.support
    if support is constraints.positive_definite and fn.event_dim == 2:
        return WishartFactor
    if isinstance(support, constraints.independent) and support.base_constraint is constraints.real:
        return VectorFactor if fn.event_dim == 1 else None
    return _family(fn)


def _made(kind: type[Factor], name: str, fn: Any, prior: Any) -> Factor:
    if kind is DiscreteFactor:
        return DiscreteFactor.of(name, fn, prior)
    if kind is VectorFactor:
        root = fn.scale_tril if hasattr(fn, "scale_tril") else torch.diag_embed(fn.variance.sqrt())
        return VectorFactor(name, fn.mean.detach(), root.detach())
    if kind is WishartFactor:
        return WishartFactor(name, fn.df.detach(), fn.precision_matrix.detach())
    return _as_factor(name, fn)


def as_factor(joint: Any, name: str, fn: Any) -> Factor:
    """Return the factor of a latent that a distribution of its family stands for."""
    site = joint.latents.get(name)
    if site is None:
        fail(
            StepError,
            joint.obj,
            f"start the factor of {name!r}",
            got="no such latent",
            because="init= has distributions of the model's latents",
            fix=nearest(name, joint.latents),
        )
    kind = family_of(site.fn) or DiscreteFactor
    try:
        if fn.event_shape != site.fn.event_shape:
            raise ValueError(f"event shape {tuple(fn.event_shape)} in place of {tuple(site.fn.event_shape)}")
        wide = fn.expand(joint.shape(name))
        found = _made(kind, name, wide, site.fn)
        if type(found) is not kind:
            raise TypeError(f"a {kind.__name__.removesuffix('Factor')} factor")
    except (AttributeError, RuntimeError, TypeError, ValueError) as cause:
        fail(
            StepError,
            joint.obj,
            f"start the factor of {name!r}",
            got=f"{type(fn).__name__} of shape {tuple(fn.shape()) if hasattr(fn, 'shape') else ()}",
            because=f"the latent has shape {tuple(site.value.shape)} and takes {kind.__name__.removesuffix('Factor')}",
            fix="Give a distribution of the latent's family, plates and event shape.",
            cause=cause,
        )
    return found


# Tensors ----------------------------------------------------------------------------------------------------------


@functools.cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind) if f.type == "Tensor" and f.name != "outcomes")


def tensors(factor: Factor) -> dict[str, Tensor]:
    """Return a factor's parameters by field."""
    return {} if isinstance(factor, GivenFactor) else {name: getattr(factor, name) for name in _names(type(factor))}


def with_tensors(factor: Factor, values: Mapping[str, Tensor]) -> Factor:
    """Return a factor with other parameters."""
    return replace(factor, **values)
