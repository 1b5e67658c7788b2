r"""Families: draws and densities agree, by goodness of fit; gradients through draws are those of the expectation."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from family_sites import DISCRETE, FAMILIES, SUPPORT, bound, draw, site
from torch.distributions import biject_to

from pyro_emvae._checks import EmvaeError
from pyro_emvae._registry import create
from pyro_emvae.families import (
    Dirichlet,
    Family,
    Flow,
    FullRankNormal,
    LowRankNormal,
    Mixture,
    Normal,
    StudentT,
    VonMises,
)
from pyro_emvae.testing import assert_mean

float64 = torch.float64
LEVELS = torch.tensor([0.01, 0.2, 0.5, 0.9, 0.999], dtype=float64)


def assert_uniform(u, *, detect, alpha=1e-6, beta=1e-2):
    r"""Assert that independent numbers are uniform on [0, 1], by Kolmogorov's statistic D.

    It fails beyond $D=\sqrt{\log(2/\alpha)/2n}$, which uniform numbers exceed with a probability of alpha at most
    (Massart 1990). A distribution function that is off by `detect` somewhere is found with probability 1 - beta: there
    the empirical one has a standard error of at most $1/2\sqrt n$.
    """
    n = len(u)
    limit = math.sqrt(math.log(2 / alpha) / (2 * n))
    power = limit + torch.special.ndtri(torch.tensor(1 - beta)).item() / (2 * math.sqrt(n))
    assert power <= detect, f"underpowered: finds {power:.3g}, not {detect}"
    u = u.flatten().sort().values
    grid = torch.arange(n + 1, dtype=u.dtype) / n
    off = torch.maximum(grid[1:] - u, u - grid[:-1]).max().item()
    assert off <= limit, f"the distribution function is off by {off:.4f}, limit {limit:.4f}"


def context_of(family, event, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.7 * torch.randn(family.num_features(event), dtype=float64, generator=generator)


@functools.cache
def grid_of(support, half=30.0, points=60_001):
    """Return increasing values of the support, and log dz/du at them, for u on an even grid: with the step of u."""
    u = torch.linspace(-half, half, points, dtype=float64) * (0.4 if support == "continuous" else 1.0)
    if support == "circle":
        z = torch.linspace(-math.pi, math.pi, points, dtype=float64)
        return z, torch.zeros_like(z), float(z[1] - z[0])
    if support == "continuous":
        return u.sinh(), u.cosh().log(), float(u[1] - u[0])
    transform = biject_to(site(support).support)
    z = transform(u)
    return z, transform.log_abs_det_jacobian(u, z), float(u[1] - u[0])


def density_of(family, context):
    """Return values, and the probability of the cell of each, by the trapezoid rule in the grid's own coordinate."""
    z, slope, step = grid_of(family.traits.support)
    cell = (family.distribution(context, torch.Size([])).log_prob(z) + slope).exp() * step
    ends = torch.ones_like(cell)
    ends[[0, -1]] = 0.5
    return z, cell * ends


def distribution_function(family, context, value):
    """Return the integral of the density up to values."""
    z, cell = density_of(family, context)
    below = cell.cumsum(0) - cell / 2
    place = torch.searchsorted(z, value.contiguous()).clamp(1, len(z) - 1)
    share = (value - z[place - 1]) / (z[place] - z[place - 1])
    return below[place - 1] + share * (below[place] - below[place - 1])


def has_density(name):
    family, _ = bound(name)
    return not (family.direct and family.traits.support == "continuous")  # a point mass has none


def at_zeros(name):
    family, event = bound(name)
    return family.distribution(torch.zeros(family.num_features(event)), event)


def has_quantiles(name):
    fn = at_zeros(name)
    try:
        bound(name)[0].quantile(fn, torch.full(fn.shape(), 0.5))
    except EmvaeError:
        return False
    return True


SCALAR = [name for name in FAMILIES if SUPPORT[name] not in (*DISCRETE, "simplex") and has_density(name)]
MIXTURES = {
    "mixture of gamma and log_normal": Mixture(["gamma", "log_normal"]),
    "mixture of normals and a Student-t": Mixture(["normal", "normal", "student_t"]),
    "mixture of von Mises": Mixture(["von_mises"] * 3),
}


def member(name) -> Family:
    return MIXTURES.get(name) or create("family", name)


# One coordinate: every family --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SCALAR, *MIXTURES])
def test_density_integrates_to_one_and_draws_follow_it(name):
    """40,000 draws, put through the integral of the density, are uniform: an error of 0.02 anywhere is found."""
    family, event = bound(member(name), (), float64)
    context = context_of(family, event)
    with torch.no_grad():
        assert abs(density_of(family, context)[1].sum() - 1) < 1e-6
        value = draw(family.distribution(context, event), (40_000,))
        assert_uniform(distribution_function(family, context, value), detect=0.02)


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("part", ["one", "mixture"])
def test_discrete_densities_sum_to_one_and_draws_follow_them(name, part):
    """All values are enumerated; the frequency of each is its probability."""
    (plain,) = [entry for entry in FAMILIES if SUPPORT[entry] == name]
    family, event = bound(plain if part == "one" else Mixture([plain] * 2), (2,), float64)
    fn = family.distribution(context_of(family, event), event)
    base = site(name, (2,)).base_dist
    each = base.enumerate_support(expand=False).reshape(-1, *base.event_shape)
    pairs = torch.cartesian_prod(torch.arange(len(each)), torch.arange(len(each)))
    values = each[pairs].to(float64)
    probs = fn.log_prob(values if name != "categorical" else values.long()).exp()
    assert len(probs) == len(each) ** 2 and abs(probs.sum() - 1) < 1e-12 and probs.max() - probs.min() > 0.05
    hits = (fn.sample((40_000,)).unsqueeze(1) == values).flatten(2).all(-1).to(float64)
    assert_mean(hits, probs.detach(), detect=0.02)


@pytest.mark.parametrize("name", [*(name for name in SCALAR if has_quantiles(name)), *list(MIXTURES)[:2]])
def test_quantiles_invert_the_distribution_function(name):
    family, event = bound(member(name), (), float64)
    context = context_of(family, event)
    fn = family.distribution(context, event)
    quantiles = family.quantile(fn, LEVELS)
    reached = distribution_function(family, context, quantiles)
    if type(family).cdf is not Family.cdf:
        assert torch.allclose(family.cdf(fn, quantiles), LEVELS, atol=1e-9)
    if family.traits.support == "circle":
        reached = torch.remainder(reached - reached[2] + 0.5, 1.0)
        assert torch.allclose(quantiles[2], fn.mean)
    assert torch.allclose(reached, LEVELS, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in FAMILIES if SUPPORT[name] in ("binary", "categorical")])
def test_discrete_quantiles_are_the_least_that_reach_the_level(name):
    family, event = bound(name, (2,), float64)
    fn = family.distribution(context_of(family, event), event)
    quantiles = family.quantile(fn, LEVELS.reshape(-1, 1))
    values = fn.base_dist.enumerate_support(expand=False)
    below = fn.base_dist.log_prob(values).exp().cumsum(0)
    for level, quantile in zip(LEVELS, quantiles, strict=True):
        assert torch.equal(quantile, values.flatten()[(below < level).sum(0)])


def claim_of(fn, claim):
    """Return the mean or variance that a distribution gives; None if it gives none."""
    try:
        return getattr(fn, claim)
    except (NotImplementedError, AttributeError):
        return None


@pytest.mark.parametrize("name", SCALAR)
def test_moments_are_those_of_the_density(name):
    """By its integral; of angles the mean direction, and the length of the mean vector."""
    family, event = bound(name, (), float64)
    context = 0.3 * context_of(family, event)
    fn = family.distribution(context, event)
    z, cell = density_of(family, context)
    if SUPPORT[name] == "circle":
        vector = torch.stack([(z.cos() * cell).sum(), (z.sin() * cell).sum()])
        kappa = fn.concentration
        assert torch.allclose(torch.atan2(vector[1], vector[0]), fn.mean)
        assert torch.allclose(vector.norm(), torch.special.i1e(kappa) / torch.special.i0e(kappa))
        return
    mean = (z * cell).sum()
    for claim, found in (("mean", mean), ("variance", ((z - mean).square() * cell).sum())):
        if (claimed := claim_of(fn, claim)) is not None:
            assert torch.allclose(claimed, found, rtol=1e-3)


@pytest.mark.parametrize("kappa", [0.0, 1e-3, 50.0, 1e4])
def test_von_mises_from_flat_to_narrow(kappa):
    from scipy.stats import vonmises

    fn = VonMises().distribution(kappa * torch.tensor([math.cos(2.5), math.sin(2.5)]), torch.Size([]))
    off = torch.remainder(fn.sample((40_000,)) - 2.5 + math.pi, 2 * math.pi) - math.pi
    u = vonmises.cdf(off.numpy(), kappa) if kappa else (off.numpy() + math.pi) / (2 * math.pi)
    assert_uniform(torch.as_tensor(u), detect=0.02)


# Several coordinates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [FullRankNormal(0.7), LowRankNormal(1, 0.7), LowRankNormal(3, 2.0)], ids=repr)
def test_correlated_normals_by_whitening(family):
    """Draws, whitened by the covariance, are standard normal in coordinates, pairs and length; density by formula."""
    event = torch.Size([2, 2])
    fn = family.distribution(context_of(family, event), event)
    base = fn.base_dist
    value = fn.sample((40_000,)).flatten(1)
    root = torch.linalg.cholesky(base.covariance_matrix)
    white = torch.linalg.solve_triangular(root, (value - base.mean).T, upper=False).T
    for i in range(4):
        assert_uniform(torch.special.ndtr(white[:, i]), detect=0.02)
        assert_uniform(torch.special.ndtr((white[:, i] + white[:, i - 1]) / math.sqrt(2)), detect=0.02)
    assert_uniform(torch.special.gammainc(torch.tensor(2.0, dtype=float64), white.square().sum(1) / 2), detect=0.02)
    expected = -0.5 * white.square().sum(1) - root.diagonal().log().sum() - 2 * math.log(2 * math.pi)
    assert torch.allclose(fn.log_prob(value.reshape(-1, 2, 2)), expected, rtol=1e-9)


@pytest.mark.parametrize("width", [0, 3])
def test_flow_by_its_own_noise(width):
    """Draws, mapped back to the noise, are standard normal; the density is that of the noise and the Jacobian."""
    family, event = bound(Flow(context=width), (2,), float64)
    fn = family.distribution(3 * context_of(family, event), event)
    value = fn.sample((40_000,))
    affine, law = fn.transforms[0], fn.base_dist.law

    def noise(z):
        return law.transform((z - affine.loc) / affine.scale)

    white = noise(value).detach()
    for combined in (white[:, 0], white[:, 1], white.sum(1) / math.sqrt(2), (white[:, 0] - white[:, 1]) / math.sqrt(2)):
        assert_uniform(torch.special.ndtr(combined), detect=0.02)
    some = value[:20]
    jacobian = torch.stack([torch.autograd.functional.jacobian(noise, z) for z in some])
    expected = -0.5 * white[:20].square().sum(1) - math.log(2 * math.pi) + torch.linalg.slogdet(jacobian).logabsdet
    assert torch.allclose(fn.log_prob(some), expected, rtol=1e-8)


def test_dirichlet_by_stick_breaking():
    """The shares of what is left are independent Beta variables; the density is that of the shares and the Jacobian."""
    from scipy.special import betainc

    family, event = bound(Dirichlet(2.0), (), float64)
    fn = family.distribution(context_of(family, event), event)
    a = fn.concentration.detach()
    value = fn.sample((40_000,))
    first, second = value[:, 0], value[:, 1] / (1 - value[:, 0])
    one = torch.as_tensor(betainc(a[0].item(), (a[1] + a[2]).item(), first.numpy()))
    two = torch.as_tensor(betainc(a[1].item(), a[2].item(), second.numpy()))
    for u in (one, two, (one + two) % 1):
        assert_uniform(u, detect=0.02)
    beta = torch.distributions.Beta
    expected = beta(a[0], a[1] + a[2]).log_prob(first) + beta(a[1], a[2]).log_prob(second) - (1 - first).log()
    assert torch.allclose(fn.log_prob(value), expected, rtol=1e-6)


def test_mixture_quantiles_in_several_coordinates():
    """Of two vectors: shape, and each level reached in each coordinate."""
    family, event = bound(Mixture(["full_rank_normal", "low_rank_normal", "student_t"]), (2, 2), float64)
    fn = family.distribution(torch.randn(3, family.num_features(event), dtype=float64), event)
    levels = LEVELS.reshape(-1, 1, 1, 1)
    quantiles = family.quantile(fn, levels)
    assert quantiles.shape == (5, 3, 2, 2)
    assert torch.allclose(family.cdf(fn, quantiles), levels.expand(5, 3, 2, 2), atol=1e-9)
    value = fn.sample((40_000,))
    assert_mean((value <= quantiles[1]).to(float64), 0.2, detect=0.02)


@pytest.mark.parametrize(
    "components", [["full_rank_normal", "student_t"], ["normal", "flow", "low_rank_normal"]], ids=str
)
def test_mixture_by_cells_of_the_plane(components):
    """Each of 16 cells gets its integral of the density."""
    family, event = bound(Mixture(components), (2,), float64)
    fn = family.distribution(context_of(family, event), event)
    u = 0.04 * (torch.arange(-90, 90, dtype=float64) + 0.5)
    z = torch.cartesian_prod(u.sinh(), u.sinh())
    slope = torch.cartesian_prod(u.cosh(), u.cosh()).prod(-1)
    with torch.no_grad():
        mass = fn.log_prob(z).exp() * slope * 0.04**2
        value = fn.sample((40_000,))
    assert abs(mass.sum() - 1) < 1e-3
    edges = torch.tensor([-0.8, 0.0, 0.8], dtype=float64).sinh()

    def cells(z):
        return (z.unsqueeze(-1) > edges).sum(-1) @ torch.tensor([4, 1])

    expected = torch.zeros(16, dtype=float64).index_add_(0, cells(z), mass)
    hits = torch.nn.functional.one_hot(cells(value), 16).to(float64)
    keep = expected > 0.01
    assert keep.sum() > 5
    assert_mean(hits[:, keep], expected[keep], detect=0.03)


# Gradients ----------------------------------------------------------------------------------------------------------


REPARAMETERISED = [name for name in SCALAR if at_zeros(name).has_rsample]


@pytest.mark.parametrize("name", REPARAMETERISED)
def test_gradients_through_draws_are_those_of_the_expectation(name):
    """Of a bounded function's: by 40,000 draws, against the derivative of its integral."""
    family, event = bound(name, (), float64)
    context = context_of(family, event).requires_grad_()
    z, cell = density_of(family, context)
    (expected,) = torch.autograd.grad((z.atan() * cell).sum(), context)
    rows = context.detach().expand(40_000, -1).clone().requires_grad_()
    (found,) = torch.autograd.grad(family.distribution(rows, event).rsample().atan().sum(), rows)
    assert_mean(found, expected, detect=0.03)


def test_dirichlet_gradients_through_draws():
    family, event = bound("dirichlet", (), float64)
    context = context_of(family, event)
    rows = context.expand(40_000, -1).clone().requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=float64)
    value = family.distribution(rows, event).rsample()
    (found,) = torch.autograd.grad((value.square() * weights).sum(), rows)
    exact = context.clone().requires_grad_()
    fn = family.distribution(exact, event)
    (expected,) = torch.autograd.grad(((fn.mean.square() + fn.variance) * weights).sum(), exact)
    assert_mean(found, expected, detect=0.03)


# Checks that can fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drawn", "scored"),
    [
        (Normal(1.1), Normal(1.0)),
        (StudentT(1.0, 3.0), Normal(1.0)),
        (StudentT(1.0, 3.0), StudentT(1.0, 6.0)),
    ],
    ids=repr,
)
def test_goodness_of_fit_can_fail(drawn, scored):
    event = torch.Size([])
    value = drawn.distribution(torch.zeros(drawn.num_features(event), dtype=float64), event).sample((40_000,))
    zeros = torch.zeros(scored.num_features(event), dtype=float64)
    with pytest.raises(AssertionError, match="the distribution function is off by"):
        assert_uniform(distribution_function(scored, zeros, value), detect=0.02)


def test_goodness_of_fit_says_when_it_has_no_power():
    with pytest.raises(AssertionError, match="underpowered"):
        assert_uniform(torch.rand(1000), detect=0.02)
