r"""Discrete estimators at equal numbers of model evaluations: one bit, a vector of bits, a category."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_emvae as emvae
from pyro_emvae._registry import entries, lookup

from .page import markdown

EVALUATIONS = (2, 4, 8)
EXACT = 1e-10
TEXT = """Variance of the gradient by the logits, mean over coordinates, of whatever is registered and fits, at {counts}
model evaluations (`compare_gradients(..., equal="evaluations")`; a dash where an estimator cannot be had for so few).
{replicates:,} replicates at fixed parameters, where what an estimator learns on the way (`decaying_average`,
`neural_baseline`, coefficients of controls) has settled. "bias z" is the largest |z| against the exact gradient over
the columns: beyond chance from about {limit:.1f} on; "exact" is a mean within 1e-10 of it. Biased estimators are
marked. A variance of 0 is one whose gradients are all the exact one up to rounding."""


@dataclass(frozen=True)
class Problem:
    """Model, guide, and the exact ELBO as a function of the logits."""

    model: Callable
    guide: Callable
    elbo: Callable[[Tensor], Tensor]

    def exact(self) -> dict[str, Tensor]:
        """Return the exact gradient by the logits, where they are."""
        self.guide()
        leaf = pyro.param("logits").detach().requires_grad_()
        return {"logits": torch.autograd.grad(self.elbo(leaf), leaf)[0]}


def toy(t: float, phi: float) -> Problem:
    """The toy of Tucker et al. 2017: f(b) = (b - t)^2, b ~ Bernoulli(sigmoid(phi)); log p - log q is f exactly."""
    start = torch.tensor(phi, dtype=torch.float64)

    def model() -> None:
        b = pyro.sample("b", dist.Bernoulli(logits=pyro.param("logits").detach()))
        pyro.factor("f", (b - t) ** 2)

    def guide() -> None:
        pyro.sample("b", dist.Bernoulli(logits=pyro.param("logits", start.clone)))

    return Problem(model, guide, lambda logits: logits.sigmoid() * (1 - t) ** 2 + (1 - logits.sigmoid()) * t**2)


def binary(spread: float, coupling: float = 1.0, width: int = 20, seed: int = 0) -> Problem:
    """Many bits under a normal likelihood: x | z ~ N(W z, I) in 10 dims; logits uniform in [-spread, spread]."""
    generator = torch.Generator().manual_seed(seed)
    weight = coupling * torch.randn(width, 10, generator=generator, dtype=torch.float64) / width**0.5
    start = spread * (2 * torch.rand(width, generator=generator, dtype=torch.float64) - 1)
    x = (torch.rand(width, generator=generator, dtype=torch.float64) < 0.5).double() @ weight
    x = x + torch.randn(10, generator=generator, dtype=torch.float64)
    half = torch.full_like(start, 0.5)

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(half).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight, x.new_ones(10)).to_event(1), obs=x)

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", start.clone)).to_event(1))

    def elbo(logits: Tensor) -> Tensor:
        q = dist.Bernoulli(logits=logits)
        spread_of_x = (q.variance * (weight**2).sum(1)).sum()
        kl = torch.distributions.kl_divergence(q, dist.Bernoulli(half)).sum()
        return -0.5 * (((x - q.mean @ weight) ** 2).sum() + spread_of_x) - kl

    return Problem(model, guide, elbo)


def category(sharpness: float, size: int = 5, seed: int = 0) -> Problem:
    """One categorical site under a normal likelihood; the guide's logits are normal, times the sharpness."""
    generator = torch.Generator().manual_seed(seed)
    means, start = torch.randn(2, size, generator=generator, dtype=torch.float64)
    prior, x = torch.zeros_like(start), torch.tensor(0.7, dtype=torch.float64)

    def model() -> None:
        z = pyro.sample("z", dist.Categorical(logits=prior))
        pyro.sample("x", dist.Normal(means[z], x.new_ones(())), obs=x)

    def guide() -> None:
        pyro.sample("z", dist.Categorical(logits=pyro.param("logits", (sharpness * start).clone)))

    def elbo(logits: Tensor) -> Tensor:
        log_q, log_p = logits.log_softmax(0), prior.log_softmax(0) + dist.Normal(means, x.new_ones(())).log_prob(x)
        return (log_q.exp() * (log_p - log_q)).sum()

    return Problem(model, guide, elbo)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "one bit, t = 0.499, phi = 0": partial(toy, 0.499, 0.0),
    "one bit, t = 0.499, phi = 2": partial(toy, 0.499, 2.0),
    "one bit, t = 0.45, phi = 2": partial(toy, 0.45, 2.0),
    "20 bits, logits in [-1, 1]": partial(binary, 1.0),
    "20 bits, logits in [-4, 4]": partial(binary, 4.0),
    "20 bits, logits in [-4, 4], weak coupling": partial(binary, 4.0, coupling=0.2),
    "one of 5, high entropy": partial(category, 0.3),
    "one of 5, peaked": partial(category, 3.0),
}


def fitting(problem: Problem, most: int = EVALUATIONS[-1]) -> list[str]:
    """Return the names of the registered estimators that can be had here with some number of particles."""
    return [e.name for e in entries("estimator") if not e.traits.arguments and least(problem, e.name, most)]


def least(problem: Problem, name: str, most: int) -> int | None:
    """Return the least number of particles that an estimator takes at this problem, if it takes any up to `most`."""
    for particles in range(1, most + 1):
        try:
            loss = emvae.MonteCarloELBO(particles, estimator=name, annotations=False)
            loss.prepare(problem.model, problem.guide, (), {})
        except emvae.EmvaeError:
            continue
        return particles
    return None


def measure(problem: Problem, name: str, evaluations: int, replicates: int) -> Any:
    """Return the comparison's cell of one estimator at so many evaluations, or None if it cannot be had for so few."""
    try:
        return emvae.compare_gradients(
            problem.model,
            problem.guide,
            estimators=[name],
            num_particles=least(problem, name, EVALUATIONS[-1]),
            equal="evaluations",
            budget=evaluations,
            num_replicates=replicates,
            reference=problem.exact(),
            seed=0,
        ).dataset.sel(block="guide", estimator=name)
    except emvae.EmvaeError as error:
        if "a cost of" not in str(error):
            raise
        return None


def section(quick: bool = False) -> str:
    """Return the section's text and tables."""
    replicates, parts = (200 if quick else 20_000), []
    for title, make in PROBLEMS.items():
        pyro.clear_param_store()
        problem = make()
        lines = [_line(problem, name, replicates) for name in fitting(problem)]
        head = ("estimator", *(f"{count} evaluations" for count in EVALUATIONS), "bias z")
        parts.append(f"**{title}**\n\n{markdown(head, lines)}")
    counts = ", ".join(map(str, EVALUATIONS[:-1])) + f" and {EVALUATIONS[-1]}"
    return "\n\n".join([TEXT.format(counts=counts, replicates=replicates, limit=4.5), *parts])


def _line(problem: Problem, name: str, replicates: int) -> tuple[str, ...]:
    """Return the row of an estimator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells = [measure(problem, name, count, replicates) for count in EVALUATIONS]
    size = float(sum(g.square().sum() for g in problem.exact().values())) ** 0.5
    variances = ["-" if cell is None else _variance(float(cell.variance_mean), size) for cell in cells]
    there = [cell for cell in cells if cell is not None]
    scores = [float(cell.bias_z) for cell in there if float(cell.bias) > EXACT * size]
    z = f"{max(scores):.1f}" if scores else "exact" if there else "-"
    return f"`{name}`" + ("" if lookup("estimator", name).traits.unbiased else " (biased)"), *variances, z


def _variance(value: float, size: float) -> str:
    return f"{value:.4g}" if value > (EXACT * size) ** 2 else "0"
