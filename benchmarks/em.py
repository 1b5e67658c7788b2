"""A half-step of `emvae.EM` against a joint step of `emvae.SVI`, on the same VAE."""

from __future__ import annotations

import pyro

import pyro_emvae as emvae

from .svi import stepper, vae_problem
from .timing import Call, Case


def e_phase(ours: bool) -> Call:
    model, guide, x = vae_problem()
    if not ours:
        return stepper(True, model, guide, x)
    em = emvae.EM(model, guide, pyro.optim.Adam({"lr": 1e-3}))
    em.step(x)
    return lambda: em.e_step.expect(em.engine, em.engine.state, x)


CASES = (Case("e_phase", "E-step of the VAE (one gradient) against a joint step", 1.0, e_phase),)
