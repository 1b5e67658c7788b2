"""What `update` of a closed form is called with."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_emvae import EM, steps
from pyro_emvae._checks import StepError
from pyro_emvae.posterior import Outer
from pyro_emvae.steps.ready_mixtures import _products

X = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)


def model(x: Tensor, weight: Tensor | None = None, *, prior: float = 1.0, **rest: float) -> None:
    theta = pyro.param("theta", torch.tensor(0.0, dtype=torch.float64))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(theta, prior)), 1.0), obs=x)


class Module(nn.Module):
    def forward(self, x: Tensor, weight: Tensor | None = None, *, prior: float = 1.0, **rest: float) -> None:
        model(x, weight, prior=prior, **rest)


def statistics(values: dict[str, Tensor], *args: Tensor, **kwargs: float) -> dict[str, Tensor]:
    return {"z": values["z"]}


def seen_by(update, m_step=lambda closed: closed, of=model):
    """Return what `update` got beyond the statistics and parameters, in a step with all kinds of arguments."""
    seen: dict = {}

    @functools.wraps(update)
    def noted(*args, **kwargs):
        assert len(args) == 2
        seen.update(kwargs)
        return {"theta": args[0]["z"] / 3}

    closed = steps.ClosedForm(statistics, noted)
    EM(of, e_step="gaussian", m_step=m_step(closed)).step(X, prior=2.0, extra=4.0)
    return seen


WRAPPED = [lambda closed: closed, steps.Averaged, lambda closed: steps.Damped(closed, 0.5)]


@pytest.mark.parametrize("m_step", WRAPPED)
@pytest.mark.parametrize("of", [model, Module(), functools.partial(model, prior=2.0)])
def test_update_gets_the_models_arguments_that_it_names(m_step, of):
    seen = seen_by(lambda stats, params, prior, x, weight, extra, factor=0.5: {}, m_step, of)
    assert seen.pop("x") is X
    assert seen == {"prior": 2.0, "weight": None, "extra": 4.0}


def test_update_gets_keyword_arguments_by_two_stars_and_nothing_otherwise():
    assert seen_by(lambda stats, params, **kwargs: {}) == {"prior": 2.0, "extra": 4.0}
    assert seen_by(lambda stats, params: {}) == {}
    assert seen_by(lambda stats, params, factor=0.5: {}) == {}


def test_an_argument_that_the_model_lacks_is_refused_and_nothing_moves():
    with pytest.raises(StepError, match="'y'"):
        seen_by(lambda stats, params, y: {})
    assert float(pyro.param("theta").detach()) == 0.0


@pytest.mark.parametrize(("number", "width"), [(7, 3), (7, 4), (1, 1), (60_000, 3), (40, 30)])
def test_sums_of_products_by_component(number, width):
    """In chunks by the distinct products, or component by component: the same sums."""
    torch.manual_seed(0)
    r, x = torch.rand(number, 2, dtype=torch.float64), torch.randn(number, width, dtype=torch.float64)
    expected = torch.einsum("nk,ni,nj->kij", r, x, x)
    torch.testing.assert_close(_products(r, x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("number", [3, 4])
def test_a_statistic_without_a_dim_of_draws_is_that_of_each_datum(number):
    """Also where there happen to be as many draws as data."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + pyro.param("phi", torch.zeros_like(x)), 0.5**0.5))

    def statistics(values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return {"n": torch.ones_like(x), "x": x, "xx": Outer(x[None, :, None], x[None, :, None])}

    seen = {}
    m_step = steps.ClosedForm(statistics, lambda s, _: seen.update(s) or {}, num_particles=number)
    em = EM(model, guide, pyro.optim.SGD({"lr": 0.0}), m_step=m_step)
    em.step(X)
    assert {n: x.item() for n, x in seen.items()} == pytest.approx({"n": 3, "x": 1.5, "xx": 5.25})


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (lambda x: x[:2], r"shape \(1, 2\)"),
        (lambda x: x[None, :2], r"shape \(1, 2\)"),
        (lambda x: x[:, None], r"shape \(3, 1\)"),
        (lambda x: torch.ones(5, 3), r"shape \(5, 3\)"),
        (lambda x: 1.0, "a float"),
    ],
)
def test_a_statistic_of_another_shape_is_refused_and_nothing_moves(wrong, got):
    m_step = steps.ClosedForm(lambda v, x: {"s": wrong(x)}, lambda s, _: {"theta": s["s"].sum()})
    em = EM(model, e_step="gaussian", m_step=m_step)
    with pytest.raises(StepError, match=f"got {got}"):
        em.step(X)
    assert float(pyro.param("theta").detach()) == 0.0


@pytest.mark.parametrize(
    ("statistics", "update", "observed"),
    [
        (lambda v, x: [x], lambda s, _: {}, "a list"),
        (lambda v, x: v["z"], lambda s, _: {}, "`statistics` returns: got a Tensor"),
        (statistics, lambda s, _: None, "`update` returns: got a NoneType"),
        (statistics, lambda s, _: s["z"], "`update` returns: got a Tensor"),
    ],
)
def test_what_has_no_names_is_refused(statistics, update, observed):
    with pytest.raises(StepError, match=observed):
        EM(model, e_step="gaussian", m_step=steps.ClosedForm(statistics, update)).step(X)
    assert float(pyro.param("theta").detach()) == 0.0
