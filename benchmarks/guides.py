"""Guides that build themselves against the same guides written by hand, under `pyro.infer.SVI` with `Trace_ELBO`.

    python -m benchmarks guides [--rows N]

prints how many rows an encoder serves per second, and what a guide holds after calls with ever more rows.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_emvae as emvae

from . import vae
from .timing import Call, Case


def amortized(ours: bool, pixels: int = 784, hidden: int = 400, latents: int = 20, batch: int = 128) -> Call:
    model, encoder, guide = vae.problem(pixels, hidden, latents)
    guide = emvae.guides.AutoAmortized(model, encoder) if ours else guide
    svi, x = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()), vae.images(batch, pixels)
    return lambda: svi.step(x)


def amortized_small(ours: bool) -> Call:
    return amortized(ours, 16, 32, 4, 64)


def default_encoder(ours: bool, pixels: int = 784, latents: int = 20) -> Call:
    """The default encoder against the same network in a guide by hand."""
    model, _, _ = vae.problem(pixels, 400, latents)
    guide = vae.by_hand(vae.network(pixels, 128, 128, 2 * latents), lambda x: (x - 0.5) / 0.5)
    guide = emvae.guides.AutoAmortized(model) if ours else guide
    svi, x = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()), vae.images(128, pixels)
    return lambda: svi.step(x)


def encode(ours: bool, rows: int = 1_000_000) -> Call:
    """Draw the latents of a million data."""
    model, encoder, guide = vae.problem(16, 32, 4)
    guide = emvae.guides.AutoAmortized(model, encoder) if ours else guide
    x = vae.images(rows, 16)

    def call() -> None:
        with torch.no_grad():
            guide(x)

    return call


def mean_field(ours: bool, data: int = 0, latents: int = 10) -> Call:
    """A step of eight-schools-like effects, or of `data` local latents all in use, against Pyro's `AutoNormal`."""
    size = data or 8
    x = torch.randn(size, latents)

    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(latents), 5.0).to_event(1))
        tau = pyro.sample("tau", dist.LogNormal(x.new_zeros(latents), 1.0).to_event(1))
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(mu, tau).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = (emvae.guides.AutoMeanField if ours else AutoNormal)(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    return lambda: svi.step(x)


def mean_field_local(ours: bool) -> Call:
    return mean_field(ours, 10_000)


def held() -> int:
    """Return the bytes of all tensors that are alive, each memory once."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def held_after(rows: Sequence[int], ours: bool = True) -> list[int]:
    """Return the bytes that are alive after a step on so many rows, one after the other, whose data are gone."""
    model, encoder, guide = vae.problem(16, 32, 4)
    guide = emvae.guides.AutoAmortized(model, encoder) if ours else guide
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    result = []
    for count in rows:
        svi.step(vae.images(count, 16))
        result.append(held())
    return result


def main(argv: Sequence[str] = ()) -> int:
    """Print throughput and memory; the exit status is 1 if memory grows with the number of data."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks guides")
    parser.add_argument("--rows", type=int, default=1_000_000, help="the most rows")
    most = parser.parse_args(argv).rows
    for ours in (True, False):
        with pyro.get_param_store().scope():
            call = encode(ours, most)
            call()
            clock = time.perf_counter()
            call()
            rate = most / (time.perf_counter() - clock)
            del call
        print(f"{'AutoAmortized' if ours else 'by hand'}: {rate:,.0f} rows a second, of {most:,}, 16-32-4")
    rows = [most // 1000, most // 100, most // 10, most]
    with pyro.get_param_store().scope():
        sizes = held_after(rows)
    for count, size in zip(rows, sizes, strict=True):
        print(f"after a step on {count:>9,} rows: {size / 1024:,.0f} KiB of tensors alive")
    return int(max(sizes) > sizes[0])


CASES = (
    Case("amortized", "step of a VAE 784-400-20, batch 128, `AutoAmortized` against a guide by hand", 1.1, amortized),
    Case("amortized_small", "the same with 16-32-4, batch 64", 1.1, amortized_small),
    Case("default_encoder", "step of that VAE, default encoder against the same network by hand", 1.1, default_encoder),
    Case("mean_field", "step of 8 x 10 effects, `AutoMeanField` against `AutoNormal`", 1.0, mean_field),
    Case("mean_field_local", "the same with 10,000 x 10 local latents", 1.0, mean_field_local),
    Case("encode", "a draw of the latents of 1e6 data, 16-32-4", 1.1, encode),
)
