"""The M-step by L-BFGS: the maximum, from below, whatever the E-step, and nothing else moved."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_emvae import EM, problems, steps
from pyro_emvae._checks import EmvaeError, NonFiniteError, OptimizerError, StepError
from pyro_emvae.optimizers import BlockOptimizer
from pyro_emvae.posterior import GuidePosterior
from pyro_emvae.testing import check_step

X = torch.tensor([-2.1, -1.8, -1.2, -2.5, -0.9, 0.4, 1.9, 2.3, 1.1, 2.6], dtype=torch.float64)


def mixture(x: Tensor) -> None:
    weights = pyro.param("weights", torch.tensor([0.8, 0.2], dtype=x.dtype), constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([0.0, 0.5], dtype=x.dtype))
    scale = pyro.param("scale", torch.tensor(1.5, dtype=x.dtype), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale), obs=x)


def closed_form() -> steps.ClosedForm:
    def statistics(values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        r = torch.nn.functional.one_hot(values["z"], 2).to(x)
        return {"n": r, "x": r * x[:, None], "xx": r * x[:, None].square()}

    def update(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        loc, count = s["x"] / s["n"], s["n"].sum()
        scale = ((s["xx"] - loc * s["x"]).sum() / count).sqrt()
        return {"weights": s["n"] / count, "loc": loc, "scale": scale}

    return steps.ClosedForm(statistics, update)


def test_its_maximum_is_the_closed_form():
    """One M-step after the same exact E-step: to the tolerance of the search, and never above."""
    found = []
    for m_step in (closed_form(), steps.LBFGS(max_iter=100, tol_grad=1e-10, tol_change=1e-14)):
        pyro.clear_param_store()
        em = EM(mixture, e_step="enumerated", m_step=m_step)
        em.step(X)
        found.append(em.blocks.constrained())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("line_search", ["strong_wolfe", None])
@pytest.mark.parametrize("max_iter", [1, 2, 20])
def test_the_objective_never_falls(max_iter, line_search):
    em = EM(mixture, e_step="enumerated", m_step=steps.LBFGS(max_iter, line_search))
    trace = [-em.step(X) for _ in range(30)]
    assert all(after >= before - 1e-12 * abs(before) for before, after in itertools.pairwise(trace))
    assert trace[-1] > trace[0] + 0.3 or (line_search is None and max_iter == 1)  # whose one step is too long


def test_the_run_is_without_noise_and_guarded_but_not_exact():
    em = EM(mixture, e_step="enumerated", m_step="lbfgs")
    assert em.is_deterministic and em.is_monotone and not em.is_exact
    fit = em.run(X, max_iter=300)
    pyro.clear_param_store()
    best = EM(mixture, e_step="enumerated", m_step=closed_form()).run(X, max_iter=300)
    assert fit.status == "CONVERGED" and fit.objective == pytest.approx(best.objective, abs=1e-5)


def logistic(x: Tensor, y: Tensor) -> None:
    """A random intercept: no closed form."""
    slope = pyro.param("slope", torch.zeros((), dtype=x.dtype))
    spread = pyro.param("spread", torch.ones((), dtype=x.dtype), constraint=constraints.positive)
    with pyro.plate("groups", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1, dtype=x.dtype), spread))
        with pyro.plate("data", x.shape[1], dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=slope * x + z), obs=y)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    z = torch.randn(30, 1, generator=generator, dtype=torch.float64)
    return x, torch.bernoulli(torch.sigmoid(1.5 * x + z), generator=generator)


@pytest.mark.parametrize("sampler", ["prior", "hmc"])
def test_draws_are_held_through_one_m_step(sampler):
    """Q of the very draws that the E-step left rises to where its gradient is zero."""
    em = EM(logistic, e_step=steps.MonteCarlo(sampler, 20), m_step=steps.LBFGS(50))
    args = data()
    em._prepare(args, {})
    state = em._initial(em.engine.state, args, {})
    state, posterior, _ = em.e_step.expect(em.engine, state, *args)
    before = float(posterior.expected_log_joint().detach())
    em.m_step.maximise(em.engine, state, posterior, *args)
    after = posterior.expected_log_joint()
    slopes = torch.autograd.grad(after, list(em.blocks.leaves("model").values()))
    assert float(after.detach()) > before + 1.0
    assert all(abs(float(g)) < 1e-4 for g in slopes)


def test_draws_of_a_guide_are_the_same_in_each_evaluation_and_are_drawn_once():
    """The generator stands where one evaluation leaves it, and the search sees no noise."""
    problem = problems.linear_gaussian()
    ends = []
    for max_iter in (1, 30):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        em = EM(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.1}), m_step=steps.LBFGS(max_iter))
        em.step(*problem.args)
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)


def test_it_keeps_to_its_contract():
    check_step("lbfgs", "M", problem=problems.linear_gaussian(), num_steps=5)


def test_networks_of_the_guide_stay_and_those_of_the_model_move():
    encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    decoder = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(8, 3)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.5).to_event(1))

    em = EM(model, guide, pyro.optim.Adam({"lr": 0.1}), m_step="lbfgs")
    em.step(x)
    before = [[t.clone() for t in net.state_dict().values()] for net in (encoder, decoder)]
    em.phases[1].run(em.engine, em.engine.state, GuidePosterior(model, guide, (x,)), (x,), {})
    same = [
        [torch.equal(old, new) for old, new in zip(then, net.state_dict().values(), strict=True)]
        for then, net in zip(before, (encoder, decoder), strict=True)
    ]
    assert all(same[0]) and not any(same[1]) and encoder.training


def test_gradients_of_the_parameters_are_as_before():
    em = EM(mixture, e_step="enumerated", m_step="lbfgs")
    em.engine.setup((X,), {})
    leaf = em.blocks.leaves("model")["loc"]
    leaf.grad = torch.ones_like(leaf)
    em.step(X)
    assert leaf.grad.tolist() == [1.0, 1.0] and em.blocks.leaves("model")["scale"].grad is None


def test_a_point_that_the_model_refuses_ends_the_search():
    """Beyond 1 there is no density; theta stays at the best point before."""

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros((), dtype=x.dtype))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=x.dtype)))
            if float(loc.detach()) > 1.0:
                raise ValueError("out of reach")
            pyro.sample("x", dist.Normal(10 * loc + z, 1.0), obs=x)

    em = EM(model, e_step="enumerated", m_step=steps.LBFGS(line_search=None))
    x = torch.full((5,), 30.0, dtype=torch.float64)
    em.engine.setup((x,), {})
    before = float(em.blocks.constrained()["loc"])
    em.step(x)
    assert before <= float(em.blocks.constrained()["loc"]) <= 1.0


def test_a_start_that_is_not_finite_is_an_error():
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros((), dtype=x.dtype))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=x.dtype)))
            pyro.sample("x", dist.Normal(loc.sqrt() + z, 1.0), obs=x)

    em = EM(model, e_step="enumerated", m_step="lbfgs")
    with pytest.raises(NonFiniteError, match="LBFGS"):
        em.step(X)
    assert float(em.blocks.constrained()["loc"]) == 0.0


@pytest.mark.parametrize(
    ("options", "observed"),
    [
        ({"max_iter": 0}, "got 0"),
        ({"history_size": -1}, "got -1"),
        ({"line_search": "armijo"}, "'armijo'"),
        ({"tol_grad": -1.0}, "-1.0"),
        ({"tol_change": math.nan}, "nan"),
        ({"num_particles": 0}, "got 0"),
    ],
)
def test_arguments_are_checked(options, observed):
    with pytest.raises(EmvaeError, match=observed):
        steps.LBFGS(**options)


def test_a_model_without_parameters_has_no_m_step():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=x.dtype)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(StepError, match="a block without parameters"):
        EM(model, e_step="enumerated", m_step="lbfgs").step(X)


# Which of torch's optimizers a gradient step takes ------------------------------------------------------------------

TAKEN = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")


@pytest.mark.parametrize("name", TAKEN)
def test_gradient_steps_take_first_order_optimizers(name):
    problem = problems.linear_gaussian()
    m_step = steps.Gradient(optim=functools.partial(getattr(torch.optim, name), lr=1e-3))
    em = EM(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.1}), m_step=m_step)
    before = em.blocks.constrained()
    em.step(*problem.args)
    assert all(math.isfinite(em.step(*problem.args)) for _ in range(2))
    assert em.blocks.constrained().keys() >= before.keys()


@pytest.mark.parametrize(("name", "observed"), [("LBFGS", r"steps\.LBFGS\(\)"), ("SparseAdam", "dense")])
def test_gradient_steps_refuse_the_others(name, observed):
    leaf = {"a": torch.zeros(2, requires_grad=True)}
    with pytest.raises(OptimizerError, match=observed):
        BlockOptimizer.from_user(getattr(torch.optim, name), leaf)
    with pytest.raises(OptimizerError, match=observed):
        _step(getattr(torch.optim, name))


def _step(optim: Any) -> float:
    problem = problems.linear_gaussian()
    e_step = steps.Gradient(optim=torch.optim.Adam)
    return EM(problem.model, problem.guide, e_step=e_step, m_step=steps.Gradient(optim=optim)).step(*problem.args)
