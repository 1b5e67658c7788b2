"""What a run records of each iteration, and what it says that it is; data that a run cannot go on with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_emvae import EM, SVI, elbo, elbo_gap, problems, steps
from pyro_emvae._checks import DataError, EmvaeError
from pyro_emvae.steps import Info

X = torch.tensor([-2.1, -1.8, -1.2, -2.5, -0.9, 0.4, 1.9, 2.3, 1.1, 2.6], dtype=torch.float64)
QUICK = {"num_leapfrog": 2, "num_warmup": 5}


def model(x: Tensor) -> None:
    theta = pyro.param("theta", torch.tensor(-1.0, dtype=x.dtype))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2 + pyro.param("phi", torch.zeros((), dtype=x.dtype)), 1.0))


def closed_form() -> steps.ClosedForm:
    def statistics(values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return {"z": values["z"], "n": torch.ones_like(x)[None]}

    return steps.ClosedForm(statistics, lambda s, params: {"theta": s["z"] / s["n"]})


# Draws --------------------------------------------------------------------------------------------------------------


def test_diagnostics_are_summarised_over_the_data():
    info = Info(
        ess=torch.tensor([3.0, 9.0, 5.0]), acceptance=torch.tensor([0.2, 0.6]), khat=torch.tensor([0.1, 0.9, 0.3])
    )
    facts = {"ess_min": 3.0, "ess_median": 5.0, "acceptance_min": 0.2, "acceptance_mean": 0.4}
    assert info.facts == pytest.approx(facts | {"khat_median": 0.3, "khat_max": 0.9})
    assert Info().facts == {} and Info(num_particles=7, ess=2.0).facts["num_particles"] == 7.0


@pytest.mark.parametrize(
    ("sampler", "known"),
    [
        ("prior", {"ess_min", "ess_median", "khat_median", "khat_max", "num_particles"}),
        ("importance", {"ess_min", "ess_median", "khat_median", "khat_max", "num_particles"}),
        ("hmc", {"ess_min", "ess_median", "acceptance_min", "acceptance_mean", "num_particles"}),
    ],
)
def test_a_run_records_the_diagnostics_of_its_draws(sampler, known):
    em = EM(model, guide, e_step=steps.MonteCarlo(sampler, 50), m_step=closed_form())
    history = em.run(X, max_iter=3, seed=0).history
    for name in known:
        assert np.isfinite(history[name].values).all(), name
    assert not {"acceptance_min", "khat_max"} - known & set(history.data_vars)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    em = EM(model, guide, e_step=steps.MonteCarlo(sampler, 50), m_step=closed_form())
    em._prepare((X,), {})
    pyro.set_rng_seed(0)
    _, _, info = em.e_step.expect(em.engine, em._initial(em.engine.state, (X,), {}), X)
    assert history["ess_min"].values[0] == pytest.approx(float(torch.as_tensor(info.ess).min()))
    assert (history["num_particles"].values == 50).all()


@pytest.mark.parametrize(
    "options",
    [
        {"e_step": steps.MonteCarlo("importance", 20), "m_step": closed_form()},
        {"e_step": steps.MonteCarlo("hmc", 4, **QUICK), "m_step": steps.Averaged(closed_form())},
        {"e_step": steps.MonteCarlo("prior", 50), "m_step": steps.Gradient(2)},
        {},
        {"backend": "graph"},
        {"schedule": "joint"},
    ],
    ids=repr,
)
@pytest.mark.parametrize("loader", [False, True])
def test_step_norms_are_known_in_every_run(options, loader):
    """Without a stopping rule, and with batches: the largest relative change of a parameter in each iteration."""
    em = EM(model, guide, pyro.optim.Adam({"lr": 0.1}), **options)
    data = {"data": [(X,), (X,)], "num_epochs": 2} if loader and "hmc" not in repr(options) else {"max_iter": 4}
    fit = em.run(*(() if "data" in data else (X,)), seed=0, stop=None, track=["theta", "phi"], **data)
    expected = np.zeros(4)
    for name in ("theta", "phi"):
        values = fit.history[f"param_{name}"].values if name in fit.params else np.zeros(5)
        expected = np.maximum(expected, np.abs(np.diff(values)) / np.maximum(1, np.abs(values[:-1])))
    assert fit.history["change"].values == pytest.approx(expected, rel=1e-6) and (expected > 0).all()


def test_exact_steps_have_no_diagnostics():
    em = EM(model, e_step="gaussian", m_step=closed_form())
    history = em.run(X, max_iter=3, stop=None).history
    assert not {"ess_min", "acceptance_mean", "khat_max", "num_particles", "anneal"} & set(history.data_vars)


@pytest.mark.parametrize("m_step", ["closed", "gradient", "lbfgs"])
def test_after_chains_the_objective_is_q_and_says_so(m_step):
    """E[log p] of the E-step's very draws; no ELBO, whatever the M-step."""
    step = closed_form() if m_step == "closed" else m_step
    em = EM(model, optim=pyro.optim.Adam({"lr": 0.1}), e_step=steps.MonteCarlo("hmc", 5, **QUICK), m_step=step)
    seen: list[float] = []
    expect = em.e_step.expect

    def watched(*args: Any) -> Any:
        result = expect(*args)
        seen.append(float(result[1].expected_log_joint().detach()))
        return result

    em.e_step.expect = watched
    fit = em.run(X, max_iter=4, seed=0)
    assert fit.history["objective"].values == pytest.approx(seen, rel=1e-12)
    assert fit.history["objective_kind"].values.tolist() == ["Q"] * 4
    assert "no ELBO" in fit.history.attrs["objective_kind"]
    if m_step == "gradient":
        assert np.isnan(fit.history["elbo"].values).all()
        assert fit.history["step_objective"].values == pytest.approx(seen, rel=1e-12)


def test_the_gain_of_m_after_chains_is_known_and_that_of_e_is_not():
    em = EM(model, e_step=steps.MonteCarlo("hmc", 5, **QUICK), m_step=closed_form())
    history = em.run(X, max_iter=4, seed=0, history="full").history
    assert (history["m_gain"].values > 0).all() and np.isnan(history["e_gain"].values).all()


@pytest.mark.parametrize(("e_step", "kind"), [("gaussian", "elbo"), ("laplace", "approximation"), ("gradient", "elbo")])
def test_kinds_of_objectives(e_step, kind):
    user_guide = guide if e_step == "gradient" else None
    em = EM(model, user_guide, pyro.optim.Adam({"lr": 0.1}), e_step=e_step, m_step="gradient")
    history = em.run(X, max_iter=2).history
    assert history["objective_kind"].values.tolist() == [kind] * 2
    assert np.isfinite(history["elbo"].values).all() and history.attrs["objective_kind"].startswith(f"{kind}: ")


def test_joint_steps_have_no_phases():
    history = SVI(model, guide, pyro.optim.Adam({"lr": 0.1})).run(3, X).history
    assert "gain" not in history and np.isnan(history["m_gain"].values).all()
    assert history["objective_kind"].values.tolist() == ["elbo"] * 3


def test_laplace_is_without_noise_but_may_fall():
    em = EM(model, e_step="laplace", m_step=closed_form())
    assert em.is_deterministic and not em.is_monotone and not em.is_exact
    fit = em.run(X, max_iter=300)
    assert fit.status == "CONVERGED"  # by the rule for runs without noise, which "auto" takes


def test_the_progress_bar_shows_what_is_known(capsys):
    EM(model, guide, pyro.optim.Adam({"lr": 0.1})).run(X, max_iter=3, seed=0, progress_bar=True, history="full")
    shown = capsys.readouterr().err
    assert "elbo=" in shown and "E=" in shown and "M=" in shown
    pyro.clear_param_store()
    EM(model, e_step="gaussian", m_step=closed_form()).run(X, progress_bar=True)
    assert "status=CONVERGED" in capsys.readouterr().err
    pyro.clear_param_store()
    EM(model, e_step=steps.MonteCarlo("hmc", 5, **QUICK), m_step=closed_form()).run(X, max_iter=2, progress_bar=True)
    shown = capsys.readouterr().err
    assert "Q=" in shown and "elbo=" not in shown


# The gap of an exact posterior --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("e_step", "kind"), [("gaussian", "exact"), ("laplace", "lower")])
def test_the_bound_of_an_exact_posterior_is_exact(e_step, kind):
    em = EM(model, e_step=e_step, m_step=closed_form())
    em.step(X)
    assert elbo(model, em.guide, X, num_particles=4, seed=0).kind == kind
    gap = elbo_gap(model, em.guide, X, num_particles=4, seed=0)
    assert gap.elbo.kind == kind and gap.total == pytest.approx(0.0, abs=1e-10)
    assert elbo(model, guide, X, num_particles=4, seed=0).kind == "lower"


# Data that a run cannot go on with ----------------------------------------------------------------------------------


def wide(x: Tensor) -> None:
    weight = pyro.param("weight", torch.ones(x.shape[1], dtype=x.dtype))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=x.dtype)))
        pyro.sample("x", dist.Normal(z[..., None] * weight, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("e_step", ["enumerated", "gradient"])
def test_a_loader_that_changes_shape_is_named_and_changes_nothing(e_step):
    """Both layouts are in the message; the parameters are those after the batch before."""
    x = torch.randn(4, 3, dtype=torch.float64)

    def bernoulli(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(pyro.param("p", torch.tensor(0.4, dtype=x.dtype)).clamp(0.1, 0.9)))

    em = EM(wide, bernoulli if e_step == "gradient" else None, pyro.optim.Adam({"lr": 0.1}), e_step=e_step)
    em.step(x)
    before = em.blocks.constrained()
    layouts = r"\(rows, 2\).*after.*\(rows, 3\)" if e_step == "enumerated" else r"\(4, 2\).*4, 3\)"
    for batch, observed in ((x[:, :2], layouts), ((x, 1), "argument 1 of type int")):
        with pytest.raises(EmvaeError, match=observed):
            em.run(data=[x, batch], num_epochs=1, callbacks=lambda progress: before.update(em.blocks.constrained()))
        assert all(torch.equal(value, before[name]) for name, value in em.blocks.constrained().items())
    assert em.run(data=[x, x[:1]], num_epochs=1).num_iterations == 2


@pytest.mark.parametrize("cls", [EM, SVI])
@pytest.mark.parametrize("backend", ["eager", "graph"])
def test_a_batch_that_models_broadcast_is_named_and_changes_nothing(cls, backend):
    """A squeeze makes one row of three numbers three rows, which these programs take without an error."""
    seen: list[dict[str, Tensor]] = []
    svi = cls(model, guide, pyro.optim.Adam({"lr": 0.1}), backend=backend)
    rows = torch.randn(4, 3, dtype=torch.float64)

    def squeezed(batch: Tensor) -> tuple[tuple, dict]:
        return (batch.squeeze(),), {}

    def flat(x: Tensor) -> None:
        model(x.flatten())

    svi.model = svi.engine.model = flat
    svi.guide = svi.engine.guide = lambda x: guide(x.flatten())
    number = {"max_iter": 4} if cls is EM else {"num_steps": 4}
    with pytest.raises(DataError, match="argument 0 of 1 dims after 2"):
        svi.run(
            **number,
            data=[rows, rows, rows, rows[:1]],
            to_args=squeezed,
            callbacks=lambda progress: seen.append(svi.blocks.constrained()),
        )
    assert len(seen) == 3
    assert all(torch.equal(value, seen[-1][name]) for name, value in svi.blocks.constrained().items())


def test_a_batch_of_nothing_is_passed_on_as_it_is():
    """None is a batch: whether the model can take it is for the model to say."""
    svi = SVI(
        lambda x: model(X if x is None else x), lambda x: guide(X if x is None else x), pyro.optim.Adam({"lr": 1})
    )
    assert svi.run(data=[X, None, X, None]).num_iterations == 4


def test_a_loader_that_is_exhausted_is_named():
    problem = problems.linear_gaussian()
    em = EM(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.1}))
    with pytest.raises(DataError, match="type generator for 2 epochs, which can be gone through once"):
        em.run(data=(batch for batch in [problem.args]), num_epochs=2)


def test_an_error_of_a_batch_like_the_others_is_its_own():
    def failing(x: Tensor) -> None:
        raise RuntimeError("of the model")

    with pytest.raises(RuntimeError, match="of the model"):
        SVI(failing, guide, pyro.optim.Adam({"lr": 0.1})).run(data=[X, X])
    assert math.isnan(Info().first_loss)
