"""Half-steps of `emvae.EM`: against a joint step of `emvae.SVI`, and against plain gradients, on the same VAE."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints

import pyro_emvae as emvae

from . import exact_em, vae
from .svi import stepper
from .timing import Call, Case


def e_phase(ours: bool) -> Call:
    (model, _, guide), x = vae.problem(), vae.images()
    if not ours:
        return stepper(True, model, guide, x)
    em = emvae.EM(model, guide, pyro.optim.Adam({"lr": 1e-3}))
    em.step(x)
    return lambda: em.e_step.expect(em.engine, em.engine.state, x)


def hmc(ours: bool) -> Call:
    """One move of every datum's chain, 10 leapfrogs, against 10 gradients of the same model by the latents."""
    (model, _, _), x = vae.problem(), vae.images(1000)
    if ours:
        e_step = emvae.steps.MonteCarlo("hmc", num_particles=1, num_leapfrog=10, num_warmup=1)
        em = emvae.EM(model, None, pyro.optim.Adam({"lr": 1e-3}), e_step=e_step)
        em.step(x)
        return lambda: em.e_step.expect(em.engine, em.engine.state, x)

    def gradients() -> None:
        z = torch.randn(1000, 20)
        for _ in range(10):
            z = z.detach().requires_grad_()
            trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x)
            torch.autograd.grad(trace.log_prob_sum(), z)

    return gradients


def overlapping(number: int) -> tuple[Call, torch.Tensor]:
    """Three normals in two dimensions, near enough that EM takes some 30 to 200 iterations."""
    x = torch.randn(number, 2, dtype=torch.float64) * torch.tensor([1.0, 0.6], dtype=torch.float64)
    x += torch.tensor([[0.0, 0.0], [2.2, 1.5], [-1.5, 2.2]], dtype=torch.float64)[torch.randint(3, (number,))]

    def model(x: torch.Tensor) -> None:
        weights = pyro.param("weights", x.new_ones(3) / 3, constraint=constraints.simplex)
        means = pyro.param("means", x[:3].clone())
        scales = pyro.param("scales", torch.eye(2).to(x).repeat(3, 1, 1), constraint=constraints.lower_cholesky)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.MultivariateNormal(means[z], scale_tril=scales[z]), obs=x)

    return model, x


def restarts(number: int, runs: int, **options: Any) -> Callable[[bool], Call]:
    """Ten starts, against so many runs, from the first starts of these in turn, to the same rule's end."""

    def setup(ours: bool) -> Call:
        model, x = overlapping(number)
        seeds = itertools.cycle(range(1, 11))

        def run(**more: Any) -> None:
            pyro.clear_param_store()
            em = emvae.EM(model, e_step="enumerated", m_step=emvae.steps.gaussian_mixture(3))
            em.run(x, **options, **more)

        def ten() -> None:
            run(n_init=10, seed=next(seeds))

        def alone() -> None:
            for _ in range(runs):
                seed = next(seeds)
                run(seed=seed, init=lambda seed, x: emvae.steps.gaussian_mixture(3).start(seed, {}, x))

        return ten if ours else alone

    return setup


CASES = (
    Case("e_phase", "E-step of the VAE (one gradient) against a joint step", 1.0, e_phase),
    Case("restarts_small", "10 starts of a mixture, N = 1,000, against one", 4.0, restarts(1_000, 1)),
    Case(
        "restarts_large",
        "10 starts of a mixture, N = 20,000, 20 iterations, against 10 runs",
        1.0,
        restarts(20_000, 10, max_iter=20, stop=None),
    ),
    Case("hmc", "HMC E-step, 1,000 data, 10 leapfrogs, against 10 plain gradients by z", 3.0, hmc),
    *exact_em.CASES,
)
