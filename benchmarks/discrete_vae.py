r"""A VAE with Bernoulli latents on the digits, trained with each estimator for equal time: held-out bounds.

    python -m benchmarks discrete_vae [--seconds 6] [--seeds 5] [--latents 20 200] [--estimators NAME ...] [--write]

Equal time is a number of updates for each estimator: the seconds over those of one update, which are measured once,
all estimators in turn in one process, and kept. Training then takes as long as it takes, and its figures can be had
again anywhere. Each run is a cell of a JSON file (``--path``), as is the calibration; those that are there are not made
again, so that a benchmark that was stopped goes on.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_emvae as emvae
from pyro_emvae._registry import entries, lookup

from . import discrete_vae_text

TITLE = "A discrete VAE on the digits"
PIXELS, HIDDEN, TRAIN, BATCH = 64, 100, 1000, 100
PARTICLES, RATE, DRAWS = 4, 3e-3, 500
REFERENCE = "score"
LEAST_TURNS, MOST_TURNS, PRECISION = 9, 60, 0.02
PATH = Path(__file__).with_name("discrete_vae.json")


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    """Return grey levels of the training images, between 0 and 1, and the others, drawn once as zeros and ones."""
    from sklearn.datasets import load_digits

    generator = torch.Generator().manual_seed(0)
    grey = torch.as_tensor(load_digits(return_X_y=True)[0]).float() / 16
    grey = grey[torch.randperm(len(grey), generator=generator)]
    return grey[:TRAIN], torch.bernoulli(grey[TRAIN:], generator=generator)


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


def objective_of(name: str) -> str:
    """Return what an estimator is trained on: the ELBO, or the bound of several samples if it is for these alone."""
    return "elbo" if {"elbo", "any"} & set(lookup("estimator", name).traits.objectives) else "iwae"


def loss_of(name: str, particles: int) -> emvae.MonteCarloELBO:
    return emvae.MonteCarloELBO(particles, estimator=name, objective=objective_of(name))


def estimators() -> list[str]:
    """Return the names of the registered estimators that can train this model."""
    return [e.name for e in entries("estimator") if not e.traits.arguments and particles_of(e.name) is not None]


@functools.cache
def particles_of(name: str) -> int | None:
    """Return how many particles an estimator gets: PARTICLES, or the nearest number that it takes."""
    model, guide = make(2, 0)
    for number in sorted(range(1, 9), key=lambda n: (abs(n - PARTICLES), n)):
        try:
            with pyro.get_param_store().scope():
                loss_of(name, number).prepare(model, guide, (torch.zeros(2, PIXELS),), {})
        except emvae.EmvaeError:
            continue
        return number
    return None


class Training:
    """One run, in a parameter store of its own; runs of one seed have one start, one order and one noise of images."""

    def __init__(self, name: str, latents: int, seed: int) -> None:
        self.seed, self.draws, self.rows = seed, torch.Generator().manual_seed(seed), iter(())
        with pyro.get_param_store().scope() as self.scope:
            pyro.set_rng_seed(seed)
            self.model, self.guide = make(latents, seed)
            optim, loss = pyro.optim.Adam({"lr": RATE}), loss_of(name, particles_of(name))
            self.svi = emvae.SVI(self.model, self.guide, optim, loss, backend="graph")

    def update(self, times: int = 1) -> float:
        """Make so many updates and return the processor's seconds of one of them."""
        with pyro.get_param_store().scope(self.scope) as self.scope:
            start = time.process_time()
            for _ in range(times):
                self.svi.step(self._batch(), TRAIN)
            return (time.process_time() - start) / max(1, times)

    def _batch(self) -> Tensor:
        """Return the next images, with a new value of each pixel every time that an image comes."""
        rows = next(self.rows, None)
        if rows is None:
            self.rows = iter(torch.randperm(TRAIN, generator=self.draws).split(BATCH))
            rows = next(self.rows)
        return torch.bernoulli(images()[0][rows], generator=self.draws)

    def bounds(self) -> dict[str, float]:
        """Return the bounds per held-out image, and the ELBO of the training images."""
        grey, test = images()
        train = torch.bernoulli(grey, generator=torch.Generator().manual_seed(0))
        with pyro.get_param_store().scope(self.scope) as self.scope:
            bound = emvae.log_evidence(self.model, self.guide, test, num_particles=DRAWS, seed=self.seed)
            elbo, fitted = (
                emvae.elbo(self.model, self.guide, x, num_particles=DRAWS // 5, seed=self.seed) for x in (test, train)
            )
        figures = {"elbo": elbo.value / len(test), "bound": bound.value / len(test), "train": fitted.value / TRAIN}
        return {name: round(value, 4) for name, value in figures.items()}


def run(name: str, latents: int, seed: int, updates: int) -> dict[str, float]:
    """Train once and return the bounds per image."""
    training = Training(name, latents, seed)
    training.update(updates)
    return training.bounds()


def calibrate(names: Sequence[str], latents: int) -> dict[str, dict[str, Any]]:
    """Return the time of one update of each estimator as a ratio to that of the reference, and its milliseconds.

    All are timed in turn, about 50 ms each; a ratio is the median over the turns. Turns are repeated until the
    standard error of every median is below 2 % (60 turns at most), from the quartiles as if the ratios were normal.
    """
    order = [REFERENCE, *(name for name in names if name != REFERENCE)]
    sides, times = {name: Training(name, latents, 0) for name in order}, {name: [] for name in order}
    for side in sides.values():
        side.update(3)
    calls = {name: max(1, round(0.05 / side.update())) for name, side in sides.items()}
    gc.collect()
    gc.disable()
    try:
        for turn in range(MOST_TURNS):
            for name in order if turn % 2 else reversed(order):
                times[name].append(sides[name].update(calls[name]))
            found = {name: _timed(times[name], times[REFERENCE]) for name in order}
            if turn + 1 >= LEAST_TURNS and all(row["error"] < PRECISION for row in found.values()):
                break
    finally:
        gc.enable()
    return found


def _timed(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    error = 1.2533 * (high - low) / 1.349 / len(ratios) ** 0.5 / middle
    figures = {"ratio": middle, "low": low, "high": high, "error": error, "ms": 1e3 * median(ours)}
    return {"turns": len(ratios), **{name: float(f"{value:.4g}") for name, value in figures.items()}}


def updates(calibration: Mapping[str, Mapping[str, Any]], name: str, seconds: float) -> int:
    """Return how many updates an estimator has time for."""
    return max(1, round(1e3 * seconds / calibration[REFERENCE]["ms"] / calibration[name]["ratio"]))


def cells(options: argparse.Namespace, names: Sequence[str]) -> tuple[dict[int, dict], dict[tuple, dict]]:
    """Make what the file does not have yet, seed by seed; return calibrations by latents and all cells' figures."""
    known = json.loads(options.path.read_text(encoding="utf-8")) if options.path.exists() else {}
    clocks, made = known.setdefault("calibration", {}), known.setdefault("runs", {})
    for latents in map(str, options.latents):
        clock = clocks.setdefault(latents, {})
        if missing := [name for name in names if name not in clock]:
            clocks[latents] = calibrate(missing, int(latents)) | clock
            _write(options.path, known)
    found = {}
    for cell in ((name, d, seed) for seed in range(options.seeds) for d in options.latents for name in names):
        name, latents, seed = cell
        number = updates(clocks[str(latents)], name, options.seconds)
        key = f"{name}, {latents} latents, {number} updates, seed {seed}"
        if key not in made:
            made[key] = run(name, latents, seed, number)
            _write(options.path, known)
            print(key, made[key], flush=True)
        found[cell] = {"updates": number, **made[key]}
    return {d: clocks[str(d)] for d in options.latents}, found


def _write(path: Path, known: Mapping[str, Any]) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = path.with_name(f".{path.name}.tmp")
    waiting.write_text(_dump(known) + "\n", encoding="utf-8")
    os.replace(waiting, path)


def _dump(value: Any) -> str:
    """Return JSON with a line for each innermost mapping."""
    if not isinstance(value, Mapping) or not any(isinstance(item, Mapping) for item in value.values()):
        return json.dumps(value)
    rows = (f"{json.dumps(key)}: {_dump(item)}" for key, item in value.items())
    return "{\n" + ",\n".join(rows) + "\n}"


def section(options: argparse.Namespace) -> str:
    """Return the section's text and tables."""
    names = options.estimators or estimators()
    return discrete_vae_text.section(options, names, *cells(options, names))


def main(arguments: list[str]) -> int:
    """Run what is missing, print the section, and write it if asked to."""
    from .estimators import INTRODUCTION, ORDER, TARGET
    from .page import write

    options = parse(arguments)
    torch.set_num_threads(1)
    print(body := section(options))
    if options.write:
        write(TARGET, INTRODUCTION, ORDER, {TITLE: body})
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks discrete_vae", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="of each run, at the speed of the calibration")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--latents", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--estimators", nargs="*", help="by default all that are registered and fit")
    parser.add_argument("--path", type=Path, default=PATH, help="where calibration and finished runs are kept")
    parser.add_argument("--write", action="store_true", help="also write the section of the page")
    return parser.parse_args(arguments)
