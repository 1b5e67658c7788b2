r"""What is optimised: the terms of an objective, from the particles' densities; pure tensor functions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from ._checks import EmvaeError, fail
from ._pyro import scale_and_mask
from ._registry import register
from .particles import Particles, reduce_to

__all__ = ["ELBO", "IWAE", "Bound", "MultiSample", "Objective", "Term"]


class Term(NamedTuple):
    """A summand: where it comes from, its plates, and its scaled value ``(particles?, *plates)`` in nats.

    Its kind is ``"log_p"``, ``"entropy"`` (minus log q) or ``"kl"`` (log p - log q, integrated).
    """

    site: str
    kind: str
    frames: tuple
    value: Tensor


@dataclass(frozen=True)
class Bound:
    r"""An objective of several particles: $\sum_n c_n\,h(\ell_{1n},\dots,\ell_{Kn})$ plus what no draw reaches.

    Args:
        objective: What has h.
        frames: The plates of n, shared by all latents and data.
        log_weight: The log weights $\ell$ of p over q, without $c$: ``(particles, *plates)``, nats; other plates have
            size 1.
        value: h per datum: ``(1, *plates)``, nats.
        slopes: K times the derivative of h by each log weight, detached: ``(particles, *plates)``.
        scale: c, the scale of the shared plates that subsample.
        terms: The summands in the log weights.
        rest: The summands that no draw reaches.
    """

    objective: MultiSample
    frames: tuple
    log_weight: Tensor
    value: Tensor
    slopes: Tensor
    scale: float
    terms: list[Term] = field(repr=False)
    rest: list[Term] = field(repr=False)

    @property
    def total(self) -> Tensor:
        """The objective: a scalar, nats."""
        num_particles = len(self.log_weight)
        constants = [term.value.sum() / num_particles for term in self.rest]
        return self.scale * self.value.sum() + sum(constants)

    def weighted(self, weight: Tensor) -> list[Term]:
        """Return the summands, of which those in the log weights are multiplied by `weight`."""
        return [term._replace(value=weight * term.value) for term in self.terms] + self.rest


class Objective(ABC):
    """An objective that is *maximised*; it declares what it bounds."""

    name: ClassVar[str]
    bounds: ClassVar[str]

    @abstractmethod
    def terms(self, particles: Any, analytic: Collection[str] = ()) -> list[Term]:
        """Return the summands of log p - log q, with the KL of the sites `analytic` integrated."""

    def bound(self, particles: Any, terms: list[Term], moves: Callable[[str, str, str], bool]) -> Bound | None:
        """Return the objective of several particles that the summands make up; None if it is their sum."""
        return None


@dataclass(frozen=True)
class ELBO(Objective):
    r"""The evidence lower bound

    $$L=E_q[\log p(x,z)-\log q(z)]\le\log p(x).$$

    Args:
        kl: ``"sampled"`` uses the draws for all terms. ``"analytic"`` replaces log p - log q of a latent by
            $-\mathrm{KL}(q\|p)$, given upstream draws, wherever torch has the pair registered; the other latents
            stay sampled.

    Raises:
        EmvaeError: With ``kl="analytic"`` if the latents of model and guide come in different orders (the KL given
            upstream draws is then not the conditional expectation), or their scales or masks differ.

    Source: Jordan et al. 1999; analytic KL: Kingma and Welling 2013, eq. 7 (SGVB B). Differs from Pyro's
    `TraceMeanField_ELBO`: sites without a registered pair or without ``rsample`` are allowed.

    Example:
        >>> ELBO().bounds
        'lower'
    """

    kl: str = "sampled"
    name: ClassVar[str] = "elbo"
    bounds: ClassVar[str] = "lower"

    def __post_init__(self) -> None:
        if self.kl not in ("sampled", "analytic"):
            fail(
                EmvaeError,
                "ELBO",
                "take the KL",
                got=f"kl={self.kl!r}",
                because="the KL is sampled or analytic",
                fix='Write kl="analytic".',
            )

    def terms(self, particles: Any, analytic: Collection[str] = ()) -> list[Term]:
        wanted = None if self.kl == "analytic" else analytic
        integrated = self._analytic(particles, wanted) if wanted is None or wanted else {}
        return _summands(particles, integrated)

    def _analytic(self, particles: Any, wanted: Collection[str] | None) -> dict[str, Tensor]:
        shared = [name for name in particles.guide if name in particles.latents]
        order = [name for name in particles.latents if name in shared]
        if shared != order:
            fail(
                EmvaeError,
                "ELBO",
                "integrate the KL of each site",
                got=f"the order {shared} in the guide and {order} in the model",
                because="a KL given upstream draws needs the same order in both",
                fix='Reorder the guide, or write objective="elbo".',
            )
        result = {}
        for name in shared if wanted is None else [name for name in shared if name in wanted]:
            q, p = particles.guide[name], particles.model[name]
            try:
                kl = _kl(q, p)
            except NotImplementedError:
                continue
            if not (_equal(q.scale, p.scale) and _equal(q.mask, p.mask)):
                fail(
                    EmvaeError,
                    "ELBO",
                    f"integrate the KL of site {name!r}",
                    got="a scale or mask that differs between model and guide",
                    because="the KL has one scale and one mask",
                    fix="Enter poutine.scale or the mask around the site in both.",
                )
            result[name] = scale_and_mask(kl, p.scale, p.mask)
        return result


class MultiSample(Objective):
    r"""An objective of several particles, with one weight per datum and particle.

    $$\sum_n c_n\,h(\ell_{1n},\dots,\ell_{Kn}),\qquad \ell_{kn}=\log p(x_n,z_{kn})-\log q(z_{kn}),$$

    over the plates that all latents and data share; c is the scale N/B of those that subsample, outside h, so that a
    bound stays one. Pyro's `RenyiELBO` scales inside.

    Raises:
        EmvaeError: Something that a draw reaches lies outside a plate that subsamples, or in a further one that does:
            one weight for all data is no bound once it is scaled.
    """

    @abstractmethod
    def value(self, log_weight: Tensor) -> Tensor:
        """Return h over the first dim, which is kept with size 1."""

    @abstractmethod
    def slopes(self, log_weight: Tensor) -> Tensor:
        """Return the derivative of h by each log weight."""

    def doubly(self, slopes: Tensor) -> Tensor:
        """Return the factors of the doubly reparameterised gradient through the values; see `slopes`."""
        fail(
            EmvaeError,
            type(self).__name__,
            "reparameterise doubly",
            got=f"objective {self.name!r}",
            because="no such gradient is known for it",
            fix='Use estimator="pathwise".',
        )

    def terms(self, particles: Particles, analytic: Collection[str] = ()) -> list[Term]:
        return _summands(particles, {})

    def bound(self, particles: Particles, terms: list[Term], moves: Callable[[str, str, str], bool]) -> Bound:
        inside, rest = [], []
        for term in terms:
            side = "guide" if term.kind == "entropy" else "model"
            reached = any(moves(name, side, term.site) for name, s in particles.guide.items() if not s.is_observed)
            (inside if reached else rest).append(term._replace(value=particles.rows(term.value)))
        frames = _shared(inside)
        scale = math.prod((frame.full_size or frame.size) / frame.size for frame in frames)
        count = particles.num_particles
        parts = [reduce_to(term.value, term.frames, frames) for term in inside]
        log_weight = sum(parts) / scale if parts else torch.zeros(1, *(1,) * particles.max_plate_nesting)
        log_weight = log_weight.expand(count, *log_weight.shape[1:])
        slopes = count * self.slopes(log_weight.detach())
        return Bound(self, frames, log_weight, self.value(log_weight), slopes, scale, inside, rest)


@dataclass(frozen=True)
class IWAE(MultiSample):
    r"""The importance-weighted bound

    $$L_K=\sum_n c_n\,\log\tfrac1K\sum_k e^{\ell_{kn}}\le\log p(x),$$

    the ELBO for K = 1, which rises to log p(x) with K. See `MultiSample` for n and c.

    Source: Burda, Grosse and Salakhutdinov 2016, "Importance weighted autoencoders", eq. 8.

    Example:
        >>> IWAE().value(torch.tensor([0.0, 0.0]))
        tensor([0.])
    """

    name: ClassVar[str] = "iwae"
    bounds: ClassVar[str] = "lower"

    def value(self, log_weight: Tensor) -> Tensor:
        return log_weight.logsumexp(0, keepdim=True) - math.log(len(log_weight))

    def slopes(self, log_weight: Tensor) -> Tensor:
        return log_weight.softmax(0)

    def doubly(self, slopes: Tensor) -> Tensor:
        return slopes**2


def _summands(particles: Particles, integrated: dict[str, Tensor]) -> list[Term]:
    terms = [Term(n, "kl", particles.guide[n].frames, -kl) for n, kl in integrated.items()]
    terms += [Term(n, "log_p", s.frames, s.scaled) for n, s in particles.model.items() if n not in integrated]
    terms += [Term(n, "entropy", s.frames, -s.scaled) for n, s in particles.guide.items() if n not in integrated]
    return terms


def _shared(terms: list[Term]) -> tuple:
    """Return the plates that all summands share; the others must not subsample."""
    every = [set(term.frames) for term in terms]
    shared = set.intersection(*every) if every else set()
    for term in terms:
        for frame in term.frames:
            if frame not in shared and frame.full_size not in (None, frame.size):
                outside = next((t.site for t in terms if frame not in t.frames), term.site)
                fail(
                    EmvaeError,
                    "MultiSample",
                    "weigh the particles of each datum",
                    got=f"site {outside!r} outside plate {frame.name!r}, which subsamples {frame.size} of "
                    f"{frame.full_size}",
                    because="one weight for all data is no bound once it is scaled",
                    fix='Give whole data, or write objective="elbo".',
                )
    return tuple(frame for frame in (terms[0].frames if terms else ()) if frame in shared)


def _kl(q: Any, p: Any) -> Tensor:
    if not q.runs:
        return kl_divergence(q.fn, p.fn)
    priors = {id(one): two.fn for one, two in zip(q.runs, p.runs, strict=True)}
    return q.each(lambda run: kl_divergence(run.fn, priors[id(run)]))


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and (_is_same(one, two) or bool((one == two).all()))
    return one is two or (not isinstance(one, Tensor) and not isinstance(two, Tensor) and one == two)


def _is_same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are one memory in one layout, which tells without a look at the values."""
    return one is two or (one.data_ptr(), one.stride(), one.dtype) == (two.data_ptr(), two.stride(), two.dtype)


register("objective", "elbo", ELBO, summary="evidence lower bound", source="Jordan et al. 1999")
register(
    "objective",
    "elbo_analytic_kl",
    lambda: ELBO(kl="analytic"),
    summary="the ELBO with KL(q||p) in closed form where registered",
    source="Kingma & Welling 2013, eq. 7",
)
register(
    "objective",
    "iwae",
    IWAE,
    summary="importance-weighted bound, weights per datum",
    source="Burda et al. 2016, eq. 8",
)
