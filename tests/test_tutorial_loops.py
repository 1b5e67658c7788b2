r"""Loops of the shape of Pyro's tutorials on the variational autoencoder and on Gaussian mixtures, unchanged around EM.

Each loop is a function of the object that it steps; it is run with `pyro.infer.SVI` first.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.infer.autoguide import AutoDelta
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pyro_emvae as emvae
from pyro_emvae import EM, ModelError
from pyro_emvae.posterior import AtPointMasses

# A variational autoencoder --------------------------------------------------------------------------------------------

PIXELS, LATENTS = 16, 2


def images() -> tuple[Tensor, Tensor]:
    """Bars of two orientations with flipped pixels, for training and for testing."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(4, (160, 1), generator=generator)
    grid = torch.arange(PIXELS)
    clean = torch.where(kind < 2, grid // 4 % 2 == kind % 2, grid % 2 == kind % 2)
    noisy = clean ^ (torch.rand(clean.shape, generator=generator) < 0.05)
    return noisy.float().split([120, 40])


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder = nn.Sequential(nn.Linear(LATENTS, 12), nn.Softplus(), nn.Linear(12, PIXELS))
        self.encoder = nn.Sequential(nn.Linear(PIXELS, 12), nn.Softplus(), nn.Linear(12, 2 * LATENTS))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def autoencoder_loop(svi: Any, epochs: int = 5) -> tuple[list[float], list[float]]:
    """Train by epochs; evaluate on held-out images every other epoch."""
    train, test = (DataLoader(x, batch_size=20) for x in images())
    losses, held_out = [], []
    for epoch in range(epochs):
        losses.append(sum(svi.step(x) for x in train) / len(train.dataset))
        if epoch % 2 == 0:
            held_out.append(sum(svi.evaluate_loss(x) for x in test) / len(test.dataset))
    return losses, held_out


def autoencoder(kind: Any, **options: Any) -> tuple[list[float], list[float]]:
    pyro.clear_param_store()
    module = Autoencoder()
    pyro.set_rng_seed(0)
    return autoencoder_loop(kind(module.model, module.guide, pyro.optim.Adam({"lr": 0.02}), **options))


def test_the_loop_of_an_autoencoder():
    theirs = autoencoder(infer.SVI, loss=infer.Trace_ELBO())
    joint = autoencoder(EM, loss=emvae.MonteCarloELBO(estimator="pyro"), schedule="joint")
    for mine, other in zip(joint, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    losses, held_out = autoencoder(EM, loss=infer.Trace_ELBO())
    assert losses[-1] < losses[0] - 0.5 and held_out[-1] < held_out[0]


# A Gaussian mixture with priors on its parameters ---------------------------------------------------------------------

X = torch.tensor([-1.2, 0.1, 0.4, 8.8, 9.9, 10.4, 11.1], dtype=torch.float64)
GLOBALS = ["weights", "scale", "locs"]


@infer.config_enumerate
def mixture(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(x.new_full((2,), 0.5)))
    scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 2.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(x.new_zeros(()), 10.0))
    with pyro.plate("data", len(x)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(locs[assignment], scale), obs=x)


def start(site: dict[str, Any]) -> Tensor:
    return {"weights": X.new_full((2,), 0.5), "scale": X.new_tensor(3.0), "locs": X.new_tensor([1.0, 8.0])}[
        site["name"]
    ]


def mixture_loop(svi: Any, guide: Any) -> tuple[list[float], dict[str, list[float]], dict[str, Tensor]]:
    """Step, with hooks that record the gradients' norms, and return the point estimates that the guide has."""
    losses, norms = [svi.step(X)], defaultdict(list)
    for name, leaf in pyro.get_param_store().named_parameters():
        leaf.register_hook(lambda g, name=name: norms[name].append(g.norm().item()))
    losses += [svi.step(X) for _ in range(40)]
    return losses, dict(norms), {name: value.detach().clone() for name, value in guide(X).items()}


def tutorial(make: Any) -> tuple[list[float], dict[str, list[float]], dict[str, Tensor], Any]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoDelta(poutine.block(mixture, expose=GLOBALS), init_loc_fn=start)
    guide(X)
    svi = make(guide, pyro.optim.Adam({"lr": 0.1, "betas": [0.8, 0.99]}))
    return *mixture_loop(svi, guide), svi


def by_svi(guide: Any, optim: Any) -> infer.SVI:
    return infer.SVI(mixture, guide, optim, loss=infer.TraceEnum_ELBO(max_plate_nesting=1))


def by_joint_steps(guide: Any, optim: Any) -> EM:
    return EM(mixture, guide, optim, loss=infer.TraceEnum_ELBO(max_plate_nesting=1), schedule="joint")


def by_em(guide: Any, optim: Any, **options: Any) -> EM:
    return EM(AtPointMasses(mixture, guide), optim=optim, e_step="enumerated", **options)


def log_p(values: dict[str, Tensor]) -> Tensor:
    """log p(x, weights, scale, locs), the assignments summed out by hand."""
    weights, scale, locs = (values[name] for name in GLOBALS)
    prior = dist.Dirichlet(X.new_full((2,), 0.5)).log_prob(weights) + dist.LogNormal(0.0, 2.0).log_prob(scale)
    components = weights.log() + dist.Normal(locs, scale).log_prob(X[:, None])
    return prior + dist.Normal(0.0, 10.0).log_prob(locs).sum() + components.logsumexp(-1).sum()


@pytest.mark.parametrize("make", [by_joint_steps, by_em])
def test_the_loop_of_a_mixture_with_point_masses(make):
    """By Fisher's identity the M-step's gradient after an exact E-step is SVI's with the assignments summed out."""
    losses, norms, points, _ = tutorial(by_svi)
    mine, my_norms, my_points, svi = tutorial(make)
    assert mine == pytest.approx(losses, rel=1e-6) and set(my_norms) == set(norms)
    for name, path in norms.items():
        assert my_norms[name] == pytest.approx(path, rel=1e-4, abs=1e-6)
    for name, value in points.items():
        torch.testing.assert_close(my_points[name], value, rtol=1e-5, atol=1e-8)
    assert {row.block for row in svi.blocks.rows} == {"model"}
    assert -svi.step(X) == pytest.approx(float(log_p(my_points)), rel=1e-7)


def test_the_memberships_are_those_by_hand_and_the_estimate_is_a_mode():
    optim = functools.partial(by_em, m_step=emvae.steps.Gradient(8))
    _, _, points, svi = tutorial(optim)
    weights, scale, locs = (points[name] for name in GLOBALS)
    expected = (weights.log() + dist.Normal(locs, scale).log_prob(X[:, None])).softmax(-1)
    torch.testing.assert_close(svi.posterior(X).marginal("assignment").probs, expected, rtol=1e-8, atol=1e-12)
    leaves = {name: value.clone().requires_grad_() for name, value in points.items()}
    free = {"weights": leaves["weights"] / leaves["weights"].sum(), "scale": leaves["scale"], "locs": leaves["locs"]}
    gradients = torch.autograd.grad(log_p(free), list(leaves.values()))
    assert float(torch.cat([g.flatten() for g in gradients[1:]]).abs().max()) < 0.1
    new = torch.tensor([0.0, 10.0], dtype=torch.float64)
    predicted = infer.Predictive(svi.model, guide=svi.guide, num_samples=5)(new)
    assert torch.equal(predicted["assignment"], torch.tensor([0, 1]).expand(5, 2))


def test_a_latent_of_the_guide_that_is_no_point_mass():
    def guide(x: Tensor) -> None:
        pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 1.0))

    with pytest.raises(ModelError, match=r"'scale'.*LogNormal\(\)"):
        AtPointMasses(mixture, guide)(X)
