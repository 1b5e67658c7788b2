r"""Signal-to-noise ratios of gradients of multi-sample bounds against the number of samples (Rainforth et al. 2018)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_emvae as emvae
from pyro_emvae._registry import entries, lookup
from pyro_emvae.plots import snr_slopes

from .page import markdown

Problem = tuple[Callable, Callable, Tensor]
# Numbers of samples and of replicates: ratios fall below the floor of few replicates, and large ratios need only few.
PARTS = {"small": ((1, 2, 4, 8, 16, 32), 40_000), "large": ((64, 128, 256, 512, 1024), 2_000)}
SHAPE = {"num_data": 4, "dim": 20}


class Row(NamedTuple):
    """Objective, estimator, block; the part that the slope is fitted in, what it is, and how near it has to be."""

    objective: str
    estimator: str
    block: str
    part: str
    slope: float | None = None
    tolerance: float = 0.0


ROWS = (
    Row("iwae", "pathwise", "model", "large", 0.5, 0.05),
    Row("iwae", "pathwise", "guide", "small", -0.5, 0.05),
    Row("iwae", "dreg", "guide", "large", 0.5, 0.05),
    Row("iwae", "vimco", "guide", "small"),
    Row("iwae", "ovis", "guide", "large", 0.5, 0.05),
    Row("elbo", "pathwise", "guide", "small", 0.5, 0.05),
)
TEXT = """The toy of Rainforth et al. 2018: z ~ N(mu, I), x | z ~ N(z, I), q(z | x) = N(A x + b, 2/3 I), D = {dim};
mu, A and b are the optimum of 1,024 data drawn from the model, plus 0.01 N(0, 1), and the gradient is that of the first
{num_data} data, M = 1. Slopes of log SNR by log K over
{ranges};
points below 3/sqrt(R) cannot be told from noise and are left out.

Expected are limits of large K. The theorem of Rainforth et al.: +1/2 for theta (mu), -1/2 for phi (b) by pathwise
gradients, which sink below the noise as K grows. Tucker et al. 2019: +1/2 for phi doubly reparameterised; with few
samples it hardly rises, so that the slope is fitted where K is large. Of the score-function gradients of phi, that of
`ovis` (gamma = 0, unbiased) has +1/2 by Lievin et al. 2020; of `vimco` no limit is known to us. The `elbo` row averages
K gradients: its slope is +1/2 by the law of large numbers."""


def gaussian_toy(num_data: int = 4, dim: int = 20, perturbation: float = 0.01, seed: int = 0) -> Problem:
    """Return model, guide and data near the optimum of 1,024 data; theta is ``mu``, phi is ``b``."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    whole = noise(1024, dim) * 2**0.5 + noise(dim)
    x, mean = whole[:num_data], whole.mean(0)
    start = {"mu": mean, "b": mean / 2}
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


def fits(row: Row) -> bool:
    """Whether the row's objective and estimator are registered and fit each other."""
    estimators = {e.name: e for e in entries("estimator")}
    if row.estimator not in estimators or row.objective not in {e.name for e in entries("objective")}:
        return False
    kinds = {"elbo"} if row.objective == "elbo" else {row.objective, "multi_sample"}
    return bool({"any", *kinds} & set(estimators[row.estimator].traits.objectives))


def measure(objective: str, estimator: str, counts: tuple[int, ...], replicates: int, **shape: Any) -> Any:
    """Return the sweep of one estimator of one objective over the numbers of samples that it takes."""
    pyro.clear_param_store()
    model, guide, x = gaussian_toy(**shape)
    least = lookup("estimator", estimator).traits.min_particles
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
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
    parts = {"small": ((1, 4), 500), "large": ((8, 16), 500)} if quick else PARTS
    counts = [count for some, _ in parts.values() for count in some]
    sweeps: dict[tuple[str, str], dict[str, Any]] = {}
    lines = []
    for row in ROWS:
        label = (row.objective, f"`{row.estimator}`", {"model": "theta (mu)", "guide": "phi (b)"}[row.block])
        expected = "" if row.slope is None else f"{row.slope:+.1f} +- {row.tolerance:g}"
        if not fits(row):
            lines.append((*label, *[""] * len(counts), "", "", expected, "not registered"))
            continue
        if (key := (row.objective, row.estimator)) not in sweeps:
            sweeps[key] = {name: measure(*key, *part, **SHAPE) for name, part in parts.items()}
        found = {name: data.sel(block=row.block, estimator=row.estimator) for name, data in sweeps[key].items()}
        got = float(snr_slopes(found[row.part]))
        ok = "" if row.slope is None else "yes" if abs(got - row.slope) <= row.tolerance else "**no**"
        lines.append((*label, *_ratios(found, counts), f"{got:+.2f}", row.part, expected, ok))
    head = ("objective", "estimator", "gradient", *(f"K = {k}" for k in counts), "slope", "over", "expected", "ok")
    ranges = " or ".join(f"{name} K, {some[0]} to {some[-1]}, R = {many:,}" for name, (some, many) in parts.items())
    return f"{TEXT.format(**SHAPE, ranges=ranges)}\n\n{markdown(head, lines)}"


def _ratios(found: dict[str, Any], counts: list[int]) -> list[str]:
    """Return the ratios by number of samples, of those that are there and above the floor."""
    texts = {}
    for data in found.values():
        floor = data.attrs["snr_floor"]
        for count in data.num_particles.values:
            ratio = float(data.snr.sel(num_particles=count))
            texts[int(count)] = f"{ratio:.3g}" if ratio > floor else "noise"
    return [texts.get(count, "") for count in counts]
