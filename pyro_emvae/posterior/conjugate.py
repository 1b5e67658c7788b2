r"""The exact posterior of latents with conjugate priors."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import pyro
import torch
from torch import Tensor

from .._checks import StepError, fail, nearest
from .._pyro import scale_and_mask
from ..particles import Particles, hold_batch
from ._families import Factor
from ._plates import in_plates
from ._runs import draws, may_vectorize
from .base import Posterior, Support, expected_log_joint

__all__ = ["ConjugatePosterior"]

MAX_NODES = 5_000


class ConjugatePosterior(Posterior):
    r"""Beta, Gamma, Normal, Dirichlet or Normal-Gamma posteriors, independent over sites and plates.

    $$\log p(x,z)=\eta\cdot t(z)+c,\qquad q(z)=p(z|x)\propto e^{\eta\cdot t(z)},\qquad\log p(x)=\log p(x,z)-\log q(z)$$

    at any z. `steps.Conjugate` makes it, and has verified that.

    * `expected_log_joint` needs $E[t(z)]$ only: two nodes of equal weight per latent, whose mean of t(z) is exact. For
      Gamma(a, b) they are $e^{\psi(a)-\log b\pm d}$ with $\cosh d=ae^{-\psi(a)}$; for Beta the roots of
      $z_1z_2=e^{2E\log z}$, $(1-z_1)(1-z_2)=e^{2E\log(1-z)}$; for Normal $m\pm s$.
    * `support` is for any function: the trapezoid rule of 64 nodes in the s with $\log q=\max-\tfrac12s^2$. Where a
      and b are at least 0.3 it is exact to 1e-8, and mostly to 1e-10, relatively, for polynomials of degree 6 and for
      logarithms; to 1e-6 down to 0.1. More than one latent: the product of their nodes.

    Args:
        joint: The model and its latents.
        factors: The posterior of each latent, or pair of latents.
        log_evidence: $\log p(x)$, nats, with the model's scales.
        vectorize: What is known about running all nodes at once, by model; added to.

    ``is_exact`` is False where `support` has to draw: a Dirichlet of more than four categories, a user's distribution
    of another family, or latents whose nodes are more than 5,000 together. The evidence is exact there too.

    Source: Diaconis and Ylvisaker 1979 for conjugate families; Trefethen and Weideman 2014 for the trapezoid rule.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_emvae.steps import Conjugate
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Beta(1.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Bernoulli(z), obs=x)
        >>> posterior = Conjugate().infer(model, (torch.tensor([1.0, 1.0, 0.0]),), {})
        >>> posterior.marginal("z").mean
        tensor(0.6000)
    """

    kind = "conjugate"

    def __init__(
        self,
        joint: Any,
        factors: Sequence[Factor],
        log_evidence: float,
        vectorize: dict[Callable, bool] | None = None,
    ) -> None:
        self.model, self.args, self.kwargs, self.batch = joint.model, joint.args, joint.kwargs, joint.batch
        self.latents, self.nesting, self.drawn = joint.latents, joint.nesting, joint.drawn
        self.factors, self.log_evidence = tuple(factors), log_evidence
        self.known = {} if vectorize is None else vectorize

    @cached_property
    def entropy(self) -> float:
        """Entropy in nats, with the model's scales; of masked latents none. NaN if a user's distribution has none."""
        total = 0.0
        for factor in self.factors:
            for name in factor.names:
                site = self.latents[name]
                total += float(scale_and_mask(factor.entropy(name), site.scale, site.mask).sum())
        return total

    # Expectations ---------------------------------------------------------------------------------------------------

    @property
    def is_exact(self) -> bool:
        """Whether `support` lists nodes, and does not have to draw."""
        counts = [factor.num_nodes for factor in self.factors]
        return None not in counts and math.prod(counts) <= MAX_NODES

    def support(self, num_particles: int = 100) -> Support:
        """Return the nodes, whatever the number; where `is_exact` is False, that many draws."""
        if not self.is_exact:
            return self._drawn(num_particles)
        counts = [factor.num_nodes for factor in self.factors]
        values, log_weights = {}, []
        for place, factor in enumerate(self.factors):
            nodes, weights = factor.nodes()
            before, after = math.prod(counts[:place]), math.prod(counts[place + 1 :])
            repeat = functools.partial(_repeat, before=before, after=after)
            values.update({name: repeat(self._lay_out(name, value)) for name, value in nodes.items()})
            log_weights.append(repeat(_pad(weights, 0, self.nesting)))
        return self._supported(values, functools.reduce(torch.add, log_weights))

    def _drawn(self, num_particles: int) -> Support:
        runs = []
        with torch.no_grad():
            for _ in range(num_particles):
                values: dict[str, Tensor] = {}
                for factor in self.factors:
                    for name in factor.names:
                        values[name] = factor.conditional(name, values).sample()
                runs.append(values)
        values = {name: self._lay_out(name, torch.stack([run[name] for run in runs])) for name in self.latents}
        return dataclasses.replace(self._equally(values), sampled=True)

    def _equally(self, values: dict[str, Tensor]) -> Support:
        first = next(iter(values.values()))
        weights = first.new_full((len(first), *(1,) * self.nesting), -math.log(len(first)))
        return self._supported(values, weights)

    def _supported(self, values: dict[str, Tensor], log_weights: Tensor) -> Support:
        site = max(self.latents.values(), key=lambda site: len(site.frames))
        mask = site.mask if isinstance(site.mask, Tensor) else None
        ordered = {name: values[name] for name in self.latents}
        return Support(ordered, log_weights, self.nesting, site.scale, mask, self.drawn)

    def _lay_out(self, name: str, value: Tensor) -> Tensor:
        return _pad(value, self.latents[name].fn.event_dim, self.nesting)

    def _pairs(self) -> Support:
        """Return few nodes of equal weight that are exact for the sufficient statistics of every latent."""
        pairs = [factor.pair() for factor in self.factors]
        count = max(len(value) for pair in pairs for value in pair.values())
        values = {
            n: self._lay_out(n, v.repeat(count // len(v), *(1,) * (v.dim() - 1))) for p in pairs for n, v in p.items()
        }
        return self._equally(values)

    def expected_log_joint(self, num_particles: int = 100) -> Tensor:
        try:
            support = self._pairs()
        except NotImplementedError:
            support = self.support(num_particles)
        lacking = {
            name: self.nesting - max([-frame.dim for frame in site.frames], default=0)
            for name, site in self.latents.items()
        }
        with hold_batch(self.batch):
            vectorize = may_vectorize(self)
            return expected_log_joint(self.model, self.args, self.kwargs, support, vectorize, lacking)

    # Draws ----------------------------------------------------------------------------------------------------------

    def particles(self, num_particles: int) -> Particles:
        return draws(self, num_particles, self.nesting)

    def sample(self, plates: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        plates = dict(plates or {})
        for factor in self.factors:
            for name in factor.names:
                site = self.latents[name]
                with in_plates(site.frames, self.batch, plates, site.scale, site.mask):
                    values[name] = pyro.sample(name, factor.conditional(name, values))
        return values

    def marginal(self, site: str) -> Any:
        """Return the distribution of one latent; of the mean of a Normal-Gamma, a StudentT."""
        for factor in self.factors:
            if site in factor.names:
                return factor.marginal(site)
        fail(
            StepError,
            "ConjugatePosterior",
            f"give the marginal of {site!r}",
            got="no such latent",
            because="the model's latents were integrated out",
            fix=nearest(site, self.latents),
        )


def _pad(value: Tensor, event_dim: int, nesting: int) -> Tensor:
    """Return ``(S, *batch, *event)`` as ``(S, *plates, *event)``."""
    batch = value.dim() - 1 - event_dim
    return value.reshape(len(value), *(1,) * (nesting - batch), *value.shape[1:])


def _repeat(value: Tensor, before: int, after: int) -> Tensor:
    """Return ``(S, ...)`` as rows of a product with others: ``(before * S * after, ...)``."""
    rest = value.shape[1:]
    return value[None, :, None].expand(before, len(value), after, *rest).reshape(-1, *rest)
