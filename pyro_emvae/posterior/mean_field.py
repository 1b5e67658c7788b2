r"""The mean-field posterior: a product of factors, each in a known family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._checks import StepError, fail, nearest
from ..particles import Particles
from ._factored import FactoredJoint
from ._factors import as_factor, displaced
from ._mean_field import Ascent, Update, paired
from ._meetings import at_once
from .base import Posterior, Support
from .conjugate import MAX_NODES, ConjugatePosterior, _pad, _repeat

__all__ = ["MeanFieldPosterior", "first_ascent"]

EXACT = Update()


class MeanFieldPosterior(Posterior):
    r"""$q(z)=\prod_jq_j(z_j)$, one factor per latent and element of its plates, of the family that the model gives it.

    * `expected_log_joint` and `elbo` are exact: the log joint of a model that is conjugate in each latent given the
      others is affine in each factor's statistics $t_j$, so that nodes whose mean of $t_j$ is exact do, in all
      combinations for factors that meet in a site.
    * `support` has nodes for other functions, as `ConjugatePosterior` has, and all outcomes of discrete latents. A
      latent whose elements meet in a site has nodes for quadratic forms of all its elements. If these are more than
      5,000 together, nodes that are exact for statistics of the log joint replace them, or else draws.

    Args:
        ascent: The factors, and the model.
        elbo: Evidence lower bound, nats, with the model's scales.
        num_sweeps, converged: Sweeps that were made; whether the last one gained no more than the tolerance.

    `is_exact` is False: it is the best of its kind, and not the posterior.

    Source: Bishop 2006, section 10.1.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_emvae.steps import MeanField
        >>> def model(x):
        ...     a = pyro.sample("a", dist.Normal(0.0, 1.0))
        ...     b = pyro.sample("b", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)
        >>> posterior = MeanField().infer(model, (torch.tensor(1.5),), {})
        >>> posterior.marginal("a").variance  # that of the posterior is 2/3
        tensor(0.5000)
    """

    kind = "mean_field"
    is_exact = False

    def __init__(self, ascent: Ascent, elbo: float, num_sweeps: int, converged: bool) -> None:
        self._ascent, joint = ascent, ascent.joint
        self.model, self.args, self.kwargs, self.batch = joint.model, joint.args, joint.kwargs, joint.batch
        self.latents, self.nesting, self.drawn = joint.latents, joint.nesting, joint.drawn
        self.factors, self.elbo = tuple(ascent.factors), elbo
        self.num_sweeps, self.converged = num_sweeps, converged
        self._product = ConjugatePosterior(joint, self.factors, elbo)

    @property
    def vectorize(self) -> bool:
        """Whether the model may be run at all values at once."""
        return self._ascent.joint.at_once == "all"

    @cached_property
    def entropy(self) -> float:
        """Entropy in nats, with the model's scales; of masked latents none."""
        return self._product.entropy

    def support(self, num_particles: int = 100) -> Support:
        """Return the nodes, whatever the number; where those are too many, that many draws."""
        for few in (False, True):
            counts = [self._count(i, few) for i in range(len(self.factors))]
            if None not in counts and math.prod(counts) <= MAX_NODES:
                return self._joined([self._nodes(i, few) for i in range(len(self.factors))], counts)
        return self._product._drawn(num_particles)

    def _joined(self, rows: list[tuple[dict[str, Tensor], Tensor]], counts: list[int]) -> Support:
        """Return all combinations of the factors' nodes."""
        values: dict[str, Tensor] = {}
        log_weights: Any = 0.0
        for place, (nodes, weights) in enumerate(rows):
            before, after = math.prod(counts[:place]), math.prod(counts[place + 1 :])
            for name, value in nodes.items():
                padded = _pad(value, self.latents[name].fn.event_dim, self.nesting)
                values[name] = _repeat(padded, before=before, after=after)
            log_weights = log_weights + _repeat(_pad(weights, 0, self.nesting), before=before, after=after)
        return self._product._supported(values, log_weights)

    def _count(self, place: int, few: bool) -> int | None:
        exact = few or self._ascent.dims[place]
        return len(self._ascent.nodes(place)) if exact else self.factors[place].num_nodes

    def _nodes(self, place: int, few: bool) -> tuple[dict[str, Tensor], Tensor]:
        if not (few or self._ascent.dims[place]):
            return self.factors[place].nodes()
        nodes = self._ascent.nodes(place)
        return dict(nodes.values), nodes.weights.log()

    def marginal(self, site: str) -> Any:
        """Return the distribution of one latent; of the mean of a Normal-Gamma, a StudentT."""
        if site not in self.latents:
            fail(
                StepError,
                "MeanFieldPosterior",
                f"give the marginal of {site!r}",
                got="no such latent",
                because="each latent of the model has a factor",
                fix=nearest(site, self.latents),
            )
        return self._product.marginal(site)

    def sample(self, plates: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        return self._product.sample(plates)

    def particles(self, num_particles: int) -> Particles:
        self._product.known.setdefault(self.model, self.vectorize)
        return self._product.particles(num_particles)

    def expected_log_joint(self, num_particles: int = 100) -> Tensor:
        return self._ascent.expected_log_joint()


def first_ascent(
    joint: FactoredJoint,
    update: Update = EXACT,
    *,
    pairs: str = "conjugate",
    init: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Ascent:
    r"""Return the factors from which an ascent starts.

    A latent starts at its prior mean, moved by noise of its prior's deviation, a discrete one at its prior with noise
    on its log probabilities: components that are alike would stay so.

    Args:
        joint: The model.
        update: How factors are moved.
        pairs: ``"conjugate"``: a mean and its precision are one factor where that is conjugate; ``"none"``: never.
        init: Distributions by site, for those that are to start there.
        seed: Of the noise.

    Raises:
        StepError: `init` names no latent, or its distribution does not fit the latent.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        """Return the quantiles of a standard normal in random order, so that few components are apart."""
        count = like.numel()
        if count < 2:
            return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
        levels = (torch.randperm(count, generator=generator).double() + 0.5) / count
        return torch.special.ndtri(levels).reshape(like.shape).to(like)

    factors = [displaced(factor, noise) for factor in joint.start()]
    key = ("at_once", joint.model)
    if key not in joint.known:
        joint.known[key] = at_once(joint, factors)
    given = {name: as_factor(joint, name, fn) for name, fn in (init or {}).items()}
    factors = [given.get(factor.names[0], factor) for factor in factors]
    if pairs != "none":
        factors = paired(joint, factors, update)
    return Ascent(joint, factors, update)
