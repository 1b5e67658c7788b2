"""Annealing: tempered posteriors by hand, the KL in model and guide, schedules that reach 1, rules that wait."""

from __future__ import annotations

import dataclasses
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
from pyro_emvae.convergence import Ascent, Deterministic, Windowed
from pyro_emvae.engine import gradient
from pyro_emvae.steps.samplers.gibbs import _conditional
from pyro_emvae.steps.samplers.hmc import Coordinates
from pyro_emvae.testing import assert_mean

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


def by_draws() -> EM:
    return EM(mixture, e_step=steps.MonteCarlo("gibbs", 20, num_warmup=2), m_step=closed_form())


RESUMED = {"exact": exact, "em": lambda: by_guide(EM), "svi": lambda: by_guide(SVI), "draws": by_draws}


@pytest.mark.parametrize("make", RESUMED.values(), ids=RESUMED)
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


# Draws --------------------------------------------------------------------------------------------------------------


def rates(x: Tensor) -> None:
    scale = pyro.param("scale", torch.tensor(1.5, dtype=x.dtype), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1 / scale))
        pyro.sample("x", dist.Poisson(rate), obs=x)


COUNTS = torch.tensor([0.0, 3.0, 1.0, 5.0], dtype=torch.float64)
PRIOR = dist.Gamma(torch.tensor(2.0, dtype=torch.float64), torch.tensor(1 / 1.5, dtype=torch.float64))


def tempered(e_step: steps.MonteCarlo, model: Any, x: Tensor, beta: float, *guide: Any) -> tuple[Any, Any]:
    """Return posterior and info of an E-step in a run with a factor."""
    em = EM(model, *guide, e_step=e_step, m_step="lbfgs")
    em._prepare((x,), {})
    em.engine.beta = torch.tensor(beta, dtype=torch.float64)
    state = em._initial(em.engine.state, (x,), {})
    return em._e_phase.run(em.engine, state, None, (x,), {})[1:]


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_chains_move_by_the_power_of_the_joint_density_and_the_whole_jacobian(beta):
    step = steps.MonteCarlo("hmc")
    target = dataclasses.replace(step.look(rates, (COUNTS,), {}, None), beta=beta)
    u = torch.linspace(-1.0, 1.5, 12, dtype=torch.float64).reshape(3, 4, 1)
    z = u.squeeze(-1).exp()
    log_p = PRIOR.log_prob(z) + dist.Poisson(z).log_prob(COUNTS)
    torch.testing.assert_close(Coordinates(target).log_density(u), beta * log_p + u.squeeze(-1), rtol=1e-10, atol=1e-10)
    target = dataclasses.replace(steps.MonteCarlo("gibbs").look(mixture, (X,), {}, None), beta=beta)
    log_p = torch.tensor([0.6, 0.4]).double().log()[:, None] + dist.Normal(LOC[:, None], 1.0).log_prob(X)
    found = _conditional(target, {"z": torch.arange(2)[:, None].expand(2, 10)}, "z", 1)
    torch.testing.assert_close(found, beta * log_p, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_weights_of_draws_to_a_power_by_hand(beta):
    """The objective is the bound of the tempered posterior, estimated; with many draws it is that of the exact one."""
    a, b = beta * (1.0 + COUNTS) + 1, torch.full_like(COUNTS, beta * (1.0 + 1 / 1.5))
    exact, proposal = dist.Gamma(a, b), dist.Gamma(a, 0.8 * b)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("rate", proposal)

    posterior, info = tempered(steps.MonteCarlo("importance", 20_000), rates, COUNTS, beta, guide)
    z = posterior.draws.values["rate"]
    log_p = PRIOR.log_prob(z) + dist.Poisson(z).log_prob(COUNTS)
    log_w = beta * log_p - proposal.log_prob(z)
    w = torch.softmax(log_w, 0)
    torch.testing.assert_close(posterior.draws.weights, w, rtol=1e-10, atol=1e-12)
    expected = (1 - beta) * (w * log_p).sum(0) + log_w.logsumexp(0) - math.log(len(z))
    assert -info.loss == pytest.approx(float(expected.sum()), rel=1e-10)
    mean_log, mean = torch.digamma(a) - b.log(), a / b
    joint = (1.0 + COUNTS) * mean_log - mean * (1.0 + 1 / 1.5) - 2 * math.log(1.5) - torch.lgamma(COUNTS + 1)
    assert -info.loss == pytest.approx(float((joint + exact.entropy()).sum()), abs=0.05)


def test_draws_from_a_power_of_a_gaussian_are_as_much_wider():
    def normal(x: Tensor) -> None:
        pyro.param("theta", torch.tensor(0.0, dtype=x.dtype))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0)), 1.0), obs=x)

    step = steps.MonteCarlo("hmc", 4000, num_leapfrog=5, num_moves=5, num_warmup=30)
    posterior, info = tempered(step, normal, X[:2], 0.25)
    squares = (posterior.draws.values["z"] - X[:2] / 2).square()
    assert_mean(squares, torch.full((2,), 0.5 / 0.25, dtype=torch.float64), detect=0.5)
    assert info.kind == "Q"


def test_an_annealed_run_by_draws_records_its_factors_and_ends_where_it_should():
    em = EM(mixture, e_step=steps.MonteCarlo("gibbs", 200), m_step=closed_form())
    fit = em.run(X, max_iter=25, seed=0, anneal=Geometric(10, start=0.3))
    plain = exact()
    assert fit.history["anneal"].values.tolist() == [Geometric(10, start=0.3).factor(t) for t in range(25)]
    assert em.engine.beta is None
    pyro.clear_param_store()
    best = plain.run(X, max_iter=500)
    torch.testing.assert_close(fit.params["loc"], best.params["loc"], atol=0.2, rtol=0)


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
    problem = problems.linear_gaussian()
    pyro.clear_param_store()
    em = EM(problem.model, e_step="laplace", m_step="lbfgs")
    with pytest.raises(StepError, match=r"be annealed with the factor 0\.1"):
        em.run(*problem.args, max_iter=10, anneal=Geometric(3))
    for options, observed in (({}, "factor of 0"), ({"growth": Ascent()}, "growth")):
        pyro.clear_param_store()
        em = EM(mixture, e_step=steps.MonteCarlo("gibbs", **options), m_step=closed_form())
        with pytest.raises(StepError, match=observed):
            em.run(X, max_iter=10, anneal=Linear(3))
    for options in ({"accelerate": "squarem"}, {"n_init": 2}):
        with pytest.raises(StepError, match=next(iter(options))):
            exact().run(X, max_iter=10, anneal=Geometric(3), **options)
    svi = SVI(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.1}), infer.Trace_ELBO())
    with pytest.raises(EmvaeError, match="loss Trace_ELBO"):
        svi.run(10, *problem.args, anneal=Linear(3))
    assert math.isfinite(svi.step(*problem.args))
