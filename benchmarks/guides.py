"""Guides that build themselves against the same guides written by hand, under `pyro.infer.SVI` with `Trace_ELBO`."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_emvae as emvae

from .timing import Call, Case


def network(*widths: int) -> nn.Sequential:
    layers = [module for a, b in itertools.pairwise(widths) for module in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


def problem(pixels: int, hidden: int, latents: int) -> tuple[Callable, nn.Module, Callable]:
    """Return a VAE's model, an encoder, and the guide by hand."""
    decoder, encoder = network(latents, hidden, pixels), network(pixels, hidden, 2 * latents)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latents), x.new_ones(latents)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z), validate_args=False).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(scale)).to_event(1))

    return model, encoder, guide


def amortized(ours: bool, pixels: int = 784, hidden: int = 400, latents: int = 20, batch: int = 128) -> Call:
    model, encoder, guide = problem(pixels, hidden, latents)
    guide = emvae.guides.AutoAmortized(model, encoder) if ours else guide
    svi, x = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()), torch.rand(batch, pixels).round()
    return lambda: svi.step(x)


def amortized_small(ours: bool) -> Call:
    return amortized(ours, 16, 32, 4, 64)


def default_encoder(ours: bool, pixels: int = 784, latents: int = 20) -> Call:
    """The default encoder against the same network in a guide by hand."""
    model, _, _ = problem(pixels, 400, latents)
    encoder = network(pixels, 128, 128, 2 * latents)

    def by_hand(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, scale = encoder((x - 0.5) / 0.5).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(scale)).to_event(1))

    guide = emvae.guides.AutoAmortized(model) if ours else by_hand
    svi, x = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()), torch.rand(128, pixels).round()
    return lambda: svi.step(x)


def encode(ours: bool, rows: int = 1_000_000) -> Call:
    """Draw the latents of a million data."""
    model, encoder, guide = problem(16, 32, 4)
    guide = emvae.guides.AutoAmortized(model, encoder) if ours else guide
    x = torch.rand(rows, 16).round()

    def call() -> None:
        with torch.no_grad():
            guide(x)

    return call


CASES = (
    Case("amortized", "step of a VAE 784-400-20, batch 128, `AutoAmortized` against a guide by hand", 1.1, amortized),
    Case("amortized_small", "the same with 16-32-4, batch 64", 1.1, amortized_small),
    Case("default_encoder", "step of that VAE, default encoder against the same network by hand", 1.1, default_encoder),
    Case("encode", "a draw of the latents of 1e6 data, 16-32-4", 1.1, encode),
)
