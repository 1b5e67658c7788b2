r"""Pyro's no-U-turn sampler, one chain for all latents."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pyro.infer import MCMC
from pyro.infer import NUTS as Kernel
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from ..._checks import StepError, fail, positive_int
from .base import Draws, Sampler, Target, Values
from .chains import Chains
from .hmc import Coordinates, check_continuous, check_target

__all__ = ["NUTS"]

ENOUGH_TO_ADAPT = 10


@dataclass(frozen=True)
class NUTS(Sampler):
    r"""Pyro's NUTS over all latents jointly: one chain, its successive states the draws.

    The chain goes on where the E-step before left it, with unit mass and the step size that was found there. Its
    acceptance is the share of transitions that moved.

    When to use: global latents, few and dependent. For latents of each datum `HMC` moves all data at once.

    Args:
        num_warmup: Transitions of the first E-step before the first draw.
        num_moves: Transitions of each later E-step before the first draw; with 10 or more they adapt the step size.
        target_acceptance: Acceptance probability that the step size is adapted to.

    Raises:
        StepError: A latent is discrete; a plate is subsampled.

    Source: Hoffman and Gelman 2014, as in `pyro.infer.NUTS`.

    Example:
        >>> NUTS()
        NUTS(num_warmup=200, num_moves=20, target_acceptance=0.8)
    """

    name: ClassVar[str] = "nuts"
    latents: ClassVar[str] = "continuous"
    persistent: ClassVar[bool] = True

    num_warmup: int = 200
    num_moves: int = 20
    target_acceptance: float = 0.8

    def __post_init__(self) -> None:
        positive_int("MonteCarlo", "num_warmup", self.num_warmup, 0)
        positive_int("MonteCarlo", "num_moves", self.num_moves, 0)
        check_target(self.target_acceptance)

    def prepare(self, target: Target) -> Target:
        check_continuous(target, "nuts")
        if target.batch:
            fail(
                StepError,
                "MonteCarlo",
                "draw all latents jointly by nuts",
                got=f"a minibatch of plate {next(iter(target.batch))!r}",
                because="one chain over all data cannot be judged by some of them",
                fix='Give all data, or use MonteCarlo("hmc") for latents of each datum.',
            )
        return replace(target, units=())

    @torch.enable_grad()
    def sample(self, target: Target, chains: Chains | None, num_particles: int) -> tuple[Draws, Chains]:
        coordinates = Coordinates(target)
        if chains is None:
            position, step, warmup = coordinates.start(1), float(coordinates.first_step), self.num_warmup
        else:
            position, step, warmup = chains.position.transpose(0, 1), float(chains.log_step.exp()), self.num_moves

        def potential(free: Values) -> Tensor:
            return -coordinates.log_density(free["latents"]).sum()

        kernel = Kernel(
            potential_fn=potential,
            step_size=step,
            adapt_step_size=chains is None or warmup >= ENOUGH_TO_ADAPT,
            adapt_mass_matrix=False,  # it would not fit the step size that is carried on
            target_accept_prob=self.target_acceptance,
        )
        moved: list[float] = []

        def watch(kernel: Kernel, values: Values, stage: str, place: int) -> None:
            if stage == "Sample":
                moved.append(kernel.diagnostics()["acceptance rate"])

        start = {"latents": position.detach()}
        chain = MCMC(kernel, num_particles, warmup, initial_params=start, hook_fn=watch, disable_progbar=True)
        chain.run()
        found = chain.get_samples()["latents"].detach().squeeze(1)
        values = {name: value.detach() for name, value in coordinates.values(found)[0].items()}
        last = found[-1:]
        count = last.new_full((1,), (0.0 if chains is None else float(chains.count)) + warmup + num_particles)
        log_step = last.new_full((1,), math.log(kernel.step_size))
        weights = last.new_full((num_particles, *(1,) * target.nesting), -math.log(num_particles))
        draws = Draws(values, weights, ess=_ess(values), acceptance=torch.tensor(moved[-1]))
        return draws, Chains(last, log_step, log_step, torch.zeros_like(log_step), count)


def _ess(values: Values) -> Tensor:
    """Return the least effective number of draws of all coordinates of one chain."""
    draws = torch.cat([v.reshape(len(v), -1) for v in values.values()], -1)
    if len(draws) < 4:
        return torch.tensor(math.nan)
    return effective_sample_size(draws.unsqueeze(0), chain_dim=0, sample_dim=1).min()
