"""Monte Carlo errors of stochastic runs, against sums by hand and against processes whose long run is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_emvae import EM, EmvaeError, steps
from pyro_emvae.testing import assert_mean
from pyro_emvae.uncertainty import monte_carlo_error
from pyro_emvae.uncertainty.monte_carlo_error import _cuts, batch_means

F64 = torch.float64
COUNT, DRAWS = 16, 8
X = torch.randn(COUNT, generator=torch.Generator().manual_seed(1), dtype=F64) + 1.0


def autoregressive(phi: float, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """An AR(1) process in its stationary law with innovations of variance 1, along the first dim."""
    noise = np.random.default_rng(seed).normal(size=shape)
    path = np.empty(shape)
    path[0] = noise[0] / math.sqrt(1 - phi**2)
    for t in range(1, len(path)):
        path[t] = phi * path[t - 1] + noise[t]
    return path


# Batch means ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_batch_means_are_those_by_hand(shape):
    path = autoregressive(0.7, (180, *shape))
    mean, error, effective, drift = batch_means(path, 4)
    by_hand = []
    for number in (4, 12):
        means = [path[k * 180 // number : (k + 1) * 180 // number].mean(0) for k in range(number)]
        by_hand.append(180 // number * np.var(means, axis=0, ddof=1))
    variance = np.maximum(2 * by_hand[0] - by_hand[1], by_hand[0])
    np.testing.assert_allclose(mean, path.mean(0), rtol=1e-12)
    np.testing.assert_allclose(error, np.sqrt(variance / 180), rtol=1e-12)
    np.testing.assert_allclose(effective, 180 * path.var(0, ddof=1) / variance, rtol=1e-12)
    halves = path[90:].mean(0) - path[:90].mean(0)
    np.testing.assert_allclose(drift, halves / np.sqrt(variance / 45), rtol=1e-12)


@pytest.mark.parametrize("phi", [0.0, 0.8, -0.5])
def test_the_error_of_an_autoregressive_process(phi):
    r"""The variance of its mean is $(1-\phi)^{-2}/n$, and 3 errors hold it as often as Student's t says."""
    path = autoregressive(phi, (2000, 1000))
    mean, error, effective, _ = batch_means(path, 10)
    expected = 1 / ((1 - phi) * math.sqrt(2000))
    ratio = torch.as_tensor(error**2 / expected**2)
    assert_mean(ratio, 1.15, detect=0.2)  # the correction that only raises makes it 1.1 to 1.2
    assert 0.005 < (np.abs(mean) > 3 * error).mean() < 0.03
    assert np.median(effective) == pytest.approx(2000 * (1 - phi) ** 2 / (1 - phi**2), rel=0.15)


def test_batches_have_equal_sums_of_gains():
    gains = np.arange(1.0, 401.0) ** -0.6
    parts = np.split(gains, _cuts(gains, 8))
    assert len(parts) == 8 and len(parts[0]) < len(parts[3]) < len(parts[-1])
    np.testing.assert_allclose([p.sum() for p in parts[1:]], gains.sum() / 8, rtol=0.1)
    np.testing.assert_array_equal(_cuts(np.ones(30), 10), np.arange(3, 30, 3))
    steep = np.split(gains**4, _cuts(gains**4, 100))
    assert min(map(len, steep)) >= 3


# Runs whose recursion is known ----------------------------------------------------------------------------------------


def model(x: Tensor, rows: Tensor | None = None) -> None:
    loc = pyro.param("loc", torch.zeros((), dtype=F64))
    with pyro.plate("data", COUNT, subsample=rows):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def exact_guide(x: Tensor, rows: Tensor | None = None) -> None:
    """The posterior at the present theta, so that draws have equal weights."""
    loc = pyro.get_param_store()["loc"].detach()
    with pyro.plate("data", COUNT, subsample=rows):
        pyro.sample("z", dist.Normal((x + loc) / 2, 0.5**0.5))


def loop(m_step: Any = None, **options: Any) -> EM:
    closed = steps.ClosedForm(
        lambda v, x, rows=None: {"z": v["z"], "n": torch.ones_like(x)[None]}, lambda s, _: {"loc": s["z"] / s["n"]}
    )
    e_step = steps.MonteCarlo("importance", DRAWS, guide=exact_guide)
    return EM(model, e_step=e_step, m_step=closed if m_step is None else m_step(closed), **options)


def test_plain_monte_carlo_em_is_an_autoregression():
    """loc' = (mean of x + loc) / 2 + noise of variance 1 / (2 S N): the mean of n has 2 / (S N n)."""
    fit = loop().run(X, max_iter=1540, track="loc", stop=None, seed=0)
    found = monte_carlo_error(fit, since=41, num_batches=100)
    assert (found.since, found.num_iterates, found.note) == (41, 1500, "")
    expected = math.sqrt(2 / (DRAWS * COUNT * 1500))
    assert float(found["loc"]) == pytest.approx(expected, rel=0.3)
    assert abs(float(found.estimate["loc"]) - float(X.mean())) < 4 * expected
    assert float(found.effective["loc"]) == pytest.approx(1500 / 3, rel=0.5)


def test_saem_is_averaged_from_where_the_step_averages():
    fit = loop(lambda m: steps.Averaged(m, rate=0.6, burn_in=20, average_from=60)).run(
        X, max_iter=1559, track="loc", stop=None, seed=0
    )
    found = monte_carlo_error(fit)
    assert (found.since, found.num_iterates) == (60, 1500)
    m_step = fit.inference.m_step
    averaged = float(m_step.averaged(fit.inference.engine)["loc"])
    assert averaged == pytest.approx(float(found.estimate["loc"]), rel=1e-10)
    gains = np.array([m_step.gain(t) for t in range(60, 1560)])
    path = fit.history["param_loc"].values[60:]
    np.testing.assert_allclose(float(found["loc"]), float(batch_means(path, 10, gains)[1]), rtol=1e-12)
    assert float(found["loc"]) == pytest.approx(math.sqrt(2 / (DRAWS * COUNT * 1500)), rel=0.8)


def test_a_further_run_goes_on_with_the_gains():
    em = loop(lambda m: steps.Averaged(m, rate=0.7))
    em.run(X, max_iter=300, stop=None, seed=0)
    fit = em.run(X, max_iter=300, track="loc", stop=None)
    gains = np.array([em.m_step.gain(t) for t in range(501, 601)])
    path = fit.history["param_loc"].values[201:]
    np.testing.assert_allclose(
        float(monte_carlo_error(fit, since=201)["loc"]), float(batch_means(path, 10, gains)[1]), rtol=1e-12
    )


def test_minibatches_count_by_iteration():
    rows = torch.arange(COUNT)
    loader = DataLoader(TensorDataset(X, rows), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    em = loop(lambda m: steps.Averaged(m, rate=0.6, average_from=40))
    fit = em.run(data=loader, num_epochs=60, track="loc", stop=None, seed=0)
    found = monte_carlo_error(fit)
    assert (found.since, found.num_iterates) == (40, 201)
    assert abs(float(found.estimate["loc"]) - float(X.mean())) < 4 * float(found["loc"]) < 0.2


def test_a_run_that_still_moves_or_is_short_says_so():
    def drifting(closed: steps.ClosedForm) -> steps.Damped:
        return steps.Damped(closed, 0.005)

    fit = loop(drifting).run(X, max_iter=400, track="loc", stop=None, seed=0)
    found = monte_carlo_error(fit, since=0)
    assert "fewer than the batches" in found.note and float(found.effective["loc"]) < 10
    path = np.arange(300.0) + np.random.default_rng(0).normal(size=300)
    assert float(batch_means(path, 30)[3]) > 3


def test_it_prints_a_table():
    def two(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(2, dtype=F64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc.mean(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    m_step = steps.ClosedForm(lambda v, x: {"z": v["z"]}, lambda s, _: {"loc": (s["z"] / COUNT).expand(2)})
    fit = EM(two, e_step=steps.MonteCarlo("prior", 20), m_step=m_step).run(X, max_iter=200, track="loc", stop=None)
    found = monte_carlo_error(fit)
    assert found["loc"].shape == (2,) and "loc[1]" in repr(found)
    assert repr(found).splitlines()[-1].startswith("101 iterates from 100 on")


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "observed"),
    [
        ({"since": -1}, "since: got -1"),
        ({"since": 30}, "71 iterates from 30 on"),
        ({"since": 300}, "0 iterates from 300 on"),
        ({"num_batches": 1}, "num_batches: got 1"),
        ({"num_batches": 12, "since": 0}, "101 iterates from 0 on"),
    ],
)
def test_bad_options(options, observed):
    fit = loop().run(X, max_iter=100, track="loc", stop=None, seed=0)
    with pytest.raises(EmvaeError, match=observed):
        monte_carlo_error(fit, **options)


def test_runs_without_iterates():
    em = loop()
    with pytest.raises(EmvaeError, match="no tracked parameter"):
        monte_carlo_error(em.run(X, max_iter=200, stop=None))
    with pytest.raises(EmvaeError, match="EM"):
        monte_carlo_error(em)
