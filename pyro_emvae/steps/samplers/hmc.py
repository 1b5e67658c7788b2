r"""Hamiltonian Monte Carlo on all data at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import torch
from torch import Tensor
from torch.distributions import biject_to

from ..._checks import EmvaeError, NonFiniteError, StepError, fail, positive_int
from ...kernels import DualAveraging, Point, adapt, hmc, start_averaging
from .base import Draws, Sampler, Target, Values, draw_nothing
from .chains import Chains

__all__ = ["HMC", "Coordinates", "check_continuous", "check_target"]


@dataclass(frozen=True)
class HMC(Sampler):
    r"""Hamiltonian Monte Carlo, independent chains per datum, all moved at once.

    Each datum has `num_particles` chains; one replay of the model moves them all by one leapfrog, and each is accepted
    or rejected by itself. Step sizes are per datum, adapted by dual averaging while a datum's chains are started, and
    from E-step to E-step with vanishing gain, held while draws are made. Chains go on where the E-step before left
    them. Constrained latents move in unconstrained space, with the Jacobian of the transform.

    When to use: continuous latents per datum without a guide, such as the Monte Carlo EM of a decoder. The model is run
    in evaluation mode.

    Args:
        num_leapfrog: Leapfrogs per move, one gradient of the model each.
        num_moves: Moves per E-step.
        num_warmup: Moves of a datum's chains before their first draw.
        target_acceptance: Acceptance probability that step sizes are adapted to.

    Raises:
        StepError: A latent is discrete, or its support depends on other latents.

    Source: Duane et al. 1987; Hoffman and Gelman 2014 for the adaptation; Kingma and Welling 2013, appendix D, for
    Monte Carlo EM with it (10 leapfrogs, acceptance 0.9).

    Example:
        >>> HMC(num_leapfrog=5)
        HMC(num_leapfrog=5, num_moves=1, num_warmup=50, target_acceptance=0.8)
    """

    name: ClassVar[str] = "hmc"
    latents: ClassVar[str] = "continuous"
    persistent: ClassVar[bool] = True
    num_particles: ClassVar[int] = 10

    num_leapfrog: int = 10
    num_moves: int = 1
    num_warmup: int = 50
    target_acceptance: float = 0.8

    def __post_init__(self) -> None:
        for name, least in (("num_leapfrog", 1), ("num_moves", 1), ("num_warmup", 0)):
            positive_int("MonteCarlo", name, getattr(self, name), least)
        check_target(self.target_acceptance)

    def prepare(self, target: Target) -> Target:
        check_continuous(target, "hmc")
        return target

    def sample(self, target: Target, chains: Chains | None, num_particles: int) -> tuple[Draws, Chains]:
        coordinates = Coordinates(target)
        with pyro.validation_enabled(False):  # a trajectory that diverges is rejected, not an error
            chains, fresh = _started(coordinates, chains, num_particles)
            point = coordinates.point(chains.position.transpose(0, 1))
            state = DualAveraging(*chains[1:], anchor=coordinates.first_step.log() + math.log(10.0))
            if fresh:
                for _ in range(self.num_warmup):
                    point, acceptance = hmc(coordinates.evaluate, point, state.log_step.exp(), self.num_leapfrog)
                    state = adapt(state, acceptance.mean(0), self.target_acceptance)
            _check_started(point.log_density)
            acceptances = []
            for _ in range(self.num_moves):
                point, acceptance = hmc(coordinates.evaluate, point, state.log_average.exp(), self.num_leapfrog)
                acceptances.append(acceptance.mean(0))
        mean = torch.stack(acceptances).mean(0)
        state = adapt(state, mean, self.target_acceptance)
        draws = Draws(
            {name: value.detach() for name, value in coordinates.values(point.position)[0].items()},
            _equal(target, point.log_density),
            ess=mean.new_full(target.sizes, float(num_particles)),
            acceptance=mean.reshape(target.sizes),
        )
        return draws, Chains(point.position.transpose(0, 1), *state[:4])


def _equal(target: Target, like: Tensor) -> Tensor:
    """Return equal log weights of chains ``(S, units)``."""
    return target.unit_shape(torch.full_like(like, -math.log(len(like))))


def _started(coordinates: Coordinates, chains: Chains | None, num_particles: int) -> tuple[Chains, bool]:
    """Return chains of which those of count 0 are put at draws from the prior, and whether there were any."""
    target = coordinates.target
    if chains is None or bool((chains.count == 0).any()):
        start = coordinates.start(num_particles)
        if chains is None:
            chains = Chains.new(math.prod(target.sizes), num_particles, start.shape[-1], start)
        chains, fresh = chains.resized(num_particles), chains.count == 0
        first = start_averaging(coordinates.first_step.expand_as(chains.count))
        return Chains(
            torch.where(fresh[:, None, None], start.transpose(0, 1), chains.position),
            torch.where(fresh, first.log_step, chains.log_step),
            torch.where(fresh, first.log_average, chains.log_average),
            chains.error,
            chains.count,
        ), True
    return chains.resized(num_particles), False


def _check_started(log_density: Tensor) -> None:
    bad = ~torch.isfinite(log_density)
    if bool(bad.any()):
        chain, unit = bad.nonzero()[0].tolist()
        fail(
            NonFiniteError,
            "MonteCarlo",
            "start its chains",
            got=f"a log joint density of {float(log_density[chain, unit])} at datum {unit}",
            because="a chain needs a start where the model has mass",
            fix="Check the data and the supports, or use a prior that draws where the likelihood is not zero.",
        )


class Coordinates:
    r"""The latents of a target in unconstrained space, side by side: positions ``(chains, units, D)``.

    Its log density has the Jacobian of the transforms, $\log p(x_n,T(u_n))+\log|\det T'(u_n)|$, per unit.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.transforms = {name: biject_to(msg["fn"].support) for name, msg in target.latents.items()}
        self.shapes = {n: tuple(t.inverse_shape(target.value_shape(n))) for n, t in self.transforms.items()}
        first = next(iter(target.latents.values()))["value"]
        width = sum(math.prod(shape) for shape in self.shapes.values()) / math.prod(target.sizes)
        self.first_step = first.new_tensor(0.5 * max(width, 1.0) ** -0.25)

    def values(self, position: Tensor) -> tuple[Values, Tensor]:
        """Return the constrained values and the log Jacobian per unit ``(chains, units)``."""
        free = self.target.unflatten(position, self.shapes)
        values, total = {}, torch.zeros_like(position[..., 0])
        for name, transform in self.transforms.items():
            values[name] = transform(free[name])
            jacobian = transform.log_abs_det_jacobian(free[name], values[name])
            total = total + self.target.reduce(jacobian) * self.target.scale
        return values, total

    def log_density(self, position: Tensor) -> Tensor:
        values, jacobian = self.values(position)
        return self.target.log_joint(values) + jacobian

    def evaluate(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return log density and slope; a density that is NaN is none."""
        with torch.enable_grad():
            leaf = position.detach().requires_grad_()
            value = self.log_density(leaf)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach().nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf), slope

    def point(self, position: Tensor) -> Point:
        return Point(position, *self.evaluate(position))

    def start(self, num_chains: int) -> Tensor:
        """Return draws from the prior: ``(chains, units, D)``."""
        with torch.no_grad():
            particles = self.target.draw(draw_nothing, num_chains)
            free = self.free(self.target.lay_out(particles))
            self._check_supports(particles, free)
        return self.target.flatten(free).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def free(self, values: Values) -> Values:
        """Return values in unconstrained space."""
        return {name: transform.inv(values[name]) for name, transform in self.transforms.items()}

    def _check_supports(self, particles: Any, free: Mapping[str, Tensor]) -> None:
        for name, site in particles.latents.items():
            runs = site.runs or (site,)
            for place, run in enumerate(runs):
                mine = free[name][place] if site.runs else free[name]
                one, two = biject_to(run.fn.support)(mine), self.transforms[name](mine)
                if one.shape != two.shape or not torch.allclose(one, two, equal_nan=True):
                    fail(
                        StepError,
                        "MonteCarlo",
                        f"move site {name!r} by HMC",
                        got=f"{type(run.fn).__name__} with a support that differs from draw to draw",
                        because="its transform to unconstrained space has to be fixed",
                        fix="Write the latent as a function of one of fixed support, such as Uniform(0, 1).",
                    )


def check_target(target_acceptance: float) -> None:
    """Raise unless an acceptance probability lies between 0 and 1."""
    if not 0 < target_acceptance < 1:
        fail(
            EmvaeError,
            "MonteCarlo",
            "adapt step sizes",
            got=f"target_acceptance={target_acceptance}",
            because="it is a probability between 0 and 1",
            fix="Write target_acceptance=0.8.",
        )


def check_continuous(target: Target, name: str) -> None:
    """Raise if a latent is discrete."""
    for site, msg in target.latents.items():
        if msg["fn"].support.is_discrete:
            fail(
                StepError,
                "MonteCarlo",
                f"move site {site!r} by {name}",
                got=f"{type(msg['fn']).__name__}{tuple(msg['fn'].shape())}",
                because="it follows gradients, which a discrete latent has not",
                fix='Use steps.Enumerated(), or MonteCarlo("gibbs").',
            )
