r"""The VAE of the benchmarks: normal latents, one hidden layer either way, on random images of zeros and ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


def network(*widths: int) -> nn.Sequential:
    layers = [module for a, b in itertools.pairwise(widths) for module in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


def problem(pixels: int = 784, hidden: int = 400, latents: int = 20) -> tuple[Callable, nn.Module, Callable]:
    """Return the model, an encoder, and the guide by hand that has it; the sizes are those of Pyro's tutorial."""
    decoder, encoder = network(latents, hidden, pixels), network(pixels, hidden, 2 * latents)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latents), x.new_ones(latents)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z), validate_args=False).to_event(1), obs=x)

    return model, encoder, by_hand(encoder)


def by_hand(encoder: nn.Module, scaled: Callable[[Tensor], Tensor] = lambda x: x) -> Callable:
    """Return the guide whose locations and scales are the two halves of what an encoder returns of scaled images."""

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, scale = encoder(scaled(x)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(scale)).to_event(1))

    return guide


def images(batch: int = 128, pixels: int = 784) -> Tensor:
    return torch.rand(batch, pixels).round()
