r"""Samplers with implicit or partial paths, torch's and Pyro's: the mean gradient against quadrature or enumeration."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.testing.rejection_gamma import RejectionGamma, ShapeAugmentedGamma
from torch import Tensor

from pyro_emvae import EstimatorError, MonteCarloELBO
from pyro_emvae.estimators import PartialPathwise
from pyro_emvae.testing import assert_mean


def f64(x) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


TRIL = [[0.9, 0.0], [0.4, 0.7]]
LINE = {  # one-dimensional: parameters, distribution, range of the quadrature
    "gamma": ({"a": 2.5, "b": 1.5}, dist.Gamma, (1e-8, 40.0)),
    "beta": ({"a": 2.5, "b": 1.7}, dist.Beta, (1e-8, 1 - 1e-8)),
    "student": ({"a": 9.0, "b": 0.3, "c": 0.8}, dist.StudentT, (-200.0, 200.0)),
    "inverse_gamma": ({"a": 6.0, "b": 8.0}, dist.InverseGamma, (1e-3, 60.0)),
    "kumaraswamy": ({"a": 2.5, "b": 1.7}, dist.Kumaraswamy, (1e-8, 1 - 1e-8)),
}
PLANE = {  # of several dims: parameters, distribution
    "dirichlet": ({"a": [2.5, 1.3, 3.1]}, dist.Dirichlet),
    "omt": ({"a": [0.4, -0.6], "b": TRIL}, dist.OMTMultivariateNormal),
    "avf": ({"a": [0.4, -0.6], "b": TRIL}, lambda a, b: dist.AVFMultivariateNormal(a, b, 0.1 * torch.ones(2, 1, 2))),
    "mixture": (  # the smallest scale of each dim is 1
        {"a": [[0.4, -0.6], [-0.8, 0.5]], "b": [[1.0, 1.4], [1.3, 1.0]], "c": [0.3, -0.4]},
        dist.MixtureOfDiagNormals,
    ),
    "mixture_shared": (
        {"a": [[0.4, -0.6], [-0.8, 0.5]], "b": [1.0, 1.0], "c": [0.3, -0.4]},
        dist.MixtureOfDiagNormalsSharedCovariance,
    ),
}


def f(z: Tensor) -> Tensor:
    """A function without symmetry, of bounded growth."""
    return (1.3 * z).sin() + 0.5 * (0.7 * z - 0.4).cos()


def several(z: Tensor) -> Tensor:
    return f(z[..., 0]) + 0.8 * (z[..., 0] * z[..., 1]).tanh() - f(0.5 * z[..., -1])


def exact(params: dict, make: Callable, density: Callable, nodes: Tensor, values: Tensor) -> dict[str, Tensor]:
    leaves = {n: f64(p).requires_grad_() for n, p in params.items()}
    mean = (density(make(*leaves.values()), nodes).exp() * values).sum()
    return dict(zip(leaves, torch.autograd.grad(mean, list(leaves.values())), strict=True))


def on_a_line(name: str) -> dict[str, Tensor]:
    params, make, (low, high) = LINE[name]
    count = 200_000
    z = low + (torch.arange(count, dtype=torch.float64) + 0.5) * (high - low) / count
    return exact(params, make, lambda fn, z: fn.log_prob(z), z, f(z) * (high - low) / count)


def in_a_plane(name: str) -> dict[str, Tensor]:
    """On a triangle for the Dirichlet, else on a square; AVF and mixtures have ordinary densities."""
    params, make = PLANE[name]
    low, high = (0.0, 1.0) if name == "dirichlet" else (-7.0, 7.0)
    count = 700
    axis = low + (torch.arange(count, dtype=torch.float64) + 0.5) * (high - low) / count
    z = torch.cartesian_prod(axis, axis)
    if name == "dirichlet":
        last = 1 - z.sum(-1)
        z, last = z[last > 1e-9], last[last > 1e-9]
        z = torch.cat([z, last[:, None]], -1)
    values = several(z) * ((high - low) / count) ** 2

    def density(fn, z: Tensor) -> Tensor:
        if name in ("omt", "avf"):
            return dist.MultivariateNormal(fn.loc, scale_tril=fn.scale_tril).log_prob(z)
        return fn.log_prob(z)

    return exact(params, make, density, z, values)


def gradients(params: dict, make: Callable, g: Callable, num: int, estimator, count: int = 120) -> dict[str, Tensor]:
    """Independent gradients of E[f] by the parameters: the prior is the guide's distribution, held."""
    pyro.clear_param_store()

    def model() -> None:
        z = pyro.sample("z", make(*(f64(p) for p in params.values())))
        pyro.factor("f", g(z))

    def guide() -> None:
        pyro.sample("z", make(*(pyro.param(n, f64(p)) for n, p in params.items())))

    loss = MonteCarloELBO(num, 0, vectorize_particles=num > 1, estimator=estimator)
    pyro.set_rng_seed(0)
    rows = []
    for _ in range(count):
        loss.loss_and_grads(model, guide)
        leaves = {n: pyro.param(n).unconstrained() for n in params}
        rows.append({n: -leaf.grad.clone() for n, leaf in leaves.items()})
        for leaf in leaves.values():
            leaf.grad = None
    return {n: torch.stack([row[n] for row in rows]) for n in params}


def sampled(params: dict, make: Callable, g: Callable, num: int, *_, count: int = 200) -> dict[str, Tensor]:
    """As `gradients`, by the sampler alone: these distributions cannot be expanded to particles."""
    leaves = {n: f64(p).requires_grad_() for n, p in params.items()}
    pyro.set_rng_seed(0)
    rows = []
    for _ in range(count):
        mean = g(make(*leaves.values()).rsample(torch.Size([num]))).mean()
        rows.append(torch.autograd.grad(mean, list(leaves.values())))
    return {n: torch.stack(part) for n, part in zip(params, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("name", ["omt", "avf"])
def test_what_cannot_be_expanded_runs_as_one_particle(name):
    """The same draw, differentiated by hand: bit for bit the sampler's own path."""
    params, make = PLANE[name]
    found = gradients(params, make, several, 1, "pathwise", 1)
    leaves = {n: f64(p).requires_grad_() for n, p in params.items()}
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    fn, prior = make(*leaves.values()), make(*(f64(p) for p in params.values()))
    z = fn.rsample()
    right = torch.autograd.grad(several(z) + prior.log_prob(z) - fn.log_prob(z), list(leaves.values()))
    for n, expected in zip(params, right, strict=True):
        torch.testing.assert_close(found[n][0], expected, rtol=1e-12, atol=1e-12)


def assert_right(samples: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> None:
    largest = max(float(g.abs().max()) for g in expected.values())
    for parameter, rows in samples.items():
        assert_mean(rows, expected[parameter], detect=0.15 * largest, what=f"{name}: by {parameter}")


@pytest.mark.parametrize("name", LINE)
def test_pathwise_on_a_line(name):
    """Implicit gradients of torch's samplers, and transforms of them."""
    params, make, _ = LINE[name]
    assert_right(gradients(params, make, f, 2000, "pathwise"), on_a_line(name), name)


@pytest.mark.parametrize("name", PLANE)
def test_pathwise_in_a_plane(name):
    params, make = PLANE[name]
    expected = in_a_plane(name)
    sample = sampled if "tril" in "".join(make(*map(f64, params.values())).arg_constraints) else gradients
    samples = sample(params, make, several, 2000, "pathwise")
    if "b" in params and params["b"] is TRIL:
        samples["b"], expected["b"] = samples["b"].tril(), expected["b"].tril()
    assert_right(samples, expected, name)


@pytest.mark.parametrize(
    ("cls", "baseline"),
    [(RejectionGamma, "leave_one_out"), (RejectionGamma, "none"), (ShapeAugmentedGamma, "leave_one_out")],
)
def test_rejection_samplers(cls, baseline):
    """Pathwise plus the residual's score; the baseline changes nothing of the mean."""
    params = {"a": 2.5, "b": 1.5}
    samples = gradients(params, cls, f, 2000, PartialPathwise(baseline=baseline))
    assert_right(samples, on_a_line("gamma"), f"{cls.__name__}, {baseline}")


def test_of_one_particle_there_is_no_baseline():
    params = {"a": 2.5, "b": 1.5}
    one, two = (
        gradients(params, RejectionGamma, f, 1, PartialPathwise(baseline=b), 5) for b in ("leave_one_out", "none")
    )
    for name in params:
        assert torch.equal(one[name], two[name])


def test_the_baseline_takes_away_what_a_constant_costs():
    params = {"a": 1.05, "b": 1.5}

    def shifted(z: Tensor) -> Tensor:
        return f(z) + 50.0

    variance = {
        (baseline, g): float(
            gradients(params, RejectionGamma, g, 8, PartialPathwise(baseline=baseline), 100)["a"].var()
        )
        for baseline in ("leave_one_out", "none")
        for g in (f, shifted)
    }
    assert variance["leave_one_out", shifted] == pytest.approx(variance["leave_one_out", f], rel=1e-6)
    assert variance["none", shifted] > 10 * variance["none", f]


def test_an_unknown_baseline_is_refused():
    with pytest.raises(EstimatorError, match="baseline='mean'"):
        PartialPathwise(baseline="mean")


@pytest.mark.parametrize(
    ("name", "scales", "pyros", "right"),
    [("mixture", [[0.7, 0.9], [0.8, 0.6]], 0.3030, 0.40315), ("mixture_shared", [0.7, 0.9], 0.4090, 0.40141)],
)
def test_mixtures_with_small_scales_have_a_wrong_path_by_their_logits(name, scales, pyros, right):
    """Pyro's, by a quarter and by a fiftieth here, so that auto takes another estimator. If this fails, look again."""
    params, make = {**PLANE[name][0], "b": scales}, PLANE[name][1]
    small = f"small_{name}"
    PLANE[small] = params, make
    try:
        expected = in_a_plane(small)
    finally:
        del PLANE[small]
    samples = sampled(params, make, several, 2000, count=120)
    assert float(expected["c"][0]) == pytest.approx(right, abs=1e-5)
    assert_mean(samples["c"][:, 0], f64(pyros), detect=0.01)
    for other in ("a", "b"):
        assert_mean(samples[other], expected[other], detect=0.1)

    def guide() -> None:
        pyro.sample("z", make(*(pyro.param(n, f64(p)) for n, p in params.items())))

    pyro.clear_param_store()
    loss = MonteCarloELBO(2, 0, vectorize_particles=False)
    loss.loss(guide, guide)
    assert type(loss.resolved["z"]).__name__ == "LeaveOneOut"


def test_von_mises_has_no_path():
    """In torch 2 it is drawn by rejection without one."""
    assert not dist.VonMises.has_rsample

    def guide() -> None:
        pyro.sample("z", dist.VonMises(pyro.param("a", f64(0.3)), f64(1.2)))

    with pytest.raises(EstimatorError, match=r"VonMises.*has_rsample=False.*leave_one_out"):
        MonteCarloELBO(2, estimator="pathwise").loss(guide, guide)
