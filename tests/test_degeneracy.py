"""Spikes of the likelihood are no maxima, and narrow components, rates of zero and empty ones are no spikes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_emvae import EM, steps
from pyro_emvae._checks import DegenerateError, ModelError
from pyro_emvae.degeneracy import check_boundary, spike
from pyro_emvae.parameters import Parameters, Row

SCALES = {"full": constraints.lower_cholesky, "diagonal": constraints.positive}


def normals(seed: int, number: int = 12, width: int = 2) -> Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Sums of a mixture of two normals, of numbers."""
    r = one_hot(values["z"], 2).to(x)
    return {"n": r, "x": r * x[:, None], "xx": r * x[:, None].square()}


def two_normals(**start: list[float]) -> Callable[[Tensor], None]:
    """A mixture of two normal numbers, from the given weights, locations and scales."""
    kinds = {"weights": constraints.simplex, "loc": constraints.real, "scale": constraints.positive}

    def model(x: Tensor) -> None:
        weights, loc, scale = (pyro.param(n, x.new_tensor(start[n]), constraint=kind) for n, kind in kinds.items())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    return model


def by_moments(floor: float) -> Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]:
    """The update by moments about zero, whose variance is a difference and at least `floor`."""

    def update(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        loc = s["x"] / s["n"]
        variance = (s["xx"] / s["n"] - loc.square()).clamp_min(floor)
        return {"weights": s["n"] / s["n"].sum(), "loc": loc, "scale": variance.sqrt()}

    return update


def floored(number: int, kind: str, floor: float = 1e-6) -> steps.ClosedForm:
    """A user's update with a floor below each variance: it never fails, and ends on spikes."""

    def statistics(values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        r = one_hot(values["z"], number).to(x)
        products = x[:, None, :, None] * x[:, None, None, :]
        return {"n": r, "x": r[..., None] * x[:, None, :], "xx": r[..., None, None] * products}

    def update(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        means = s["x"] / s["n"][:, None]
        covariance = s["xx"] / s["n"][:, None, None] - means[:, :, None] * means[:, None, :]
        covariance = covariance + floor * torch.eye(means.shape[1]).to(means)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        scales = torch.linalg.cholesky(covariance) if kind == "full" else variance.sqrt()
        return {"weights": s["n"] / s["n"].sum(), "means": means, "scales": scales}

    return steps.ClosedForm(statistics, update)


def gaussians(x: Tensor, number: int, kind: str, seed: int) -> Any:
    initial = steps.gaussian_mixture(number, kind).start(seed, {}, x)

    def model(x: Tensor) -> None:
        weights = pyro.param("weights", initial["weights"], constraint=constraints.simplex)
        means = pyro.param("means", initial["means"])
        scales = pyro.param("scales", initial["scales"], constraint=SCALES[kind])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            full = kind == "full"
            normal = (
                dist.MultivariateNormal(means[z], scale_tril=scales[z]) if full else dist.Normal(means[z], scales[z])
            )
            pyro.sample("x", normal if full else normal.to_event(1), obs=x)

    return model


def fit_floored(kind: str, x: Tensor, number: int, seed: int, **options: Any) -> Any:
    pyro.clear_param_store()
    em = EM(gaussians(x, number, kind, seed), e_step="enumerated", m_step=floored(number, kind))
    return em.run(x, **{"max_iter": 300, "on_decrease": "warn"} | options)


@pytest.mark.filterwarnings("ignore:`EM` cannot raise")  # an update with a floor is no maximum
@pytest.mark.parametrize(("kind", "seed"), [("full", 1), ("full", 3), ("diagonal", 1), ("diagonal", 4)])
def test_a_floor_makes_no_maximum_of_a_spike(kind, seed):
    x = normals(seed)
    fit = fit_floored(kind, x, 3 if kind == "full" else 4, seed)
    assert fit.status == "DEGENERATE" and "'scales'" in fit.verdict.reason and "nats" in fit.verdict.reason
    assert float(fit.params["weights"].min()) * len(x) < 2.1


@pytest.mark.filterwarnings("ignore:`EM` cannot raise")
def test_restarts_leave_spikes_out():
    """The highest objective is that of a spike, and another one is returned."""
    x = torch.cat([normals(0, 30), normals(1, 30) + 6.0])
    spiked = {"weights": torch.tensor([0.97, 0.03]), "means": torch.stack([x.mean(0), x[3]])}
    spiked["scales"] = torch.stack([3.0 * torch.eye(2), 1e-2 * torch.eye(2)])
    sound = steps.gaussian_mixture(2, "full").start(0, {}, x)
    spiked = {name: value.double() for name, value in spiked.items()}
    model = gaussians(x, 2, "full", 0)
    em = EM(model, e_step="enumerated", m_step=floored(2, "full"))
    fit = em.run(x, n_init=4, init=lambda seed: spiked if seed == 1 else sound, seed=0, max_iter=200)
    assert fit.status == "CONVERGED"
    assert fit.restarts["status"][1] == "DEGENERATE" and fit.restarts["degenerate"].tolist()[1]
    assert fit.restarts["objective"][1] != fit.objective


@pytest.mark.parametrize("width", [1e-2, 1e-3])
@pytest.mark.parametrize("max_iter", [3, 10, 300])
def test_a_narrow_component_of_many_data_is_none(width, max_iter):
    x = torch.cat([normals(0, 40), 1.0 + width * normals(1, 40)])
    em = EM(gaussians(x, 2, "diagonal", 0), e_step="enumerated", m_step=steps.gaussian_mixture(2, "diagonal"))
    fit = em.run(x, max_iter=max_iter)
    assert fit.status == ("CONVERGED" if max_iter == 300 else "MAX_ITER")
    assert max_iter < 300 or float(fit.params["scales"].min()) < 1.5 * width


def test_rates_that_go_to_zero_are_none():
    x = torch.tensor([[0.0, 3.0], [0.0, 2.0], [0.0, 4.0], [9.0, 0.0], [7.0, 0.0], [8.0, 0.0]], dtype=torch.float64)

    def model(x: Tensor) -> None:
        weights = pyro.param("weights", torch.tensor([0.5, 0.5]).double(), constraint=constraints.simplex)
        initial = torch.tensor([[1.0, 3.0], [6.0, 1.0]]).double()
        rates = pyro.param("rates", initial, constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Poisson(rates[z]).to_event(1), obs=x)

    def statistics(values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        r = one_hot(values["z"], 2).to(x)
        return {"n": r, "x": r[..., None] * x[:, None, :]}

    def update(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"weights": s["n"] / s["n"].sum(), "rates": s["x"] / s["n"][:, None] + 1e-9}

    fit = EM(model, e_step="enumerated", m_step=steps.ClosedForm(statistics, update)).run(x, on_decrease="warn")
    assert fit.status == "CONVERGED" and float(fit.params["rates"].min()) < 1e-8


def test_looking_changes_nothing():
    leaf = torch.tensor([0.0, -9.0, -10.0], dtype=torch.float64, requires_grad=True)
    row = Row("scale", leaf, "model", "", constraints.positive)
    before, state = leaf.detach().clone(), torch.get_rng_state()
    text = spike(Parameters((row,)), lambda: -0.1 * leaf[1] - leaf[2])
    assert text.startswith("scale 4.5e-05") and "0.69 nats" in text
    assert torch.equal(leaf.detach(), before) and torch.equal(torch.get_rng_state(), state) and leaf.grad is None
    row = Row("scale", leaf, "guide", "", constraints.positive)
    assert spike(Parameters((row,)), lambda: -leaf.sum()) == ""  # not of the model


def test_scales_are_compared_with_their_own_kind():
    """Units differ from coordinate to coordinate; a singular matrix is seen in its own coordinates."""
    units = torch.tensor([[0.0, -30.0], [0.1, -30.1]], dtype=torch.float64, requires_grad=True)
    row = Row("scale", units, "model", "", constraints.positive)
    assert spike(Parameters((row,)), lambda: -units.sum()) == ""
    tril = torch.tensor([[[0.0, 0.0], [1e-6, -30.0]]], dtype=torch.float64, requires_grad=True)
    row = Row("scale", tril, "model", "", constraints.lower_cholesky)
    assert spike(Parameters((row,)), lambda: -tril.sum()).startswith("scale 9.4e-08")
    single = torch.tensor(-50.0, dtype=torch.float64, requires_grad=True)
    assert spike(Parameters((Row("tau", single, "model", "", constraints.positive),)), lambda: -single) == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCALES)
def test_ordinary_mixtures_raise_no_alarm(kind, record_result):
    """200 simulated mixtures of three components, of unequal scales and units, from one start each.

    Some end on a spike indeed: a component that holds fewer data than it has parameters.
    """
    spikes = alarms = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        number = 60 * (1 + seed % 4)
        centres = 2.5 * torch.randn(3, 2, generator=generator, dtype=torch.float64)
        scales = 0.2 + 1.2 * torch.rand(3, 2, generator=generator, dtype=torch.float64)
        z = torch.randint(3, (number,), generator=generator)
        x = centres[z] + scales[z] * torch.randn(number, 2, generator=generator, dtype=torch.float64)
        x = x * torch.tensor([1.0, 10.0 ** (seed % 5 - 2)], dtype=torch.float64)
        pyro.clear_param_store()
        em = EM(gaussians(x, 3, kind, seed), e_step="enumerated", m_step=steps.gaussian_mixture(3, kind))
        fit = em.run(x, max_iter=10 if seed % 2 else 300)
        few = float(fit.params["weights"].min()) * number < 3
        spikes += fit.status == "DEGENERATE" and few
        alarms += fit.status == "DEGENERATE" and not few
        assert math.isfinite(fit.objective)
    record_result(f"false alarms of DEGENERATE, {kind} mixtures, 200 runs", f"{alarms}, and {spikes} spikes")
    assert alarms == 0


@pytest.mark.parametrize("value", [5.0, 5.1])
@pytest.mark.parametrize("options", [{}, {"accelerate": "squarem"}, {"n_init": 3, "init": "noise"}])
@pytest.mark.parametrize("floor", [1e-300, 1e-30, 1e-14])
def test_an_update_that_loses_digits_on_a_spike_is_degenerate(value, floor, options):
    """Three data are equal, and a variance is a difference of sums: rounding lowers the objective at last."""
    x = torch.cat([torch.full((3,), value, dtype=torch.float64), normals(0, 100, 1)[:, 0]])
    model = two_normals(weights=[0.03, 0.97], loc=[5.0, 0.0], scale=[0.1, 2.0])
    em = EM(model, e_step="enumerated", m_step=steps.ClosedForm(moments, by_moments(floor)))
    fit = em.run(x, max_iter=100, seed=0, **options)
    if "n_init" in options:
        assert fit.restarts["degenerate"].any() and not fit.restarts["status"].eq("FAILED").any()
    else:
        assert fit.status == "DEGENERATE" and fit.verdict.reason
    assert all(torch.isfinite(value).all() for value in fit.params.values())


def one_far_off(change: Callable[[Tensor], Tensor], dtype: torch.dtype, far: bool) -> tuple[EM, Tensor]:
    """A mixture whose second component is on a single datum, if there is one, and an update that changes the scales."""
    x = torch.cat([normals(0, 60, 1)[:, 0], torch.full((int(far),), 16.0)]).to(dtype)
    start = {"loc": [0.0, 16.0 if far else 0.5], "scale": [1.0, 0.01 if far else 100.0]}
    model = two_normals(weights=[0.5, 0.5], **start)

    def update(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        new = by_moments(0.0)(s, params)
        return new | {"scale": change(new["scale"])}

    return EM(model, e_step="enumerated", m_step=steps.ClosedForm(moments, update)), x


sliced = pytest.mark.parametrize("batch_size", [None, 20])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@sliced
@dtypes
@pytest.mark.parametrize(
    ("change", "observed"),
    [
        (lambda scale: 0 * scale, r"'scale': got 0\.0 at \[0\], at the boundary of GreaterThan"),
        (lambda scale: scale * scale.new_tensor([1.0, 0.0]), r"'scale': got 0\.0 at \[1\], at the boundary"),
        (lambda scale: 0 * scale - 1, r"'scale': got -1\.0 at \[0\], outside GreaterThan"),
    ],
)
def test_an_update_that_leaves_the_constraint_where_data_vary_is_an_error(change, observed, dtype, batch_size):
    em, x = one_far_off(change, dtype, far=False)
    with pytest.raises(ModelError, match=observed) as caught:
        em.run(x, max_iter=3, batch_size=batch_size)
    assert not isinstance(caught.value, DegenerateError)
    assert em.blocks.constrained()["scale"].tolist() == pytest.approx([1.0, 100.0], rel=1e-6)
    assert em.blocks.constrained()["loc"].tolist() == [0.0, 0.5]


@sliced
@dtypes
def test_a_scale_of_zero_that_is_the_best_is_degenerate(dtype, batch_size):
    em, x = one_far_off(lambda scale: scale, dtype, far=True)
    fit = em.run(x, max_iter=3, batch_size=batch_size)
    assert fit.status == "DEGENERATE" and "'scale': got 0.0 at [1]" in fit.verdict.reason
    assert fit.params["scale"].tolist() == pytest.approx([1.0, 0.01]) and math.isfinite(fit.objective)


def test_a_rate_of_zeros_alone_leads_to_the_boundary_and_that_of_counts_does_not():
    leaf = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    theta = Parameters((Row("rate", leaf, "model", "", constraints.positive),))
    error = DegenerateError("at the boundary")
    error.values, error.got = {"rate": torch.zeros(())}, "0.0"
    for count, falls in ((0.0, False), (1.0, True)):
        with pytest.raises(ModelError, match=r"got 0\.0") if falls else contextlib.nullcontext():
            check_boundary(theta, error, lambda count=count: count * leaf - leaf.exp())
        assert leaf.item() == 0.0


@pytest.mark.filterwarnings("ignore:`EM` cannot raise the objective")
@pytest.mark.parametrize("mean", [3.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_mixture_is_degenerate_whatever_rounding_makes_of_its_variance(mean, dtype):
    """Moments about zero lose the variance of a component on one datum, and a little of its location."""
    found = []
    for seed in range(6):
        pyro.clear_param_store()
        x = (mean + 0.5 * normals(seed, 12, 1)[:, 0]).to(dtype)
        model = two_normals(weights=[0.1, 0.9], loc=[float(x[0]), float(x.mean())], scale=[0.02, 0.5])
        em = EM(model, e_step="enumerated", m_step=steps.ClosedForm(moments, by_moments(0.0)))
        found.append(em.run(x, max_iter=60, on_decrease="warn", progress_bar=False).status)
    assert found.count("DEGENERATE") >= 2
