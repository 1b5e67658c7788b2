r"""The posterior as draws, weighted or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from .._checks import StepError, fail, nearest
from ..particles import Site, hold_batch
from ._plates import in_plates
from .base import Posterior, Support, expected_log_joint

__all__ = ["SampledSite", "SamplesPosterior", "lay_out"]


@dataclass(frozen=True)
class SampledSite:
    """What is known of a latent beside its draws: its vectorized plates and the number of dims of one value."""

    frames: tuple
    event_dim: int


def lay_out(sites: Iterable[Site], num_particles: int, nesting: int) -> dict[str, Tensor]:
    """Return values as a `Support` holds them: ``(S, *plates, *event)``, plate dims that a site lacks of size 1."""
    values = {}
    for site in sites:
        value, event = site.value, site.fn.event_dim
        batch = value.shape[: value.dim() - event]
        value = value.reshape((1,) * (nesting + 1 - len(batch)) + value.shape)
        values[site.name] = value.expand(num_particles, *value.shape[1:])
    return values


class SamplesPosterior(Posterior):
    r"""Draws $z_{sn}$ with weights $w_{sn}$ per datum: $E[f(z_n)]\approx\sum_s w_{sn}f(z_{sn})$.

    Args:
        model, args, kwargs: The model and its data.
        support: The draws and their normalised log weights.
        sites: Plates and event dims of each latent.
        units: The plates that all latents share, over which weights differ.
        kind: Which sampler they come from.
        batch: Indices of the minibatch, by plate that subsamples.
        vectorize: Whether the model may be run on all draws at once.
        log_evidence: An estimate of log p(x) in nats, where the sampler has one; else NaN.
        groups: Which draws depend on each other, a number per draw; None: none does, given theta.
        entropy: $\log\hat p(x)-E[\log p_\theta(x,z)]$ in nats, where there is an estimate of log p(x); else NaN. The
            objective after E is then the lower bound of importance sampling.

    As a guide it draws one of the particles per datum, by weight, all latents of a datum from the same particle. Such a
    draw has no density that could be computed, so its log density is NaN: `Predictive` and expectations of log p work,
    and what needs log q, such as `log_evidence` or the ELBO, refuses it. Use a guide with a density there.

    Shape: values ``(S, *plates, *event)``, log weights ``(S, *plates)``.

    Raises:
        StepError: `marginal` of a site that is no latent.

    Source: Smith and Gelfand 1992, "Bayesian statistics without tears: a sampling-resampling perspective".

    Example:
        >>> def model(): pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> support = Support({"z": torch.tensor([1.0, 3.0])}, torch.tensor([0.25, 0.75]).log(), 0)
        >>> posterior = SamplesPosterior(model, (), {}, support, {"z": SampledSite((), 0)})
        >>> posterior.marginal("z").mean
        tensor(2.5000)
    """

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        support: Support,
        sites: Mapping[str, SampledSite],
        units: tuple = (),
        *,
        kind: str = "samples",
        batch: Mapping[str, Tensor] | None = None,
        vectorize: bool = True,
        log_evidence: float = math.nan,
        entropy: float = math.nan,
        groups: Tensor | None = None,
    ) -> None:
        self.groups = groups
        self.model, self.args, self.kwargs = model, args, dict(kwargs)
        self.draws = replace(support, sampled=True)
        self.sites, self.units = dict(sites), tuple(units)
        self.kind, self.batch, self.vectorize = kind, dict(batch or {}), vectorize
        self.log_evidence, self.entropy = log_evidence, entropy

    def support(self, num_particles: int = 1) -> Support:
        """Return the draws, all of them, whatever the number."""
        return self.draws

    @property
    def lacking(self) -> dict[str, int]:
        """How many of the outermost plate dims each latent lacks."""
        return {name: _outside(site.frames, self.draws.num_plates) for name, site in self.sites.items()}

    def expected_log_joint(self, num_particles: int = 1) -> Tensor:
        with hold_batch(self.batch):
            return expected_log_joint(self.model, self.args, self.kwargs, self.draws, self.vectorize, self.lacking)

    def marginal(self, site: str) -> dist.Empirical:
        """Return the weighted draws of one latent as an empirical distribution, batched over its plates."""
        if site not in self.sites:
            fail(
                StepError,
                "SamplesPosterior",
                f"give the marginal of {site!r}",
                got="no such latent",
                because="the model's latents were drawn",
                fix=nearest(site, self.sites),
            )
        value, nesting = self.draws.values[site], self.draws.num_plates
        weights = self.draws.log_weights.expand(value.shape[: 1 + nesting]).movedim(0, -1)
        value, skip = value.movedim(0, nesting), _outside(self.sites[site].frames, nesting)
        return dist.Empirical(value.reshape(value.shape[skip:]), weights.reshape(weights.shape[skip:]))

    def sample(self, plates: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        nesting, plates = self.draws.num_plates, dict(plates or {})
        weights = self.draws.log_weights.movedim(0, -1)
        weights = weights.reshape(weights.shape[_outside(self.units, nesting) :])
        with in_plates(self.units, self.batch, plates):
            choice = dist.Categorical(logits=weights)
            which = pyro.sample("_particle", choice, infer={"_do_not_trace": True, "is_auxiliary": True})
        within = which.dim() > nesting  # of a plate of particles around the guide
        which = which.reshape((1,) * (nesting - which.dim()) + which.shape)
        values = {}
        for name, site in self.sites.items():
            value = _pick(self.draws.values[name], which, nesting)
            value = value if within else value.reshape(value.shape[_outside(site.frames, nesting) :])
            with in_plates(site.frames, self.batch, plates):
                values[name] = pyro.sample(name, _Drawn(value, site.event_dim))
        return values


def _outside(frames: Iterable, nesting: int) -> int:
    """Return how many of the plate dims lie left of all these plates."""
    return nesting - max([-frame.dim for frame in frames], default=0)


def _pick(values: Tensor, which: Tensor, nesting: int) -> Tensor:
    """Return ``values[which[..., n], n]`` per datum: values ``(S, *plates, *event)``, which ``(*batch, *plates)``."""
    plates = values.shape[1 : 1 + nesting]
    grid = [torch.arange(n, device=which.device).reshape(-1, *(1,) * (nesting - 1 - i)) for i, n in enumerate(plates)]
    return values[which, *grid]


class _Drawn(TorchDistribution):
    """A value that was drawn elsewhere; its density is not known, and NaN."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, value: Tensor, event_dim: int) -> None:
        self.value = value
        batch = value.dim() - event_dim
        super().__init__(value.shape[:batch], value.shape[batch:], validate_args=False)

    @constraints.dependent_property
    def support(self) -> Any:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Drawn:
        shape = torch.Size(batch_shape)
        return _Drawn(self.value.expand(shape + self.event_shape), len(self.event_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.value.expand(torch.Size(sample_shape) + self.value.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(self.batch_shape, value.shape[: value.dim() - len(self.event_shape)])
        kind = value.dtype if value.is_floating_point() else torch.get_default_dtype()
        return torch.full(shape, math.nan, dtype=kind, device=value.device)
