r"""All at once: a global and local latents, discrete and continuous, minibatches, masks, scales; by every estimator.

Over all outcomes: minibatches, classes or bits, and normal noise, in which everything is a polynomial.
"""

from __future__ import annotations

from types import MappingProxyType

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyro_emvae._registry import create, entries
from pyro_emvae.problems import Problem, exact_gradients
from pyro_emvae.problems._problem import ProblemTraits
from pyro_emvae.testing import Replay, exact_mean
from pyro_emvae.testing.estimators import objective_for
from pyro_emvae.testing.replay import fitting_sites

KINDS = {
    "classes": (lambda logits: dist.Categorical(logits=logits), torch.arange(3), 3),
    "bits": (
        lambda logits: dist.Bernoulli(logits=logits).to_event(1),
        torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64),
        2,
    ),
}


def f64(x) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


X, KEPT, SEEN = f64([0.7, -1.1, 0.4]), torch.tensor([True, True, False]), torch.tensor([True, False, True])
START = {
    "prior": f64([0.3, -0.4, 0.2]),
    "means": f64([0.5, -0.8, 1.1]),
    "above": f64(0.6),
    "shifts": f64([0.2, 0.7, -0.5]),
    "loc": f64(0.3),
    "log_scale": f64(-0.5),
    "logits": f64([[0.2, -0.6, 0.4], [0.5, 0.1, -0.3], [-0.2, 0.8, 0.0]]),
    "locs": f64([0.1, -0.5, 0.6]),
    "slope": f64(0.4),
    "of_g": f64(0.3),
    "log_inner": f64(-0.4),
}
THETA = ("prior", "means", "above", "shifts")


def composite(kind: str) -> Problem:
    r"""g global; for each of three data (one seen at a time) k, z | k, g and x | z, k; masks of latents and of data."""
    make, values, width = KINDS[kind]
    params = {n: p[..., :width].clone() if p.dim() else p for n, p in START.items()}

    def param(name: str) -> Tensor:
        return pyro.param(name, params[name].clone)

    def pick(table: Tensor, k: Tensor) -> Tensor:
        return table[k.long()] if kind == "classes" else k.to(table) @ table

    def model(x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(f64(0.0), 1.0))
        with pyro.plate("data", 3, subsample_size=1) as i:
            with poutine.mask(mask=KEPT[i]):
                k = pyro.sample("k", make(param("prior")))
                z = pyro.sample("z", dist.Normal(pick(param("means"), k) + param("above") * g, 1.0))
            with poutine.mask(mask=SEEN[i]), poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(z + pick(param("shifts"), k), 1.3), obs=x[i])

    def guide(x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(param("loc"), param("log_scale").exp()))
        with pyro.plate("data", 3, subsample_size=1) as i, poutine.mask(mask=KEPT[i]):
            k = pyro.sample("k", make(param("logits")[i]))
            mean = pick(param("locs"), k) + param("slope") * x[i] + param("of_g") * g
            pyro.sample("z", dist.Normal(mean, param("log_inner").exp()))

    def elbo(given: dict | None = None) -> Tensor:
        p = {**params, **(given or {})}
        total = -torch.distributions.kl_divergence(
            dist.Normal(p["loc"], p["log_scale"].exp()), dist.Normal(f64(0.0), 1.0)
        )
        of_g, inner = p["log_scale"].exp() ** 2, p["log_inner"].exp() ** 2
        for n in range(3):
            for v in values:
                log_q, log_p = make(p["logits"][n]).log_prob(v), make(p["prior"]).log_prob(v)
                mean = pick(p["locs"], v) + p["slope"] * X[n] + p["of_g"] * p["loc"]
                gap = mean - pick(p["means"], v) - p["above"] * p["loc"]
                spread = gap**2 + (p["of_g"] - p["above"]) ** 2 * of_g + inner
                latent = log_p - log_q - 0.5 * spread + 0.5 + p["log_inner"]
                residual = (X[n] - mean - pick(p["shifts"], v)) ** 2 + p["of_g"] ** 2 * of_g + inner
                datum = dist.Normal(f64(0.0), 1.3).log_prob(f64(0.0)) - 0.5 * residual / 1.3**2
                total = total + log_q.exp() * (KEPT[n] * latent + 0.5 * SEEN[n] * datum)
        return total

    return Problem(
        name=f"composite_{kind}",
        model=model,
        guide=guide,
        args=(X,),
        sites=("g", "k", "z"),
        model_params=THETA,
        guide_params=tuple(n for n in params if n not in THETA),
        params=MappingProxyType(params),
        constraints=MappingProxyType(dict.fromkeys(params, constraints.real)),
        max_plate_nesting=1,
        traits=ProblemTraits(support="mixed", reparameterised=False, subsampled=True, masked=True, two_level=True),
        elbo=elbo,
    )


PROBLEMS = {kind: composite(kind) for kind in KINDS}
OTHERS = {"g": "pathwise", "k": "leave_one_out", "z": "pathwise"}


def is_meant(name: str) -> bool:
    """Whether it is an unbiased estimator of sums of terms that draws nothing besides, nor draws sites anew."""
    part = create("estimator", name)
    plain = part.traits.unbiased and not part.traits.noisy and part.traits.probes == "no"
    return plain and objective_for(part) == "elbo"


@pytest.mark.parametrize("estimator", [e.name for e in entries("estimator") if is_meant(e.name)])
def test_the_mean_over_all_outcomes_is_the_exact_gradient(estimator):
    """At all sites that it fits, of two particles at least."""
    part = create("estimator", estimator)
    problem, count = PROBLEMS["bits" if part.traits.support == "binary" else "classes"], 2
    sites = fitting_sites(problem, part, count)
    if part.integrates:  # a local latent's masks would be compared by their numbers, outcome by outcome
        sites = ["g"]
    found = exact_mean(Replay(problem, OTHERS | dict.fromkeys(sites, part), count))
    assert sites and found.how == "quadrature" and found.outcomes >= 3 * 16
    for name, gradient in exact_gradients(problem).items():
        torch.testing.assert_close(
            found.gradients[name], gradient, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
