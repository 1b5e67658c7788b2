r"""`has_closed_form`: torch's KL of every pair that it allows is right, derivatives too; what it does not allow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence, transforms

from pyro_emvae import MonteCarloELBO
from pyro_emvae.objectives.closed_forms import LEAVES, TRANSFORMED, WRAPPERS, has_closed_form, loses_derivatives

F64 = torch.float64
INF = math.inf
REAL, POSITIVE, UNIT = (-INF, INF), (0.0, INF), (0.0, 1.0)
LOCATIONS = ((0.3, 0.7), (-0.5, 1.3))
ONE_DIM: dict[str, tuple[tuple, tuple, tuple]] = {
    "Normal": (*LOCATIONS, REAL),
    "Laplace": (*LOCATIONS, REAL),
    "Gumbel": (*LOCATIONS, REAL),
    "Cauchy": (*LOCATIONS, REAL),
    "Gamma": ((2.3, 1.7), (1.5, 0.8), POSITIVE),
    "Chi2": ((4.3,), (3.1,), POSITIVE),
    "Exponential": ((1.7,), (0.8,), POSITIVE),
    "HalfNormal": ((0.7,), (1.3,), POSITIVE),
    "LogNormal": (*LOCATIONS, POSITIVE),
    "Beta": ((2.3, 1.7), (1.5, 2.8), UNIT),
    "ContinuousBernoulli": ((0.3,), (0.8,), UNIT),
}
"""Two settings of each distribution, and its support."""


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def made(name: str, which: int) -> tuple[Any, list[Tensor]]:
    params = [torch.tensor(v, dtype=F64, requires_grad=True) for v in ONE_DIM[name][which]]
    return getattr(dist, name)(*params), params


def registered(name: str, other: str) -> bool:
    try:
        return bool(torch.isfinite(kl_divergence(made(name, 0)[0], made(other, 1)[0])))
    except NotImplementedError:
        return False


FINITE = [(one, two) for one, two in itertools.product(ONE_DIM, repeat=2) if registered(one, two) and two != "Gumbel"]
"""The KL to a Gumbel has the moment generating function, which soon overflows where draws do not: it is left out."""


def rule(low: float, high: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights of double-exponential quadrature on an interval (Takahasi and Mori 1974)."""
    t = torch.linspace(-4.5, 4.5, 1201, dtype=F64)
    s, c = math.pi / 2 * torch.sinh(t), math.pi / 2 * torch.cosh(t)
    if math.isinf(low):
        nodes, weights = rule(-high, INF)
        return -nodes, weights
    if math.isinf(high):
        nodes, weights = low + s.exp(), s.exp() * c
    else:
        share = torch.sigmoid(2 * s)
        nodes, weights = low + (high - low) * share, 2 * (high - low) * share * (1 - share) * c
    inside = (nodes > low) & (nodes < high) & (weights > 0)
    return nodes[inside], (weights * (t[1] - t[0]))[inside]


def quadrature(one: Any, two: Any, edges: list[float]) -> Tensor:
    """KL by quadrature between each two edges: kinks of a density lie on them."""
    total = torch.zeros((), dtype=F64)
    for low, high in itertools.pairwise(edges):
        nodes, weights = rule(low, high)
        with torch.no_grad():
            counts = one.log_prob(nodes) > -500
        log_q, log_p = one.log_prob(nodes[counts]), two.log_prob(nodes[counts])
        total = total + (weights[counts] * log_q.exp() * (log_q - log_p)).sum()
    return total


def same(found: Tensor, right: Tensor, leaves: list[Tensor], tolerance: float) -> None:
    torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance)
    weights = torch.linspace(1.0, -2.0, found.numel(), dtype=F64).reshape(found.shape)
    grads = [
        torch.autograd.grad((weights * x).sum(), leaves, allow_unused=True, materialize_grads=True, retain_graph=True)
        for x in (found, right)
    ]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("one", "two"), FINITE)
def test_a_pair_in_one_dim_is_right(one, two):
    (q, own), (p, others) = made(one, 0), made(two, 1)
    assert has_closed_form(q, p)
    low, high = ONE_DIM[one][2]
    kinks = [ONE_DIM[name][i][0] for i, name in enumerate((one, two)) if name == "Laplace"]
    edges = sorted({low, high, *kinks, *([0.0] if low < 0 else [])})
    same(kl_divergence(q, p), quadrature(q, p, edges), own + others, 1e-7)


def test_the_pairs_are_those_that_were_looked_at():
    """All that torch has and that stay finite, and no other."""
    for one, two in itertools.product(ONE_DIM, repeat=2):
        assert has_closed_form(made(one, 0)[0], made(two, 1)[0]) == ((one, two) in FINITE), (one, two)
    assert {cls.__name__ for cls in LEAVES} == {*ONE_DIM, "Dirichlet", *MULTIVARIATE} - {"LogNormal"}
    assert {cls.__name__ for cls in TRANSFORMED | WRAPPERS} == {"LogNormal", "TransformedDistribution", "Independent"}


# Vectors ------------------------------------------------------------------------------------------------------------

MULTIVARIATE = ("MultivariateNormal", "LowRankMultivariateNormal")


def normals(seed: int) -> tuple[dict[str, tuple[Any, Tensor, Tensor]], list[Tensor]]:
    """Normal distributions of vectors, with mean and covariance."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 3), (2, 3), (2, 3, 3), (2, 3, 2))
    loc, log, full, factor = (torch.randn(s, generator=generator, dtype=F64).requires_grad_() for s in shapes)
    tril = full.tril(-1) + torch.diag_embed(log.exp())
    covariance, diagonal = tril @ tril.mT, torch.diag_embed((2 * log).exp())
    low = factor @ factor.mT + torch.diag_embed(log.exp())
    return {
        "independent": (dist.Normal(loc, log.exp()).to_event(1), loc, diagonal),
        "tril": (dist.MultivariateNormal(loc, scale_tril=tril), loc, covariance),
        "covariance": (dist.MultivariateNormal(loc, covariance), loc, covariance),
        "low rank": (dist.LowRankMultivariateNormal(loc, factor, log.exp()), loc, low),
    }, [loc, log, full, factor]


def by_matrices(m: Tensor, s: Tensor, n: Tensor, t: Tensor) -> Tensor:
    precision, gap = torch.linalg.inv(t), n - m
    trace = (precision @ s).diagonal(dim1=-2, dim2=-1).sum(-1)
    square = torch.einsum("...i,...ij,...j->...", gap, precision, gap)
    return 0.5 * (trace + square - m.shape[-1] + torch.logdet(t) - torch.logdet(s))


def test_normal_vectors_are_right():
    (first, own), (second, others) = normals(1), normals(2)
    count = 0
    for (q, m, s), (p, n, t) in itertools.product(first.values(), second.values()):
        try:
            found = kl_divergence(q, p)
        except NotImplementedError:
            continue
        assert has_closed_form(q, p)
        same(found, by_matrices(m, s, n, t), own + others, 1e-10)
        count += 1
    assert count == 12


def test_dirichlet_is_a_chain_of_betas():
    a, b = (torch.tensor(v, dtype=F64, requires_grad=True) for v in ([2.0, 1.5, 3.0], [1.2, 2.5, 0.8]))
    chain = kl_divergence(dist.Beta(a[0], a[1] + a[2]), dist.Beta(b[0], b[1] + b[2]))
    chain = chain + kl_divergence(dist.Beta(a[1], a[2]), dist.Beta(b[1], b[2]))
    q, p = dist.Dirichlet(a), dist.Dirichlet(b)
    assert has_closed_form(q, p)
    same(kl_divergence(q, p), chain, [a, b], 1e-12)


# Transforms ---------------------------------------------------------------------------------------------------------


def through(make: Callable[[], list], loc: float) -> Any:
    return dist.TransformedDistribution(dist.Normal(torch.full((3,), loc, dtype=F64), 1.0), make())


SHIFT = transforms.AffineTransform(torch.tensor(1.0), torch.tensor(2.0))
MAPS = {
    "exp": (lambda: [transforms.ExpTransform()], True),
    "several": (lambda: [transforms.SigmoidTransform(), transforms.AffineTransform(1.0, 2.0)], True),
    "sticks": (lambda: [transforms.StickBreakingTransform()], True),
    "one of tensors": (lambda: [SHIFT], True),
    "two of equal tensors": (lambda: [transforms.AffineTransform(torch.tensor(1.0), torch.tensor(2.0))], False),
    "two inverses": (lambda: [transforms.ExpTransform().inv], False),
    "not one-to-one": (lambda: [transforms.AbsTransform()], False),
}


@pytest.mark.parametrize(("make", "allowed"), MAPS.values(), ids=MAPS)
def test_transforms_have_to_be_the_same_without_a_look_at_tensors(make, allowed):
    q, p = through(make, 0.3), through(make, -0.2)
    assert has_closed_form(q, p) == has_closed_form(p, q) == allowed
    if allowed:
        value = q.rsample()  # leaves references in the transforms
        q.log_prob(value), p.log_prob(value)
        assert has_closed_form(q, p)
        right = kl_divergence(q.base_dist, p.base_dist)
        torch.testing.assert_close(kl_divergence(q, p), right.reshape(kl_divergence(q, p).shape))


def test_other_transforms_are_others():
    q = through(lambda: [transforms.AffineTransform(1.0, 2.0)], 0.3)
    for other in ([transforms.AffineTransform(1.0, 3.0)], [transforms.ExpTransform()], [SHIFT], []):
        assert not has_closed_form(q, through(lambda other=other: other, -0.2))


# What torch answers wrongly -----------------------------------------------------------------------------------------


class Skewed(dist.Normal):
    """A user's distribution with a density of its own."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) - value


def test_a_subclass_is_not_its_parent():
    normal = dist.Normal(0.0, 1.0)
    assert kl_divergence(Skewed(0.0, 1.0), normal) == 0  # what torch says
    for one, two in ((Skewed(0.0, 1.0), normal), (normal, Skewed(0.0, 1.0)), (dist.NanMaskedNormal(0.0, 1.0), normal)):
        assert not has_closed_form(one, two)
        assert not has_closed_form(one.expand([2]).to_event(1), two.expand([2]).to_event(1))


def test_wishart_loses_its_derivative():
    """Of exponential families without a formula of their own, torch detaches the first one's parameters."""
    df = torch.tensor(5.0, dtype=F64, requires_grad=True)
    eye = torch.eye(2, dtype=F64)
    q, p = (torch.distributions.Wishart(d, scale_tril=eye) for d in (df, torch.tensor(6.0, dtype=F64)))
    assert torch.autograd.grad(kl_divergence(q, p), df, allow_unused=True) == (None,)
    assert loses_derivatives(q, p) and not has_closed_form(q, p)


def test_transforms_that_are_equal_now_lose_theirs():
    """Those of `AffineBeta`, whose scale is a parameter: at the same number torch takes them for one."""

    def model() -> None:
        pyro.sample("z", dist.AffineBeta(number(1.5), number(2.8), number(0.0), number(1.5)))

    def guide() -> None:
        high = pyro.param("high", lambda: number(1.5))
        pyro.sample("z", dist.AffineBeta(number(2.3), number(1.7), number(0.0), high))

    def slope(objective: str) -> Tensor:
        loss = MonteCarloELBO(2, objective=objective, estimator="pathwise", vectorize_particles=True)
        pyro.set_rng_seed(0)
        loss.loss_and_grads(model, guide)
        leaf = pyro.param("high").unconstrained()
        found, leaf.grad = leaf.grad, None
        return found

    assert slope("elbo") != 0
    assert torch.equal(slope("elbo_analytic_kl"), slope("elbo"))
    beta = dist.AffineBeta(2.0, 2.0, number(0.0), number(1.0))
    assert not loses_derivatives(beta, beta)


def test_supports_that_move_and_masks_are_left_out():
    uniform, masked = dist.Uniform(0.2, 0.7), dist.Normal(0.0, 1.0).mask(torch.tensor(False))
    assert not has_closed_form(uniform, dist.Uniform(0.0, 1.0))
    assert not has_closed_form(dist.Beta(1.0, 2.0), uniform)
    assert not has_closed_form(dist.AffineBeta(1.0, 2.0, 0.0, 1.0), dist.AffineBeta(2.0, 2.0, 0.0, 1.0))
    assert not has_closed_form(masked, masked)
    assert not has_closed_form(dist.Delta(torch.tensor(0.0)), dist.Normal(0.0, 1.0))
