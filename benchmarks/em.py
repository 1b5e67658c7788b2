"""Half-steps of `emvae.EM`: against a joint step of `emvae.SVI`, and against plain gradients, on the same VAE."""

from __future__ import annotations

import pyro
import torch
from pyro import poutine

import pyro_emvae as emvae

from . import exact_em
from .svi import stepper, vae_problem
from .timing import Call, Case


def e_phase(ours: bool) -> Call:
    model, guide, x = vae_problem()
    if not ours:
        return stepper(True, model, guide, x)
    em = emvae.EM(model, guide, pyro.optim.Adam({"lr": 1e-3}))
    em.step(x)
    return lambda: em.e_step.expect(em.engine, em.engine.state, x)


def hmc(ours: bool) -> Call:
    """One move of every datum's chain, 10 leapfrogs, against 10 gradients of the same model by the latents."""
    model, _, x = vae_problem(batch=1000)
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


CASES = (
    Case("e_phase", "E-step of the VAE (one gradient) against a joint step", 1.0, e_phase),
    Case("hmc", "HMC E-step, 1,000 data, 10 leapfrogs, against 10 plain gradients by z", 3.0, hmc),
    *exact_em.CASES,
)
