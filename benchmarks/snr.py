r"""Signal-to-noise ratios of gradients of multi-sample bounds against the number of samples (Rainforth et al. 2018)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_emvae as emvae
from pyro_emvae._registry import entries, lookup
from pyro_emvae.plots import snr_slopes

from .page import markdown

Problem = tuple[Callable, Callable, Tensor]
COUNTS = (1, 2, 4, 8, 16, 32)
# Per row of the table: objective, estimator, block, slope of log SNR by log K, and how near it has to be.
ROWS = (
    ("iwae", "pathwise", "model", 0.5, 0.1),
    ("iwae", "pathwise", "guide", -0.5, 0.1),
    ("iwae", "dreg", "guide", 0.5, 0.3),
    ("iwae", "vimco", "guide", None, None),
    ("iwae", "ovis", "guide", None, None),
    ("elbo", "pathwise", "guide", 0.5, 0.1),
)
TEXT = """The toy of Rainforth et al. 2018: z ~ N(mu, I), x | z ~ N(z, I), q(z | x) = N(x / 2 + b, 2/3 I), D = {dim},
N = {num_data} data, every parameter its optimum plus 0.01 N(0, 1). Slopes of log SNR by log K over K = {counts}, R =
{replicates:,}, fitted where the ratio is above 3/sqrt(R). Their theorem: +1/2 for theta (mu), -1/2 for phi (b); doubly
reparameterised, +1/2 for phi in the limit (with K up to 32 it is still +0.26). The `elbo` row averages K gradients: its
slope is +1/2 by the law of large numbers."""


def gaussian_toy(num_data: int = 4, dim: int = 20, perturbation: float = 0.01, seed: int = 0) -> Problem:
    """Return model, guide and data near the optimum; theta is ``mu``, phi is ``b``."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = noise(num_data, dim) * 2**0.5 + noise(dim)
    start = {"mu": x.mean(0), "b": x.mean(0) / 2}
    start = {name: value + perturbation * noise(dim) for name, value in start.items()}
    matrix = torch.eye(dim, dtype=torch.float64) / 2 + perturbation * noise(dim, dim)
    one, scale = x.new_ones(dim), x.new_full((dim,), (2 / 3) ** 0.5)

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", start["mu"].clone)
        with pyro.plate("data", num_data):
            z = pyro.sample("z", dist.Normal(mu, one).to_event(1))
            pyro.sample("x", dist.Normal(z, one).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        b = pyro.param("b", start["b"].clone)
        with pyro.plate("data", num_data):
            pyro.sample("z", dist.Normal(x @ matrix.T + b, scale).to_event(1))

    return model, guide, x


def available() -> list[tuple]:
    """Return the rows whose objective and estimator are registered and fit each other."""
    objectives, estimators = ({e.name: e for e in entries(kind)} for kind in ("objective", "estimator"))
    kinds = {"elbo": {"elbo", "any"}}
    return [
        row
        for row in ROWS
        if row[0] in objectives
        and row[1] in estimators
        and set(estimators[row[1]].traits.objectives) & kinds.get(row[0], {row[0], "multi_sample", "any"})
    ]


def measure(objective: str, estimator: str, counts: tuple[int, ...], replicates: int, **shape: int) -> Any:
    """Return the sweep of one estimator of one objective over the numbers of samples that it takes."""
    pyro.clear_param_store()
    model, guide, x = gaussian_toy(**shape)
    least = lookup("estimator", estimator).traits.min_particles
    return emvae.sweep_gradients(
        model,
        guide,
        x,
        estimators=[estimator],
        objective=objective,
        num_particles=[count for count in counts if count >= least],
        num_replicates=replicates,
    )


def section(quick: bool = False) -> str:
    """Return the section's text and table."""
    counts, replicates = ((1, 4), 500) if quick else (COUNTS, 20_000)
    shape = {"num_data": 4, "dim": 20}
    sweeps, lines = {}, []
    for objective, estimator, block, slope, tolerance in ROWS:
        label = (objective, f"`{estimator}`", {"model": "theta (mu)", "guide": "phi (b)"}[block])
        expected = "" if slope is None else f"{slope:+.1f}"
        if (objective, estimator, block, slope, tolerance) not in available():
            lines.append((*label, *[""] * len(counts), "", expected, "not registered"))
            continue
        key = (objective, estimator)
        if key not in sweeps:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sweeps[key] = measure(objective, estimator, counts, replicates, **shape)
        data = sweeps[key].sel(block=block, estimator=estimator)
        by_count = {int(k): float(data.snr.sel(num_particles=k)) for k in data.num_particles}
        ratios = [_ratio(by_count.get(count), data.attrs["snr_floor"]) for count in counts]
        got = float(snr_slopes(data))
        ok = "" if slope is None else "yes" if abs(got - slope) <= tolerance else "**no**"
        lines.append((*label, *ratios, f"{got:+.2f}", expected, ok))
    head = ("objective", "estimator", "gradient", *(f"K = {k}" for k in counts), "slope", "expected", "ok")
    text = TEXT.format(**shape, counts=", ".join(map(str, counts)), replicates=replicates)
    return f"{text}\n\n{markdown(head, lines)}"


def _ratio(snr: float | None, floor: float) -> str:
    return "" if snr is None else f"{snr:.3g}" if snr > floor else "noise"
