"""M-steps by averaged statistics (SAEM, online EM) and damped ones: against the recursions written by hand."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor

from pyro_emvae import EM, steps
from pyro_emvae._checks import EmvaeError, ModelError, StepError
from pyro_emvae.parameters import assign
from pyro_emvae.steps import Averaged, Damped

K = 2
EXACT = {"rtol": 1e-12, "atol": 1e-14}


def make_data(number: int = 200, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    z = (torch.rand(number, dtype=torch.float64) < 0.4).to(torch.float64)
    return 3.5 * z - 1 + torch.randn(number, dtype=torch.float64) * (0.7 + 0.4 * z)


def mixture(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    like = x.new_zeros(K)
    weights = pyro.param("weights", like + 1 / K, constraint=constraints.simplex)
    loc = pyro.param("loc", x.new_tensor([-0.5, 0.7]))
    scale = pyro.param("scale", like + 1.0, constraint=constraints.positive)
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def statistics(values: dict[str, Tensor], x: Tensor, *rest: Any) -> dict[str, Tensor]:
    r = torch.nn.functional.one_hot(values["z"], K).to(x)
    return {"n": r, "x": r * x[:, None], "xx": r * x[:, None] ** 2}


def update(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
    loc = s["x"] / s["n"]
    return {"weights": s["n"] / s["n"].sum(), "loc": loc, "scale": (s["xx"] / s["n"] - loc**2).sqrt()}


CLOSED = steps.ClosedForm(statistics, update)


def theta() -> dict[str, Tensor]:
    return {name: pyro.param(name).detach().clone() for name in ("weights", "loc", "scale")}


def make(m_step: Any, e_step: Any = "enumerated", guide: Any = None) -> EM:
    pyro.clear_param_store()
    return EM(mixture, guide, e_step=e_step, m_step=m_step)


def sums(x: Tensor, at: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the expected statistics at theta, by Bayes' rule."""
    joint = at["weights"].log() + dist.Normal(at["loc"], at["scale"]).log_prob(x[:, None])
    r = joint.softmax(-1)
    return {"n": r.sum(0), "x": (r * x[:, None]).sum(0), "xx": (r * x[:, None] ** 2).sum(0)}


def log_likelihood(x: Tensor, at: dict[str, Tensor]) -> float:
    joint = at["weights"].log() + dist.Normal(at["loc"], at["scale"]).log_prob(x[:, None])
    return float(joint.logsumexp(-1).sum())


def maximum(x: Tensor) -> dict[str, Tensor]:
    em = make(CLOSED)
    fit = em.run(x, max_iter=400, stop=None)
    assert float(fit.objective) == pytest.approx(log_likelihood(x, theta()), rel=1e-12)
    return theta()


# Averaged -----------------------------------------------------------------------------------------------------------


def test_during_the_burn_in_it_is_the_wrapped_step():
    x = make_data()
    make(CLOSED).run(x, max_iter=8, stop=None)
    expected = theta()
    make(Averaged(CLOSED, burn_in=7)).run(x, max_iter=8)  # the first gain after it is 1 too
    torch.testing.assert_close(theta(), expected, rtol=0, atol=0)
    make(Averaged(CLOSED, burn_in=6)).run(x, max_iter=8)
    assert not torch.equal(theta()["loc"], expected["loc"])


@pytest.mark.parametrize(("rate", "burn_in"), [(0.6, 0), (1.0, 0), (0.75, 3)])
def test_the_recursion_on_a_fixed_batch(rate, burn_in):
    x = make_data()
    em = make(Averaged(CLOSED, rate=rate, burn_in=burn_in))
    mixture(x)
    at, average = theta(), None
    for t in range(1, 13):
        new = sums(x, at)
        gain = 1.0 if t <= burn_in else (t - burn_in) ** -rate
        average = new if average is None else {k: (1 - gain) * average[k] + gain * new[k] for k in new}
        at = update(average, {})
        em.step(x)
        torch.testing.assert_close(theta(), at, **EXACT)
    own = em.engine.state.steps["M"]
    assert int(own["count"]) == 12
    torch.testing.assert_close({k: own[f"statistic:{k}"] for k in average}, average, **EXACT)


def test_the_recursion_on_minibatches_scales_them_to_the_plate():
    x = make_data()
    em = make(Averaged(CLOSED, rate=0.7, first_update=3))
    mixture(x)
    at, average = theta(), None
    for t in range(1, 9):
        index = torch.arange(20) + 20 * (t % 10)
        new = {k: s * len(x) / 20 for k, s in sums(x[index], at).items()}
        average = new if average is None else {k: average[k] + t**-0.7 * (new[k] - average[k]) for k in new}
        at = update(average, {}) if t >= 3 else at
        em.step(x[index], len(x), index)
        torch.testing.assert_close(theta(), at, **EXACT)


def test_the_average_of_a_block_that_is_not_the_first():
    """Its state is that of its phase, and its parameters are those of its block."""
    x, step = make_data(), Averaged(CLOSED, average_from=2)
    blocks = {"loc|weights|scale": "all"}
    em = EM(mixture, blocks=blocks, steps=[("guide", "enumerated"), ("all", CLOSED), ("all", step)])
    path = []
    for _ in range(4):
        em.step(x)
        path.append(theta())
    found = step.averaged(em.engine)
    assert found.keys() == path[0].keys()
    torch.testing.assert_close(found["loc"], torch.stack([p["loc"] for p in path[1:]]).mean(0), **EXACT)


def test_the_average_of_parameters_does_not_disturb_the_iteration():
    x = make_data()
    make(Averaged(CLOSED)).run(x, max_iter=9)
    plain = theta()
    em = make(Averaged(CLOSED, average_from=4))
    path = []
    for t in range(1, 10):
        if t == 4:
            with pytest.raises(StepError, match="average_from=4 after 3 iterations"):
                em.m_step.averaged(em.engine)
        em.step(x)
        path.append(theta())
    torch.testing.assert_close(theta(), plain, rtol=0, atol=0)
    found = em.m_step.averaged(em.engine)
    assert not torch.allclose(found["loc"], plain["loc"])
    torch.testing.assert_close(found["loc"], torch.stack([p["loc"] for p in path[3:]]).mean(0), **EXACT)
    scale = torch.stack([p["scale"].log() for p in path[3:]]).mean(0).exp()
    torch.testing.assert_close(found["scale"], scale, **EXACT)
    assert float(found["weights"].sum()) == pytest.approx(1.0, rel=1e-12)
    assign(em.blocks, found)
    torch.testing.assert_close(theta(), found, **EXACT)


def proposal(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(torch.stack([torch.sigmoid(-x), torch.sigmoid(x)], -1)))


@pytest.mark.parametrize(
    ("sampler", "guide", "options"),
    [("gibbs", None, {"num_warmup": 1, "num_particles": 2}), ("importance", proposal, {"num_particles": 20})],
)
def test_saem_converges_where_monte_carlo_em_keeps_jittering(sampler, guide, options):
    """Over the last 40 of 200 iterations; the parameters' standard errors are 0.04 to 0.13."""
    x = make_data()
    best = maximum(x)

    def path(m_step: Any) -> Tensor:
        em = make(m_step, steps.MonteCarlo(sampler, **options), guide)
        torch.manual_seed(1)
        errors = []
        for t in range(200):
            em.step(x)
            if t >= 160:
                errors.append(torch.cat([theta()[k] - best[k] for k in best]))
        return torch.stack(errors)

    jitter, settled = path(CLOSED), path(Averaged(CLOSED, rate=0.8, burn_in=50))
    assert float((settled.std(0) / jitter.std(0)).max()) < 0.1
    assert float(settled.square().mean().sqrt()) < 0.02  # self-normalised weights have a bias of order 1/draws
    assert log_likelihood(x, best) - log_likelihood(x, theta()) < 0.03
    if sampler == "gibbs":
        assert float(jitter.square().mean().sqrt()) > 0.03


def test_online_em_of_a_gaussian_mixture_reaches_the_maximum_on_all_data():
    torch.manual_seed(0)
    number, dim = 4000, 2
    centres = torch.tensor([[-2.0, 0.0], [2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    x = centres[torch.randint(3, (number,))] + torch.randn(number, dim, dtype=torch.float64)

    def model(x: Tensor, index: Tensor | None = None) -> None:
        weights = pyro.param("weights", x.new_ones(3) / 3, constraint=constraints.simplex)
        means = pyro.param("means", 0.5 * centres)
        eye = torch.eye(dim, dtype=x.dtype).expand(3, dim, dim).clone()
        scales = pyro.param("scales", eye, constraint=constraints.lower_cholesky)
        with pyro.plate("data", number, subsample=index):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.MultivariateNormal(means[z], scale_tril=scales[z]), obs=x)

    def fit(m_step: Any, batches: bool) -> float:
        pyro.clear_param_store()
        em = EM(model, e_step="enumerated", m_step=m_step)
        if not batches:
            em.run(x, max_iter=300, stop=None)
        for _ in range(10 * batches):
            for index in torch.randperm(number).split(100):
                em.step(x[index], index)
        return em.posterior(x).log_evidence

    best = fit(steps.gaussian_mixture(3), False)
    online = fit(Averaged(steps.gaussian_mixture(3), rate=0.7, first_update=10), True)
    jumping = fit(steps.gaussian_mixture(3), True)
    assert -1e-6 < best - online < 0.001 * number  # 0.001 nats per datum
    assert best - jumping > 0.01 * number


# Damped -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.5])
def test_damped_goes_a_part_of_the_way_in_unconstrained_space(factor):
    x = make_data()
    make(CLOSED).step(x)
    whole = theta()
    em = make(Damped(CLOSED, factor))
    mixture(x)
    before = theta()
    em.step(x)
    expected = {
        "loc": before["loc"] + factor * (whole["loc"] - before["loc"]),
        "scale": before["scale"] * (whole["scale"] / before["scale"]) ** factor,
        "weights": before["weights"] * (whole["weights"] / before["weights"]) ** factor,
    }
    expected["weights"] /= expected["weights"].sum()
    torch.testing.assert_close(theta(), expected, **EXACT)
    if factor == 1.0:
        torch.testing.assert_close(theta(), whole, rtol=0, atol=0)


def test_damped_leaves_what_the_update_does_not_set_alone():
    x = make_data()
    make(Damped(steps.ClosedForm(statistics, lambda s, p: {"loc": s["x"] / s["n"]}), 0.5)).step(x)
    assert torch.equal(theta()["scale"], torch.ones(K, dtype=x.dtype))
    assert not torch.equal(theta()["loc"], torch.tensor([-0.5, 0.7], dtype=x.dtype))


def test_both_have_the_fixed_point_of_the_wrapped_step():
    x = make_data()
    best = maximum(x)
    for m_step in (Damped(CLOSED, 0.5), Damped(CLOSED, 1.6), Averaged(CLOSED, rate=0.51)):
        em = make(m_step)
        em.run(x, max_iter=1, stop=None)
        assign(em.blocks, best)
        em.engine.steps = {}
        em.run(x, max_iter=5, stop=None)
        torch.testing.assert_close(theta(), best, rtol=1e-9, atol=1e-9)


# State and bad input ------------------------------------------------------------------------------------------------


def test_the_state_survives_runs_and_goes_with_the_store():
    x = make_data()
    make(Averaged(CLOSED, rate=0.8)).run(x, max_iter=10)
    expected = theta()
    em = make(Averaged(CLOSED, rate=0.8))
    em.run(x, max_iter=4)
    em.run(x, max_iter=6)
    torch.testing.assert_close(theta(), expected, rtol=0, atol=0)
    assert int(em.engine.state.steps["M"]["count"]) == 10
    pyro.clear_param_store()
    em.run(x, max_iter=10)
    torch.testing.assert_close(theta(), expected, rtol=0, atol=0)
    assert all(isinstance(value, Tensor) for value in em.engine.state.steps["M"].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_keep_the_dtype(dtype):
    em = make(Averaged(CLOSED, average_from=1))
    em.run(make_data().to(dtype), max_iter=3)
    assert {v.dtype for k, v in em.engine.state.steps["M"].items() if k != "count"} == {dtype}


def test_restarts_begin_without_statistics():
    torch.manual_seed(0)
    x = torch.randn(60, 2, dtype=torch.float64) + 4 * (torch.arange(60) % 2)[:, None]

    def model(x: Tensor) -> None:
        weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
        means = pyro.param("means", x[:2].clone())
        scales = pyro.param("scales", x.new_ones(2, 2), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(means[z], scales[z]).to_event(1), obs=x)

    em = EM(model, e_step="enumerated", m_step=Averaged(steps.gaussian_mixture(2, "diagonal"), rate=1.0))
    fit = em.run(x, max_iter=20, n_init=3, seed=0)
    assert len(fit.restarts) == 3 and int(em.engine.state.steps["M"]["count"]) <= 20


def test_after_an_error_statistics_and_parameters_are_as_before():
    x = make_data()
    em = make(Averaged(CLOSED, average_from=1))
    em.run(x, max_iter=2)
    before, own = theta(), em.engine.state.steps["M"]
    em.m_step.m_step = steps.ClosedForm(statistics, lambda s, p: update(s, p) | {"scale": torch.zeros(K)})
    with pytest.raises(ModelError, match=r"'scale': got 0.0 at \[0\]"):
        em.step(x)
    torch.testing.assert_close(theta(), before, rtol=0, atol=0)
    assert em.engine.state.steps["M"] is own


def test_statistics_that_change_their_shape_are_refused():
    x = make_data()
    em = make(Averaged(CLOSED))
    em.step(x)
    before = theta()
    em.m_step.m_step = steps.ClosedForm(lambda v, x: {"n": torch.ones(1, len(x), 3)}, update)
    with pytest.raises(StepError, match=r"\{'n': \(3,\)\} after \{'n': \(2,\), 'x'"):
        em.step(x)
    torch.testing.assert_close(theta(), before, rtol=0, atol=0)
    assert int(em.engine.state.steps["M"]["count"]) == 1


@pytest.mark.parametrize(
    ("wrapper", "options", "observed"),
    [
        *((Averaged, {"rate": r}, f"got {r!r}") for r in (0.5, 1.01, 0.0, -1.0, float("nan"), True, "0.7", None)),
        (Averaged, {"burn_in": -1}, "got -1"),
        (Averaged, {"burn_in": 1.5}, "got 1.5"),
        (Averaged, {"first_update": 0}, "got 0"),
        (Averaged, {"average_from": 0}, "got 0"),
        *((Damped, {"factor": f}, f"got {f!r}") for f in (0.0, 2.0, -0.5, float("inf"), float("nan"), False, "1")),
    ],
)
def test_arguments_out_of_range(wrapper, options, observed):
    with pytest.raises(EmvaeError, match=observed):
        wrapper(CLOSED, **options)


@pytest.mark.parametrize("wrapped", [steps.Gradient(), "closed_form", steps.ClosedForm])
def test_only_closed_forms_are_wrapped(wrapped):
    for make_one in (Averaged, lambda m: Damped(m, 0.5)):
        with pytest.raises(StepError, match=r"Gradient|closed_form|ClosedForm"):
            make_one(wrapped)


@pytest.mark.parametrize("name", ["averaged", "damped"])
def test_a_name_alone_makes_none(name):
    with pytest.raises(EmvaeError, match="m_step"):
        EM(mixture, e_step="enumerated", m_step=name)


def test_a_batch_that_the_model_draws_is_refused():
    x = make_data()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=20) as index, poutine.scale(scale=1.0):
            z = pyro.sample("z", dist.Categorical(pyro.param("weights", torch.ones(2) / 2, constraints.simplex)))
            pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x[index])

    em = EM(model, e_step="enumerated", m_step=Averaged(CLOSED))
    with pytest.raises(StepError, match="'data' with subsample_size="):
        em.step(x)
    assert int(em.engine.state.steps.get("M", {"count": 0})["count"]) == 0
