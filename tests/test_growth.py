"""Monte Carlo EM whose number of draws grows: the known maximum, an honest error of the gain, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_emvae import EM, steps
from pyro_emvae._checks import EmvaeError, StepError
from pyro_emvae.convergence import Ascent
from pyro_emvae.growth import measured_gain

X = 1.4 * torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1.0


def model(x: Tensor) -> None:
    theta = pyro.param("theta", torch.tensor(-2.0, dtype=x.dtype))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.0))


def closed_form() -> steps.ClosedForm:
    def statistics(values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return {"z": values["z"], "n": torch.ones_like(x)[None]}

    return steps.ClosedForm(statistics, lambda s, params: {"theta": s["z"] / s["n"]})


def growing(sampler: str = "prior", rule: Ascent | None = None, m_step: Any = None, **options: Any) -> EM:
    e_step = steps.MonteCarlo(sampler, growth=rule or Ascent(tol=1e-2), **options)
    return EM(model, guide if sampler == "importance" else None, e_step=e_step, m_step=m_step or closed_form())


@pytest.mark.parametrize("sampler", ["prior", "importance", "hmc"])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_ends_at_the_maximum_with_more_draws_than_it_began_with(sampler, seed):
    """The maximum is the mean; its standard error 0.32. A tenth of that is asked for."""
    fit = growing(sampler).run(X, max_iter=100, seed=seed)
    size = fit.history["num_particles"].values
    assert fit.status == "CONVERGED" and (np.diff(size) >= 0).all() and size[-1] > size[0]
    assert float(fit.params["theta"]) == pytest.approx(float(X.mean()), abs=0.032)
    history = fit.history
    upper = history["ascent_gain"].values + 1.2816 * history["ascent_error"].values
    assert (upper[-3:] < 1e-2).all() and fit.verdict.remaining * 20 == pytest.approx(history["ascent_gain"].values[-1])
    assert history.attrs["map_evaluations"] > fit.num_iterations
    assert set(history["objective_kind"].values) == {"Q" if sampler == "hmc" else "elbo"}


def test_the_gain_is_that_of_the_expected_log_joint():
    """On the same draws, by hand."""
    em = growing()
    em._prepare((X,), {})
    state = em._initial(em.engine.state, (X,), {})
    _, posterior, _ = em.e_step.expect(em.engine, state, X)
    values = []
    for theta in (-2.0, 0.5):
        with torch.no_grad():
            em.blocks.leaves()["theta"].fill_(theta)
        values.append(float(posterior.expected_log_joint().detach()))
    start = {"theta": torch.tensor(-2.0, dtype=torch.float64)}
    gain, error = measured_gain(em.engine, posterior, start)
    assert gain == pytest.approx(values[1] - values[0], rel=1e-10) and error > 0
    assert float(em.blocks.leaves()["theta"].detach()) == 0.5


def test_chains_that_began_as_one_are_one_group():
    em = growing("hmc", num_particles=3, num_leapfrog=1, num_warmup=5)
    em._prepare((X,), {})
    posterior = chains(em)
    assert posterior.groups.tolist() == [0, 1, 2] * 4
    theta = em.blocks.leaves()["theta"]
    with torch.no_grad():
        theta.fill_(0.5)
    z = posterior.draws.values["z"]
    rise = (-0.5 * (z - 0.5) ** 2 + 0.5 * (z + 2.0) ** 2).reshape(4, 3, 20).mean(0)  # per group and datum
    gain, error = measured_gain(em.engine, posterior, {"theta": torch.tensor(-2.0, dtype=torch.float64)})
    assert gain == pytest.approx(float(rise.mean(0).sum()), rel=1e-10)
    assert error == pytest.approx(float((rise.var(0) / 3).sum().sqrt()), rel=1e-10)


def chains(em: EM) -> Any:
    """Chains that were three per datum, then twelve: four begin where one was."""
    _, _, _ = em.e_step.expect(em.engine, em._initial(em.engine.state, (X,), {}), X)
    state, _, _ = em.e_step.expect(em.engine, em._initial(em.engine.state, (X,), {}), X)
    own = state.steps["E"] | {"size": torch.tensor(12)}
    return em.e_step.expect(em.engine, state.with_own("E", own), X)[1]


def once(em: EM) -> Any:
    return em.e_step.expect(em.engine, em._initial(em.engine.state, (X,), {}), X)[1]


CASES: dict[str, tuple[Callable[[], EM], Callable[[EM], Any]]] = {
    "prior": (lambda: growing("prior", num_particles=50), once),
    "importance": (lambda: growing("importance", num_particles=50), once),
    "split chains": (lambda: growing("hmc", num_particles=3, num_leapfrog=1, num_warmup=20), chains),
    "one chain": (lambda: growing("nuts", num_particles=100, num_warmup=20), once),
}


def test_the_error_of_the_gain_is_honest():
    """Over 150 E-steps its mean square is the variance of the gain: to 35 %, three standard errors of that ratio."""
    assert_honest("importance", 150, 0.35)


@pytest.mark.slow
@pytest.mark.parametrize("key", CASES)
def test_the_error_of_the_gain_is_honest_over_many_e_steps(key, record_result):
    number = 100 if key == "one chain" else 1000
    ratio = assert_honest(key, number, 0.5 if key == "one chain" else 0.25)
    record_result(
        f"squared error of the ascent test over variance of the gain, {key}, {number} E-steps", f"{ratio:.3f}"
    )


def assert_honest(key: str, number: int, tolerance: float) -> float:
    make, draw = CASES[key]
    found = []
    for seed in range(number):
        pyro.clear_param_store()
        em = make()
        em._prepare((X,), {})
        pyro.set_rng_seed(seed)
        theta, start = em.blocks.leaves()["theta"], torch.tensor(0.5, dtype=torch.float64)
        with torch.no_grad():
            theta.fill_(0.5)
            posterior = draw(em)
            theta.fill_(0.8)
        found.append(measured_gain(em.engine, posterior, {"theta": start}))
    gains, errors = np.array(found).T
    ratio = float((errors**2).mean() / gains.var(ddof=1))
    assert ratio == pytest.approx(1.0, abs=tolerance)
    return ratio


def test_a_run_goes_on_with_the_draws_that_it_had(tmp_path):
    whole = growing().run(X, max_iter=8, seed=0)
    for total in (4, 8):
        pyro.clear_param_store()
        fit = growing().run(X, max_iter=total, seed=0, checkpoint=tmp_path / "run.pt", every=1)
    assert torch.equal(fit.params["theta"], whole.params["theta"])
    np.testing.assert_array_equal(fit.history["num_particles"].values, whole.history["num_particles"].values)


def test_too_few_draws_to_decide_are_no_convergence():
    fit = growing(rule=Ascent(tol=1e-6, max_size=120)).run(X, max_iter=100, seed=0)
    assert fit.status in ("STALLED", "MAX_ITER") and fit.history["num_particles"].values.max() == 120
    assert fit.status == "STALLED" and "120" in fit.verdict.reason


def test_one_rule_at_a_time_and_max_iter_is_no_convergence():
    fit = growing().run(X, max_iter=40, seed=0, stop=None)
    assert fit.status == "MAX_ITER" and fit.num_iterations == 40
    pyro.clear_param_store()
    assert growing().run(X, max_iter=2, seed=0).status == "MAX_ITER"


def test_steps_grow_too():
    em = growing(rule=Ascent(tol=1e-4))
    for _ in range(20):
        assert math.isfinite(em.step(X))
    assert int(em.engine.steps["E"]["size"]) > 100


def test_what_the_test_cannot_judge_is_refused():
    with pytest.raises(StepError, match=r"Gradient\(num_steps=1\)"):
        EM(model, optim=pyro.optim.Adam({"lr": 0.1}), e_step=steps.MonteCarlo("prior", growth=Ascent()))
    with pytest.raises(StepError, match="Averaged"):
        growing(m_step=steps.Averaged(closed_form()))
    growing(m_step=steps.LBFGS()).step(X)
    pyro.clear_param_store()
    with pytest.raises(StepError, match="run with data"):
        growing().run(data=[X])

    def halves(x: Tensor) -> None:
        theta = pyro.param("theta", torch.tensor(-2.0, dtype=x.dtype))
        with pyro.plate("data", len(x), subsample=torch.arange(10)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:10])

    pyro.clear_param_store()
    with pytest.raises(StepError, match="a minibatch"):
        EM(halves, e_step=steps.MonteCarlo("prior", growth=Ascent()), m_step=steps.LBFGS()).step(X)


@pytest.mark.parametrize(
    ("options", "observed"),
    [({"growth": 1.5}, "growth=1.5"), ({"growth": Ascent(), "num_particles": 1}, "got 1")],
)
def test_arguments_are_checked(options, observed):
    with pytest.raises(EmvaeError, match=observed):
        steps.MonteCarlo("prior", **options)


@pytest.mark.parametrize("options", [{"patience": 0}, {"max_size": 1}, {"growth": 1.0}, {"tol": 0.0}, {"alpha": 1.0}])
def test_rules_are_checked(options):
    with pytest.raises(EmvaeError, match=next(iter(options))):
        Ascent(**options)
