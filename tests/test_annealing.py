"""Annealing: tempered posteriors by hand, the KL in model and guide, schedules that reach 1, rules that wait."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.distributions import constraints
from torch import Tensor

from pyro_emvae import EM, SVI, MonteCarloELBO, annealing, problems, steps
from pyro_emvae._checks import EmvaeError, StepError
from pyro_emvae.annealing import Cyclic, Geometric, Linear
from pyro_emvae.convergence import Deterministic, Windowed
from pyro_emvae.engine import gradient

X = torch.tensor([-2.1, -1.8, -1.2, -2.5, -0.9, 0.4, 1.9, 2.3, 1.1, 2.6], dtype=torch.float64)
LOC = torch.tensor([-0.5, 1.0], dtype=torch.float64)


def mixture(x: Tensor) -> None:
    weights = pyro.param("weights", torch.tensor([0.6, 0.4], dtype=x.dtype), constraint=constraints.simplex)
    loc = pyro.param("loc", LOC.clone())
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def closed_form() -> steps.ClosedForm:
    def statistics(values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        r = torch.nn.functional.one_hot(values["z"], values["z"].max() + 1).to(x)
        return {"n": r, "x": r * x[:, None]}

    return steps.ClosedForm(statistics, lambda s, params: {"weights": s["n"] / s["n"].sum(), "loc": s["x"] / s["n"]})


def exact() -> EM:
    return EM(mixture, e_step="enumerated", m_step=closed_form())


# Tempered posteriors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_a_mixtures_posterior_to_a_power(beta):
    posterior = steps.Enumerated().infer(mixture, (X,), {}).tempered(beta)
    log_p = torch.tensor([0.6, 0.4]).double().log() + dist.Normal(LOC, 1.0).log_prob(X[:, None])
    r = torch.softmax(beta * log_p, -1)
    torch.testing.assert_close(posterior.marginal("z").probs, r, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(posterior.clique("z").reshape(10, 2), r, rtol=1e-6, atol=1e-7)
    assert posterior.entropy == pytest.approx(float(-(r * r.log()).sum()), rel=1e-6)
    assert float(posterior.expected_log_joint().detach()) == pytest.approx(float((r * log_p).sum()), rel=1e-6)
    assert posterior.is_exact is (beta == 1.0) and math.isnan(posterior.log_evidence)


def test_a_chains_posterior_to_a_power_by_brute_force():
    logits = torch.tensor([[0.5, -0.2, 0.1], [-0.4, 0.3, 0.0], [0.2, 0.1, -0.6]], dtype=torch.float64)
    x = torch.tensor([0.3, 1.9, 1.1, -0.2], dtype=torch.float64)

    def model(x: Tensor) -> None:
        z: Any = 0
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=logits[z]))
            pyro.sample(f"x_{t}", dist.Normal(z.to(x), 1.0), obs=x[t])

    beta = 0.3
    posterior = steps.Enumerated().infer(model, (x,), {}).tempered(beta)
    paths, log_p = list(itertools.product(range(3), repeat=4)), []
    table = logits.log_softmax(-1)
    for path in paths:
        steps_ = sum(table[a, b] for a, b in itertools.pairwise((0, *path)))
        log_p.append(steps_ + dist.Normal(torch.tensor(path).double(), 1.0).log_prob(x).sum())
    log_p = torch.stack(log_p)
    q = torch.softmax(beta * log_p, 0)
    for t in range(4):
        mine = torch.zeros(3, dtype=torch.float64).index_add_(0, torch.tensor([p[t] for p in paths]), q)
        torch.testing.assert_close(posterior.marginal(f"z_{t}").probs, mine, rtol=1e-10, atol=1e-12)
    assert posterior.entropy == pytest.approx(float(-(q * q.log()).sum()), rel=1e-10)
    assert float(posterior.expected_log_joint().detach()) == pytest.approx(float((q * log_p).sum()), rel=1e-10)


def test_a_gaussians_posterior_to_a_power():
    problem = problems.linear_gaussian()
    plain = steps.Gaussian().infer(problem.model, problem.args, {})
    hot = plain.tempered(0.25)
    one, two = plain.marginal("z"), hot.marginal("z")
    torch.testing.assert_close(two.mean, one.mean)
    torch.testing.assert_close(two.variance, 4 * one.variance)
    width = math.prod(one.mean.shape)
    assert hot.entropy == pytest.approx(plain.entropy + 0.5 * width * math.log(4.0), rel=1e-6)
    expected = [float(posterior.expected_log_joint().detach()) for posterior in (hot, plain)]
    assert hot.is_exact is False and expected[0] < expected[1]


def test_the_recorded_objective_is_the_bound_of_the_tempered_posterior():
    fit = exact().run(X, max_iter=6, anneal=Geometric(3, start=0.1), track=["weights", "loc"])
    for t, beta in enumerate([0.1, 0.1 ** (2 / 3), 0.1 ** (1 / 3), 1.0]):
        weights, loc = (torch.tensor(fit.history[f"param_{name}"].values[t]) for name in ("weights", "loc"))
        log_p = weights.log() + dist.Normal(loc, 1.0).log_prob(X[:, None])
        r = torch.softmax(beta * log_p, -1)
        bound = float((r * (log_p - r.log())).sum())
        assert fit.history["objective"].values[t] == pytest.approx(bound, rel=1e-5)
        assert fit.history["anneal"].values[t] == pytest.approx(beta)


def test_annealing_finds_what_plain_em_misses():
    """Both components start among the same data; the hot posterior does not decide for them."""
    x = torch.cat(
        [torch.linspace(-0.3, 0.3, 30), torch.linspace(5.7, 6.3, 30), torch.linspace(11.7, 12.3, 30)]
    ).double()

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-0.2, 0.2, 9.0], dtype=x.dtype))
        weights = pyro.param("weights", torch.tensor([0.3, 0.3, 0.4], dtype=x.dtype), constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    found = []
    for options in ({}, {"anneal": Geometric(40, start=0.02)}):
        pyro.clear_param_store()
        found.append(EM(model, e_step="enumerated", m_step=closed_form()).run(x, max_iter=300, **options))
    assert found[1].objective > found[0].objective + 50
    assert sorted(found[1].params["loc"].tolist()) == pytest.approx([0.0, 6.0, 12.0], abs=0.1)


# KL annealing -------------------------------------------------------------------------------------------------------


def scaled(function: Any, beta: float, latents: tuple[str, ...]) -> Any:
    """A reference of its own: Pyro's handler around the latents alone."""

    class Scale(poutine.messenger.Messenger):
        def _pyro_sample(self, msg: dict) -> None:
            if msg["name"] in latents:
                msg["scale"] = msg["scale"] * beta

    def run(*args: Any) -> Any:
        with Scale():
            return function(*args)

    return run


@pytest.mark.parametrize("name", ["normal_normal", "masked", "subsampled", "discrete_two_level", "local_global"])
def test_the_gradient_is_that_of_latents_scaled_in_model_and_guide(name):
    problem, beta = getattr(problems, name)(), 0.3
    em = SVI(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.1}))
    em.engine.setup(problem.args, {})
    latents = tuple(n for n, kind in em.blocks.sites.items() if kind == "latent")
    found = []
    for kind in ("ours", "reference"):
        pyro.set_rng_seed(1)
        pair, factor = (problem.model, problem.guide), torch.tensor(beta, dtype=torch.float64)
        if kind == "reference":
            pair, factor = tuple(scaled(f, beta, latents) for f in pair), None
        found.append(gradient(*pair, MonteCarloELBO(estimator="pyro"), problem.args, {}, beta=factor))
    for key, value in found[1].grads.items():
        torch.testing.assert_close(found[0].grads[key], value, rtol=1e-6, atol=1e-8)
    pyro.set_rng_seed(1)
    plain = gradient(problem.model, problem.guide, MonteCarloELBO(estimator="pyro"), problem.args, {})
    assert found[0].loss == plain.loss and found[0].loss != found[1].loss


@pytest.mark.parametrize("objective", ["elbo", "elbo_analytic_kl"])
def test_with_beta_zero_the_guide_is_free_of_the_prior(objective):
    """All that is left is the likelihood: q goes to its maximum."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.1))

    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), MonteCarloELBO(objective=objective))
    fit = svi.run(101, torch.tensor(3.0), anneal=lambda t: float(t == 100), track="loc")
    assert fit.history["param_loc"].values[100] == pytest.approx(3.0, abs=0.3)


@pytest.mark.parametrize("cls", [SVI, EM])
def test_recorded_steps_read_the_factor_from_its_tensor(cls):
    """Bit for bit the eager run, along the whole schedule, with one recording per gradient."""
    runs = []
    for backend in ("eager", "graph"):
        pyro.clear_param_store()
        problem = problems.linear_gaussian()
        fitter = cls(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.1}), backend=backend)
        run = functools.partial(fitter.run, 12, *problem.args) if cls is SVI else None
        run = run or functools.partial(fitter.run, *problem.args, max_iter=12)
        runs.append(run(seed=0, anneal=Linear(6)))
    assert len(fitter.engine._recordings) == (1 if cls is SVI else 2)
    for name, value in runs[0].params.items():
        assert torch.equal(value, runs[1].params[name])
    np.testing.assert_array_equal(runs[0].history["elbo"].values, runs[1].history["elbo"].values)
    assert runs[1].history["anneal"].values[:7] == pytest.approx([t / 6 for t in range(7)])
    assert fitter.engine.beta is None


# The run ------------------------------------------------------------------------------------------------------------


def test_no_rule_judges_below_one():
    """The tempered bound may fall, and a rule that any iteration satisfies waits."""
    easy = Deterministic(tol=1e6, change_tol=1e6, confirm=1)
    assert exact().run(X, max_iter=50, stop=easy).num_iterations < 8
    pyro.clear_param_store()
    fit = exact().run(X, max_iter=50, stop=easy, anneal=Linear(20, start=0.1), on_decrease="raise")
    assert 20 < fit.num_iterations < 28 and fit.status == "CONVERGED"
    assert (np.diff(fit.history["objective"].values[:20]) != 0).all()
    pyro.clear_param_store()
    problem = problems.normal_normal()
    svi = SVI(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.0}))
    rule = Windowed(tol=50.0, window=10, patience=2)
    assert svi.run(500, *problem.args, seed=0, stop=rule, anneal=Linear(100)).num_iterations >= 130


def test_a_run_that_anneals_ends_at_the_maximum():
    plain = exact().run(X, max_iter=500)
    pyro.clear_param_store()
    fit = exact().run(X, max_iter=500, anneal=Geometric(20))
    assert fit.status == plain.status == "CONVERGED" and fit.objective == pytest.approx(plain.objective, abs=1e-4)


@pytest.mark.parametrize("make", [exact, lambda: by_guide(EM), lambda: by_guide(SVI)], ids=["exact", "em", "svi"])
def test_a_run_goes_on_where_its_schedule_was(tmp_path, make):
    def run(total: int, **options: Any) -> Any:
        pyro.clear_param_store()
        fitter = make()
        options |= {"seed": 0, "anneal": Linear(5, start=0.2), "stop": None}
        return fitter.run(X, max_iter=total, **options) if isinstance(fitter, EM) else fitter.run(total, X, **options)

    whole = run(9)
    for total in (6, 9):
        fit = run(total, checkpoint=tmp_path / "run.pt", every=2)
    assert all(torch.equal(value, fit.params[name]) for name, value in whole.params.items())
    np.testing.assert_array_equal(fit.history["anneal"].values, whole.history["anneal"].values)


def by_guide(cls: type) -> Any:
    def guide(x: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(len(x), 2, dtype=x.dtype))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=logits))

    return cls(mixture, guide, pyro.optim.Adam({"lr": 0.1}))


def test_with_a_loader_iterations_are_batches():
    problem = problems.linear_gaussian()
    svi = SVI(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.1}))
    fit = svi.run(data=[problem.args] * 3, num_epochs=2, anneal=Linear(4))
    assert fit.history["anneal"].values.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    with pytest.raises(EmvaeError, match="from iteration 6 on, in a run of 6"):
        svi.run(data=[problem.args] * 3, num_epochs=2, anneal=Linear(6))
    with pytest.raises(EmvaeError, match="unknown number"):
        svi.run(data=iter([problem.args] * 3), anneal=Linear(1))


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("anneal", "observed"),
    [
        (Linear(10), "iteration 10 on, in a run of 10"),
        (Cyclic(4, cycles=3), "iteration 10 on, in a run of 10"),
        (Geometric(400), "iteration 400 on"),
        (lambda t: t / 10, "iteration 10 on"),
        (lambda t: 2.0 * t, "got 2.0"),
        (lambda t: "one", "got 'one'"),
        (0.5, "float"),
        (Linear, "ABCMeta"),
    ],
)
def test_schedules_that_never_reach_one_are_refused(anneal, observed):
    em = exact()
    with pytest.raises(EmvaeError, match=observed):
        em.run(X, max_iter=10, anneal=anneal)
    assert not list(pyro.get_param_store()) and em.engine.beta is None


@pytest.mark.parametrize(
    ("make", "observed"),
    [
        (lambda: Linear(0), "got 0"),
        (lambda: Linear(3, start=1.0), "got 1.0"),
        (lambda: Geometric(3, start=0.0), "got 0.0"),
        (lambda: Cyclic(0), "got 0"),
        (lambda: Cyclic(4, ramp=0.0), "got 0.0"),
        (lambda: Cyclic(4, cycles=0), "got 0"),
        (lambda: Cyclic(4, start=-0.1), "got -0.1"),
    ],
)
def test_arguments_are_checked(make, observed):
    with pytest.raises(EmvaeError, match=observed):
        make()


@pytest.mark.parametrize("schedule", [Linear(7, 0.1), Geometric(7), Cyclic(5, 2, 0.6, 0.2)])
def test_schedules_end_when_they_say(schedule):
    factors = [schedule.factor(t) for t in range(30)]
    assert all(0 <= f <= 1 for f in factors) and set(factors[schedule.ends :]) == {1.0}
    assert factors[schedule.ends - 1] < 1.0
    assert annealing.checked(schedule, schedule.ends + 1) is schedule


def test_what_cannot_be_annealed_is_refused():
    with pytest.raises(StepError, match="factor of 0"):
        exact().run(X, max_iter=10, anneal=Linear(3))
    for e_step in ("laplace", steps.MonteCarlo("prior")):
        problem = problems.linear_gaussian()
        pyro.clear_param_store()
        em = EM(problem.model, e_step=e_step, m_step="lbfgs")
        with pytest.raises(StepError, match=r"be annealed with the factor 0\.1"):
            em.run(*problem.args, max_iter=10, anneal=Geometric(3))
    for options in ({"accelerate": "squarem"}, {"n_init": 2}):
        with pytest.raises(StepError, match=next(iter(options))):
            exact().run(X, max_iter=10, anneal=Geometric(3), **options)
    svi = SVI(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.1}), infer.Trace_ELBO())
    with pytest.raises(EmvaeError, match="loss Trace_ELBO"):
        svi.run(10, *problem.args, anneal=Linear(3))
    assert math.isfinite(svi.step(*problem.args))
