"""`emvae.SVI.step` against `pyro.infer.SVI.step` with `Trace_ELBO` and the same optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_emvae as emvae

from . import vae
from .timing import Call, Case


def stepper(ours: bool, model: Callable, guide: Callable, *args: Any, **options: Any) -> Call:
    """Return the call that makes one step of SVI."""
    optim = pyro.optim.Adam({"lr": 1e-3})
    make = emvae.SVI if ours else pyro.infer.SVI
    svi = make(model, guide, optim, **options) if ours else make(model, guide, optim, Trace_ELBO())
    return lambda: svi.step(*args)


def vae_step(ours: bool) -> Call:
    model, _, guide = vae.problem()
    return stepper(ours, model, guide, vae.images())


def eight_schools(ours: bool, **options: Any) -> Call:
    problem = emvae.problems.eight_schools()
    return stepper(ours, problem.model, AutoNormal(problem.model), *problem.args, **options)


def eight_schools_graph(ours: bool) -> Call:
    return eight_schools(ours, **({"backend": "graph"} if ours else {}))


NAMES = [f"z{i}" for i in range(150)]


def many_sites_model() -> None:
    total = sum(pyro.sample(name, dist.Normal(0.0, 1.0)) for name in NAMES)
    pyro.sample("x", dist.Normal(total, 1.0), obs=torch.tensor(3.0))


def many_sites(ours: bool) -> Call:
    def guide() -> None:
        for name in NAMES:
            loc = pyro.param(f"{name}_loc", lambda: torch.tensor(0.0))
            scale = pyro.param(f"{name}_scale", lambda: torch.tensor(1.0), constraint=dist.constraints.positive)
            pyro.sample(name, dist.Normal(loc, scale))

    return stepper(ours, many_sites_model, guide)


def many_sites_autonormal(ours: bool) -> Call:
    return stepper(ours, many_sites_model, AutoNormal(many_sites_model))


def deep_network(ours: bool, layers: int = 150, width: int = 8) -> Call:
    """Regression on a latent input, by a network of two tensors per layer."""
    network = nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width), nn.Tanh())))
    y = torch.randn(64, width)

    def model() -> None:
        pyro.module("network", network)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(width), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(network(z), 1.0).to_event(1), obs=y)

    def guide() -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.zeros(len(y), width)), 1.0).to_event(1))

    return stepper(ours, model, guide)


CASES = (
    Case("vae", "step of a VAE 784-400-20, batch 128", 1.0, vae_step),
    Case("eight_schools", "step of eight schools, AutoNormal", 1.0, eight_schools),
    Case("eight_schools_graph", 'the same, `backend="graph"` against Pyro\'s step', 0.6, eight_schools_graph),
    Case("many_sites", "step of 300 parameters in 150 sites, guide by hand", 0.9, many_sites),
    Case("many_sites_autonormal", "the same, AutoNormal", 0.9, many_sites_autonormal),
    Case("deep_network", "step of a network of 300 tensors", 0.65, deep_network),
)
