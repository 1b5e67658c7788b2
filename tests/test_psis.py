r"""Pareto smoothing: equal to ArviZ's, right on a tail that is exactly Pareto, and defined where ArviZ's is not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pyro.ops import stats
from torch.distributions import Exponential, Normal

from pyro_emvae._checks import DataError
from pyro_emvae.psis import fit_generalized_pareto, khat_limit, psis, tail_size

# numpyro's tests, from Vehtari's reference code: three normals, proposal scale -> k-hat of 50,000 draws.
GOLDEN = {0.5: 0.9080815512205151, 0.7: 0.6371459500343336, 0.9: 0.27494481323913184, 0.99: 0.08018355166699344}

TAILS = {
    "normal": lambda generator, size: generator.normal(size=size),
    "heavy": lambda generator, size: generator.standard_t(2, size=size),
    "bounded": lambda generator, size: -generator.exponential(size=size),
    "ties": lambda generator, size: generator.integers(0, 40, size=size) / 10.0,
    "zeros": lambda generator, size: np.where(generator.random(size) < 0.7, -np.inf, generator.normal(size=size)),
}


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("num_draws", [2, 20, 25, 1000, 20_000])
@pytest.mark.parametrize("tail", TAILS)
def test_equals_arviz(tail, num_draws, scale):
    import arviz

    generator = np.random.default_rng(num_draws)
    log_weights = scale * TAILS[tail](generator, (3, num_draws))
    log_weights[:, 0] = 0.5  # not all of them -inf
    with np.errstate(all="ignore"):
        expected, khat = arviz.psislw(log_weights)
    found = psis(log_weights)
    assert np.isfinite(khat).tolist() == torch.isfinite(found.khat).tolist()
    finite = np.isfinite(khat)
    np.testing.assert_allclose(found.khat[finite], khat[finite], atol=1e-9)
    np.testing.assert_allclose(np.sort(found.log_weights), np.sort(expected), atol=1e-9)


@pytest.mark.parametrize("scale, khat", GOLDEN.items())
def test_published_values(scale, khat):
    x = torch.from_numpy(scale * np.random.default_rng(42).standard_normal((50_000, 3)))
    zero, scale = torch.tensor([0.0, scale], dtype=torch.float64)
    log_weights = (Normal(zero, 1.0).log_prob(x) - Normal(zero, scale).log_prob(x)).sum(-1)
    assert float(psis(log_weights).khat) == pytest.approx(khat, abs=1e-10)


@pytest.mark.parametrize("khat", [0.2, 0.5, 0.7, 0.85])
def test_exact_pareto_tail_and_standard_error(khat):
    """Exponential target and proposal: the weights are Pareto with shape 1 - a / b."""
    target, proposal = Exponential(torch.tensor(1.0 - khat).double()), Exponential(torch.tensor(1.0).double())
    x = proposal.sample((100_000, 40))
    found = psis(target.log_prob(x) - proposal.log_prob(x), dim=0)
    z = (found.khat - khat) / found.khat_se
    assert float(z.abs().max()) < 5
    assert float(z.std()) == pytest.approx(1.0, abs=0.45)  # four standard errors of a standard deviation of 40


@pytest.mark.parametrize("value", [0.0, -31.4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_weights(value, dtype):
    log_weights = torch.full((4, 500), value, dtype=dtype)
    noise = 4 * torch.finfo(dtype).eps * torch.randn(4, 500, dtype=dtype)
    for found in (psis(log_weights), psis(log_weights * (1 + noise))):
        assert found.khat.tolist() == [-math.inf] * 4 and found.khat_se.tolist() == [0.0] * 4
        torch.testing.assert_close(found.log_weights.exp().sum(-1), torch.ones(4, dtype=dtype))


def test_a_flat_top_is_bounded_and_a_short_tail_is_not_judged():
    top_is_flat = torch.zeros(1000)
    top_is_flat[300:] = -2.0
    assert psis(top_is_flat).khat == -math.inf
    assert psis(torch.randn(20)).khat == math.inf
    assert psis(torch.zeros(1)).khat == math.inf


def test_batch_dims_and_dtype():
    log_weights = torch.randn(2, 700, 3)
    found = psis(log_weights, dim=1)
    assert found.log_weights.shape == log_weights.shape and found.khat.shape == found.khat_se.shape == (2, 3)
    assert found.khat.dtype == found.log_weights.dtype == torch.float32
    single = psis(log_weights[1, :, 2])
    torch.testing.assert_close(found.khat[1, 2], single.khat)
    torch.testing.assert_close(found.log_weights[1, :, 2], single.log_weights)
    assert torch.equal(log_weights[0].argsort(0), found.log_weights[0].argsort(0)), "smoothing keeps the order"


def test_normalize_only_shifts():
    log_weights = torch.randn(700, dtype=torch.float64) - 40
    raw, normalized = psis(log_weights, normalize=False).log_weights, psis(log_weights).log_weights
    assert float(normalized.logsumexp(0)) == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(raw - raw.logsumexp(0), normalized)
    body = log_weights.argsort()[: 700 - tail_size(700)]
    assert torch.equal(raw[body], log_weights[body])


def test_fit_equals_pyro():
    excess = Exponential(torch.ones(300, dtype=torch.float64)).sample().exp() - 0.9
    k, sigma = fit_generalized_pareto(excess.sort().values)
    assert (float(k), float(sigma)) == pytest.approx(stats.fit_generalized_pareto(excess), rel=1e-9)


def test_limit():
    assert [khat_limit(n) for n in (100, 10**9)] == [0.5, 0.7]


@pytest.mark.parametrize(
    "log_weights, observed",
    [
        (torch.tensor([0.0, math.nan, 1.0]), "nan"),
        (torch.tensor([0.0, math.inf]), "inf"),
        (torch.full((9,), -math.inf), "-inf"),
        (torch.zeros(0), r"\(0,\)"),
        (torch.tensor(1.0), r"\(\)"),
        (torch.ones(10, dtype=torch.long), "int64"),
    ],
)
def test_refused(log_weights, observed):
    with pytest.raises(DataError, match=observed):
        psis(log_weights)
