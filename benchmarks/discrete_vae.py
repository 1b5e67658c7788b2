r"""A VAE with Bernoulli latents on the digits, trained with each estimator for equal time: held-out bounds.

    python -m benchmarks discrete_vae [--seconds 60] [--seeds 5] [--latents 20 200] [--estimators NAME ...] [--write]

Each run is a cell of a JSON file (``--path``); those that are there are not run again, so that a benchmark that was
stopped goes on. Time is the processor's, of one thread: on an idle machine that is wall time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_emvae as emvae
from pyro_emvae import problems
from pyro_emvae._registry import entries, lookup

from .page import PROVISIONAL, is_busy, markdown

TITLE = "A discrete VAE on the digits"
PIXELS, HIDDEN, TRAIN, BATCH = 64, 100, 1000, 100
PARTICLES, RATE, DRAWS = 4, 3e-3, 500
RESULTS = Path("results/discrete_vae.json")
TEXT = """z ~ Bernoulli with learned logits, x | z by a network of {hidden} hidden units, as the guide has; {train:,}
images for training in batches of {batch}, the others held out. Adam, learning rate {rate:g}, {particles} particles or
the nearest number that an estimator takes, recorded steps, {seconds:g} seconds of one thread for each run, {seeds}
seeds: mean over seeds and its standard error, in nats per image. The bound is the log of the mean of {draws} weights,
which lies below log p(x)."""


def make(latents: int, seed: int) -> tuple[Callable, Callable]:
    """Return model and guide, called with images and with the number of data that they stand for."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, latents))
    decoder = nn.Sequential(nn.Linear(latents, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, PIXELS))
    torch.set_rng_state(generator_state)

    def plate(x: Tensor, total: int | None) -> pyro.plate:
        return pyro.plate("data", total or len(x), subsample=torch.arange(len(x)), dim=-1)

    def model(x: Tensor, total: int | None = None) -> None:
        pyro.module("decoder", decoder)
        prior = pyro.param("prior", lambda: torch.zeros(latents))
        with plate(x, total):
            z = pyro.sample("z", dist.Bernoulli(logits=prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(2 * z - 1)).to_event(1), obs=x)

    def guide(x: Tensor, total: int | None = None) -> None:
        pyro.module("encoder", encoder)
        with plate(x, total):
            pyro.sample("z", dist.Bernoulli(logits=encoder(2 * x - 1)).to_event(1))

    return model, guide


def estimators() -> list[str]:
    """Return the names of the registered estimators that can train this model."""
    x = torch.zeros(2, PIXELS)
    return [e.name for e in entries("estimator") if not e.traits.arguments and particles_of(e.name, x) is not None]


def particles_of(name: str, x: Tensor) -> int | None:
    """Return how many particles an estimator gets: PARTICLES, or the nearest number that it takes."""
    model, guide = make(2, 0)
    for number in sorted(range(1, 9), key=lambda n: (abs(n - PARTICLES), n)):
        try:
            with pyro.get_param_store().scope():
                emvae.MonteCarloELBO(number, estimator=name).prepare(model, guide, (x,), {})
        except emvae.EmvaeError:
            continue
        return number
    return None


def run(name: str, latents: int, seed: int, seconds: float) -> dict[str, float]:
    """Train once and return the held-out bounds per image."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    digits = problems.load_digits_binary(TRAIN, seed=0)
    model, guide = make(latents, seed)
    loss = emvae.MonteCarloELBO(particles_of(name, digits.train[:2]), estimator=name)
    svi = emvae.SVI(model, guide, pyro.optim.Adam({"lr": RATE}), loss, backend="graph")
    order, steps, start = torch.Generator().manual_seed(seed), 0, time.process_time()
    while time.process_time() - start < seconds:
        for rows in torch.randperm(TRAIN, generator=order).split(BATCH):
            svi.step(digits.train[rows], TRAIN)
            steps += 1
    count = len(digits.test)
    bound = emvae.log_evidence(model, guide, digits.test, num_particles=DRAWS, seed=seed)
    elbo = emvae.elbo(model, guide, digits.test, num_particles=DRAWS // 5, seed=seed)
    return {"steps": steps, "elbo": elbo.value / count, "bound": bound.value / count}


def cells(names: Sequence[str], latents: Sequence[int], seeds: int, seconds: float, path: Path) -> dict[str, Any]:
    """Run what the file does not have yet, seed by seed, and return all cells of these settings."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    wanted = {_key(n, d, s, seconds): (n, d, s) for s in range(seeds) for d in latents for n in names}
    for key, cell in wanted.items():
        if key not in known:
            known[key] = run(*cell, seconds)
            _write(path, known)
            print(key, known[key], flush=True)
    return {key: known[key] for key in wanted}


def _key(name: str, latents: int, seed: int, seconds: float) -> str:
    return f"{name}, {latents} latents, seed {seed}, {seconds:g} s"


def _write(path: Path, known: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = path.with_name(f".{path.name}.tmp")
    waiting.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    os.replace(waiting, path)


def section(options: argparse.Namespace) -> str:
    """Return the section's text and table."""
    names = options.estimators or estimators()
    found = cells(names, options.latents, options.seeds, options.seconds, options.path)
    lines = []
    for latents in options.latents:
        for name in names:
            runs = [found[_key(name, latents, seed, options.seconds)] for seed in range(options.seeds)]
            label = f"`{name}`" + ("" if lookup("estimator", name).traits.unbiased else " (biased)")
            figures = [_mean([r[figure] for r in runs]) for figure in ("elbo", "bound")]
            lines.append((str(latents), label, *figures, f"{fmean(r['steps'] for r in runs):,.0f}"))
    text = TEXT.format(
        hidden=HIDDEN,
        train=TRAIN,
        batch=BATCH,
        rate=RATE,
        particles=PARTICLES,
        draws=DRAWS,
        seconds=options.seconds,
        seeds=options.seeds,
    )
    return f"{text}\n\n{markdown(('latents', 'estimator', 'ELBO', 'bound', 'steps'), lines)}"


def _mean(values: Sequence[float]) -> str:
    """Return the mean and its standard error."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{fmean(values):.2f} +- {error:.2f}"


def main(arguments: list[str]) -> int:
    """Run what is missing, print the section, and write it if asked to."""
    from .estimators import INTRODUCTION, ORDER, TARGET
    from .page import write

    options = parse(arguments)
    torch.set_num_threads(1)
    busy = is_busy()
    body = section(options)
    if busy or is_busy():
        body += f"\n\n{PROVISIONAL}"
    print(body)
    if options.write:
        write(TARGET, INTRODUCTION, ORDER, {TITLE: body})
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks discrete_vae", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--latents", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--estimators", nargs="*", help="by default all that are registered and fit")
    parser.add_argument("--path", type=Path, default=RESULTS, help="where finished runs are kept")
    parser.add_argument("--write", action="store_true", help="also write the section of the page")
    return parser.parse_args(arguments)
