"""Exact EM against scikit-learn: fits of ten iterations, float64, the same threads; and cost per datum as N grows."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyro_emvae as emvae
from pyro_emvae import steps

from .timing import Call, Case

ITERATIONS = 10
SLICE = {"mixture": 4_000, "factors": 16_000, "wide": 8_000}


def mixture(number: int, width: int = 10, components: int = 10) -> tuple[Callable, Tensor, Tensor]:
    """A mixture of normals with full covariances: model, data, initial means."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(components, width, generator=generator, dtype=torch.float64)
    z = torch.randint(components, (number,), generator=generator)
    x = centres[z] + torch.randn(number, width, generator=generator, dtype=torch.float64)
    start = centres + 0.3 * torch.randn(components, width, generator=generator, dtype=torch.float64)

    def model(x: Tensor) -> None:
        weights = pyro.param("weights", x.new_full((components,), 1 / components), constraint=constraints.simplex)
        means = pyro.param("means", start.clone)
        eye = torch.eye(width, dtype=x.dtype).expand(components, width, width)
        scales = pyro.param("scales", eye.clone, constraint=constraints.lower_cholesky)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.MultivariateNormal(means[z], scale_tril=scales[z]), obs=x)

    return model, x, start


def factors(number: int, width: int = 10, latents: int = 3) -> tuple[Callable, Tensor]:
    """Factor analysis: model and data."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, latents, generator=generator, dtype=torch.float64)
    z = torch.randn(number, latents, generator=generator, dtype=torch.float64)
    noise = torch.randn(number, width, generator=generator, dtype=torch.float64)
    x = z @ weight.T + noise * torch.linspace(0.5, 1.5, width, dtype=torch.float64)
    start = torch.randn(width, latents, generator=generator, dtype=torch.float64)

    def model(x: Tensor) -> None:
        weight = pyro.param("weight", start.clone)
        bias = pyro.param("bias", lambda: x.new_zeros(width))
        sigma = pyro.param("sigma", lambda: x.new_ones(width), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latents), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T + bias, sigma).to_event(1), obs=x)

    return model, x


def fit_mixture(number: int, batch_size: int | str | None, iterations: int = ITERATIONS) -> Call:
    model, x, _ = mixture(number)
    em = emvae.EM(model, e_step=steps.Enumerated(), m_step=steps.gaussian_mixture(10))
    return lambda: em.run(x, max_iter=iterations, stop=None, batch_size=batch_size, progress_bar=False)


def fit_factors(number: int, batch_size: int | str | None, iterations: int = ITERATIONS, **shape: int) -> Call:
    model, x = factors(number, **shape)
    em = emvae.EM(model, e_step=steps.Gaussian(), m_step=steps.linear_gaussian(noise_form="diagonal"))
    return lambda: em.run(x, max_iter=iterations, stop=None, batch_size=batch_size, progress_bar=False)


def sklearn_mixture(number: int) -> Call:
    from sklearn.mixture import GaussianMixture

    _, x, start = mixture(number)
    eye = torch.eye(10, dtype=x.dtype).expand(10, 10, 10).numpy()
    found = GaussianMixture(
        10,
        tol=0.0,
        max_iter=ITERATIONS,
        init_params="random_from_data",
        means_init=start.numpy(),
        precisions_init=eye,
        weights_init=[0.1] * 10,
        random_state=0,
    )
    return _limited(lambda: found.fit(x.numpy()))


def sklearn_factors(number: int, latents: int = 3, **shape: int) -> Call:
    from sklearn.decomposition import FactorAnalysis

    _, x = factors(number, latents=latents, **shape)
    found = FactorAnalysis(latents, tol=1e-300, max_iter=ITERATIONS)
    return _limited(lambda: found.fit(x.numpy()))


def _limited(call: Call) -> Call:
    """Let scikit-learn use as many threads as torch, and say nothing of not having converged."""
    from threadpoolctl import threadpool_limits

    def limited() -> None:
        with threadpool_limits(torch.get_num_threads()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()

    return limited


def gmm(ours: bool) -> Call:
    return fit_mixture(100_000, SLICE["mixture"]) if ours else sklearn_mixture(100_000)


def gmm_default(ours: bool) -> Call:
    return fit_mixture(100_000, "auto") if ours else sklearn_mixture(100_000)


def gmm_whole(ours: bool) -> Call:
    return fit_mixture(100_000, None) if ours else sklearn_mixture(100_000)


def factor_analysis(ours: bool) -> Call:
    return fit_factors(100_000, SLICE["factors"]) if ours else sklearn_factors(100_000)


def factor_analysis_default(ours: bool) -> Call:
    return fit_factors(100_000, "auto") if ours else sklearn_factors(100_000)


def factor_analysis_wide(ours: bool) -> Call:
    shape = {"width": 50, "latents": 5}
    return fit_factors(100_000, SLICE["wide"], **shape) if ours else sklearn_factors(100_000, **shape)


def growth(fit: Callable[[int, int], Call], kind: str, small: int) -> Callable[[bool], Call]:
    """One iteration on a million data against as many iterations on `small` as have that many data together."""

    def case(ours: bool) -> Call:
        if ours:
            return fit(1_000_000, SLICE[kind], 1)
        call = fit(small, SLICE[kind], 1)
        return lambda: [call() for _ in range(1_000_000 // small)]

    return case


CASES = (
    Case("gmm", "EM of a Gaussian mixture, N = 1e5, D = k = 10, in slices, against scikit-learn", 1.5, gmm),
    Case("gmm_default", "the same as EM.run does it by default", 1.5, gmm_default),
    Case("gmm_whole", "the same without slices, for comparison", math.inf, gmm_whole),
    Case(
        "factor_analysis",
        "EM of factor analysis, N = 1e5, D = 10, q = 3, in slices, against scikit-learn",
        2.0,
        factor_analysis,
    ),
    Case("factor_analysis_default", "the same as EM.run does it by default", 2.0, factor_analysis_default),
    Case("factor_analysis_wide", "in slices, with D = 50, q = 5", 2.0, factor_analysis_wide),
    *(
        Case(
            f"{name}_{label}",
            f"EM of {name} on 1e6 data against runs on {label} with as many data",
            1.1,
            growth(fit, kind, small),
        )
        for (name, fit, kind), (label, small) in itertools.product(
            (("gmm", fit_mixture, "mixture"), ("factor_analysis", fit_factors, "factors")),
            (("1e5", 100_000), ("1e3", 1_000)),
        )
    ),
)
