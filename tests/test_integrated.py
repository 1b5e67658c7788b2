r"""Sites whose KL `auto` integrates: which they are, when they are sampled, and that the value is the sampled one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_emvae import EM, SVI, EmvaeError, MonteCarloELBO, NonFiniteError
from pyro_emvae._registry import entries
from pyro_emvae.estimators import AdaptiveSticking, Analytic, Pathwise
from pyro_emvae.problems import exact_gradients
from pyro_emvae.testing.cubature import exact_mean
from pyro_emvae.testing.replay import Replay

F64 = torch.float64
X = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
ANALYTIC, STUCK, PLAIN = Pathwise(entropy=Analytic()), Pathwise(entropy=AdaptiveSticking()), Pathwise()
SCALE: dict[str, Any] = {"model": 1.0, "guide": 1.0}


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def normal(loc: Any, scale: Any) -> Any:
    return dist.Normal(loc + torch.zeros(3, dtype=F64), scale)


def pair(
    prior: Callable = normal, posterior: Callable = normal, handle: Callable = lambda side: poutine.scale(scale=1)
):
    """A latent per datum, below handlers of its own in model and guide."""

    def model(x: Tensor) -> None:
        theta = pyro.param("theta", lambda: number(0.3))
        with pyro.plate("data", 3):
            with handle("model"):
                z = pyro.sample("z", prior(theta, 1.2))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.tensor([0.1, 0.2, -0.4], dtype=F64))
        width = pyro.param("width", lambda: number(0.6), constraint=dist.constraints.positive)
        with pyro.plate("data", 3), handle("guide"):
            pyro.sample("z", posterior(loc, width))

    return model, guide


def by_number(side: str) -> Any:
    return poutine.scale(scale=SCALE[side])


@pytest.fixture(autouse=True)
def scales() -> None:
    SCALE.update(model=1.0, guide=1.0)


def gradient(loss: Any, model: Callable, guide: Callable, seed: int = 3) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients at the parameters that there are."""
    pyro.set_rng_seed(seed)
    value = loss.loss_and_grads(model, guide, X)
    grads = {}
    for name, param in pyro.get_param_store().named_parameters():
        grads[name], param.grad = param.grad, None
    return value, grads


def assert_same(one: tuple[float, dict], two: tuple[float, dict]) -> None:
    assert one[0] == two[0]
    for name, g in two[1].items():
        torch.testing.assert_close(one[1][name], g, rtol=1e-12, atol=1e-12)


def chosen(loss: MonteCarloELBO) -> Any:
    (row,) = loss.table
    return row.estimator


# The value ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["auto", "analytic_kl"])
@pytest.mark.parametrize("options", [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": False}])
def test_the_value_is_trace_elbos_number_for_number(estimator, options):
    """Of particles run one by one, Pyro adds up the runs and we the sites: there it is that of `"pyro"`."""
    model, guide = pair()
    options = {"max_plate_nesting": 1, "vectorize_particles": True} | options
    loss, looped = MonteCarloELBO(**options, estimator=estimator), options["vectorize_particles"] is False
    theirs = MonteCarloELBO(**options, estimator="pyro") if looped else Trace_ELBO(**options)
    for seed in range(3):
        right, grads = gradient(theirs, model, guide, seed)
        found, others = gradient(loss, model, guide, seed)
        assert found == right
        for value in (loss.loss, loss.differentiable_loss, lambda *a: -loss.evaluate(*a[:2], a[2:], {}).objective):
            pyro.set_rng_seed(seed)
            assert torch.as_tensor(value(model, guide, X), dtype=F64).item() == right
        assert not torch.equal(grads["loc"], others["loc"])
    assert chosen(loss) == ANALYTIC


def test_the_objective_says_what_value_is_reported():
    """With the KL integrated in the objective too, the gradient is the same, and the value another."""
    model, guide = pair()
    value, grads = gradient(MonteCarloELBO(), model, guide)
    other, same = gradient(MonteCarloELBO(objective="elbo_analytic_kl"), model, guide)
    both, again = gradient(MonteCarloELBO(objective="elbo_analytic_kl", estimator="analytic_kl"), model, guide)
    assert value != other == both
    for name, g in grads.items():
        torch.testing.assert_close(same[name], g, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(again[name], g, rtol=1e-12, atol=1e-12)


def test_where_q_is_the_posterior_the_value_is_the_evidence_in_every_draw():
    x = number(0.8)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(number(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", lambda: x / 2), number(0.5).sqrt()))

    loss, evidence = MonteCarloELBO(), dist.Normal(number(0.0), number(2.0).sqrt()).log_prob(x)
    values = [-loss.loss(model, guide) for _ in range(5)]
    assert chosen(loss) == ANALYTIC
    assert values == pytest.approx([float(evidence)] * 5, rel=1e-12)


# The gradient -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["normal_normal", "subsampled", "two_level", "linear_gaussian"])
def test_the_mean_gradient_of_auto_is_exact(name, count):
    problem = next(entry.factory for entry in entries("problem") if entry.name == name)()
    replay = Replay(problem, dict.fromkeys(problem.sites, "auto"), count)
    found = exact_mean(replay)
    assert ANALYTIC in replay.loss.resolved.values() and found is not None
    for name, right in exact_gradients(problem).items():
        torch.testing.assert_close(found.gradients[name], right, rtol=1e-9, atol=1e-9)


def test_annealing_scales_the_kl_and_leaves_the_value():
    model, guide = pair()
    loss, beta = MonteCarloELBO(), number(0.3)
    pyro.set_rng_seed(3)
    evaluation = loss.evaluate(model, guide, (X,), {}, beta=beta)
    leaves = dict(pyro.get_param_store().named_parameters())
    found = torch.autograd.grad(evaluation.surrogate, leaves.values(), retain_graph=True)
    q, p = (getattr(evaluation.particles, side)["z"] for side in ("guide", "model"))
    data = evaluation.particles.model["x"].log_prob.sum()
    climbed = data - beta * torch.distributions.kl_divergence(q.fn, p.fn).sum()
    for one, two in zip(found, torch.autograd.grad(climbed, leaves.values()), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    pyro.set_rng_seed(3)
    assert -loss.loss(model, guide, X) == float(evaluation.objective)


def test_second_derivatives_are_those_of_what_is_climbed():
    model, guide = pair()
    loss = MonteCarloELBO()
    pyro.set_rng_seed(3)
    value = loss.differentiable_loss(model, guide, X)
    leaves = list(dict(pyro.get_param_store().named_parameters()).values())
    grads = torch.autograd.grad(value, leaves, create_graph=True)
    found = torch.cat([g.flatten() for g in torch.autograd.grad(sum(g.sum() for g in grads), leaves)])
    step, moved = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for leaf in leaves:
                leaf += sign * step
        moved.append(torch.cat([g.flatten() for g in gradient(loss, model, guide)[1].values()]))
        with torch.no_grad():
            for leaf in leaves:
                leaf -= sign * step
    torch.testing.assert_close(found, (moved[0] - moved[1]) / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cls", [SVI, EM])
@pytest.mark.parametrize("options", [{"num_particles": 1}, {"num_particles": 2, "vectorize_particles": True}])
def test_the_graph_is_eager(cls, options):
    runs = []
    for backend in ("eager", "graph"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = MonteCarloELBO(max_plate_nesting=1, **options)
        fitter = cls(*pair(), pyro.optim.Adam({"lr": 0.05}), loss, backend=backend)
        losses = [fitter.step(X) for _ in range(4)]
        assert chosen(loss) == ANALYTIC
        runs.append((losses, {n: p.detach().clone() for n, p in pyro.get_param_store().items()}))
    (first, params), (second, others) = runs
    assert first == pytest.approx(second, rel=1e-12)
    for name, p in params.items():
        torch.testing.assert_close(others[name], p, rtol=1e-12, atol=1e-12)


# Which sites they are -----------------------------------------------------------------------------------------------


class Skewed(dist.Normal):
    """A density of its own."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) - value


def skewed(loc: Any, scale: Any) -> Any:
    return Skewed(loc + torch.zeros(3, dtype=F64), scale)


def student(loc: Any, scale: Any) -> Any:
    return dist.StudentT(4.0, loc + torch.zeros(3, dtype=F64), scale)


def uniform(loc: Any, scale: Any) -> Any:
    return dist.Uniform(loc - 9 * torch.ones(3, dtype=F64), loc + 9 * scale)


def mask_of(tensors: dict[str, Any]) -> Callable:
    return lambda side: poutine.mask(mask=tensors[side])


KEEP = torch.tensor([True, False, True])
TENSOR = number(0.5)
CASES = {
    "normal": (pair(), ANALYTIC),
    "user's prior": (pair(prior=skewed), STUCK),
    "user's posterior": (pair(posterior=skewed), PLAIN),
    "no pair": (pair(prior=student), STUCK),
    "support that moves": (pair(prior=uniform, posterior=uniform), PLAIN),
    "infinite": (pair(prior=uniform), STUCK),
    "one mask": (pair(handle=mask_of({"model": KEEP, "guide": KEEP})), ANALYTIC),
    "two masks of equal values": (pair(handle=mask_of({"model": KEEP, "guide": KEEP.clone()})), STUCK),
    "a mask in the model": (pair(handle=mask_of({"model": KEEP, "guide": True})), STUCK),
    "equal numbers": (pair(handle=lambda side: poutine.scale(scale=0.3)), ANALYTIC),
    "scales of tensors": (pair(handle=lambda side: poutine.scale(scale=TENSOR)), STUCK),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("made", "right"), CASES.values(), ids=CASES)
def test_what_is_integrated(made, right, count):
    loss = MonteCarloELBO(count, vectorize_particles=count > 1)
    found, plain = gradient(loss, *made), gradient(MonteCarloELBO(count, estimator="pyro"), *made)
    assert chosen(loss) == right
    assert found[0] == plain[0]
    if right != ANALYTIC:  # in a first step, no coefficient has been learned
        assert_same(found, plain)


def test_a_table_row_says_why():
    loss = MonteCarloELBO()
    loss.loss(*pair(), X)
    assert "KL in closed form" in loss.table[0].why


def reversed_pair() -> tuple[Callable, Callable]:
    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(number(0.0), 1.0))
        pyro.sample("b", dist.Normal(a, 1.0))

    def guide(x: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(pyro.param("loc", lambda: number(0.2)), 1.0))
        pyro.sample("a", dist.Normal(b, 1.0))

    return model, guide


def test_another_order_is_sampled():
    loss = MonteCarloELBO()
    assert_same(gradient(loss, *reversed_pair()), gradient(MonteCarloELBO(estimator="pathwise"), *reversed_pair()))
    assert loss.resolved == {"b": STUCK, "a": PLAIN}  # that has a draw upstream
    with pytest.raises(EmvaeError, match="the order"):
        gradient(MonteCarloELBO(estimator="analytic_kl"), *reversed_pair())


def test_beside_a_sum_it_is_sampled():
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(number(0.4)))
        pyro.sample("z", dist.Normal(k, number(1.0)))

    def guide(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(pyro.param("p", lambda: number(0.5))))
        pyro.sample("z", dist.Normal(k - pyro.param("loc", lambda: number(0.2)), 1.0))

    def alone(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", lambda: number(0.2)), 1.0))

    loss, plain = MonteCarloELBO(), MonteCarloELBO(estimator={"k": "enumerated", "z": "pathwise"})
    gradient(loss, lambda x: pyro.sample("z", dist.Normal(number(0.0), 1.0)), alone)
    assert loss.resolved == {"z": ANALYTIC}  # which the sum then finds at a site below it
    gradient(plain, model, guide)
    gradient(loss, model, guide)
    assert_same(gradient(loss, model, guide), gradient(plain, model, guide))
    assert loss.resolved["z"] == PLAIN


def test_a_named_site_below_a_sum_has_the_mean_kl():
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(number(0.4)))
        pyro.sample("z", dist.Normal(2 * k, number(1.3)))

    def guide(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(pyro.param("p", lambda: number(0.7))))
        pyro.sample("z", dist.Normal(k - pyro.param("loc", lambda: number(0.2)), 1.0))

    _, found = gradient(MonteCarloELBO(estimator={"k": "enumerated", "z": "analytic_kl"}), model, guide)
    store = pyro.get_param_store()
    p, loc = (store[n] for n in ("p", "loc"))
    kls = [torch.distributions.kl_divergence(dist.Normal(k - loc, 1.0), dist.Normal(2.0 * k, 1.3)) for k in (0, 1)]
    kl = (1 - p) * kls[0] + p * kls[1] + torch.distributions.kl_divergence(dist.Bernoulli(p), dist.Bernoulli(0.4))
    for g, right in zip((found["p"], found["loc"]), torch.autograd.grad(kl, (p, loc)), strict=True):
        torch.testing.assert_close(g, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", [e.name for e in entries("objective") if not e.traits.arguments])
def test_other_objectives_keep_plain_draws(objective):
    loss = MonteCarloELBO(2, 1, objective=objective, vectorize_particles=True)
    loss.loss(*pair(), X)
    assert chosen(loss) == (ANALYTIC if objective == "elbo" else PLAIN)


def test_probe_tries_it_where_it_can_be_had():
    for made, integrated in ((pair(), True), (pair(prior=student), False)):
        loss = MonteCarloELBO(2, 1, estimator="probe", vectorize_particles=True)
        for seed in range(3):
            gradient(loss, *made, seed)
        assert ("analytic_kl" in loss.resolver.tried["z"]) == integrated
        assert chosen(loss) == (ANALYTIC if integrated else STUCK)


def test_what_probe_keeps_raises_nothing_later():
    made = pair(handle=by_number)
    loss = MonteCarloELBO(2, 1, estimator="probe", vectorize_particles=True)
    for step in range(400):
        SCALE["model"] = 0.5 if step % 3 else 1.0
        gradient(loss, *made, seed=step)
    tried = loss.resolver.tried["z"]
    record = next(tensors for tensors in loss.state.values() if "spent" in tensors)
    assert all(float(record[f"z|{name}|cost"]) < float("inf") for name in tried)


# What changes later -------------------------------------------------------------------------------------------------


def test_a_scale_that_the_model_alone_anneals():
    made, loss = pair(handle=by_number), MonteCarloELBO()
    plain, named = MonteCarloELBO(estimator="pathwise"), MonteCarloELBO(estimator="analytic_kl")
    for scale in (0.1, 0.7, 1.0):
        SCALE["model"] = scale
        found = gradient(loss, *made)
        assert_same(found, gradient(plain if scale < 1 else named, *made))
    with pytest.raises(EmvaeError, match="a scale or mask that differs"):
        SCALE["model"] = 0.1
        gradient(named, *made)


@pytest.mark.parametrize(
    "handles",
    [
        {"model": lambda: poutine.scale(scale=0.5), "guide": lambda: poutine.scale(scale=1.0)},
        {"model": lambda: poutine.mask(mask=True), "guide": lambda: poutine.scale(scale=1.0)},
    ],
    ids=["scale", "mask"],
)
def test_what_is_drawn_after_all_keeps_its_entropy_beside_a_score(handles):
    """Where another site's estimator takes the terms apart, the gradient is still the plain one, number for number."""

    def model(x: Tensor) -> None:
        b = pyro.sample("b", dist.Poisson(number(2.0)))
        with pyro.plate("data", 3):
            with handles["model"]():
                z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=F64), 1.2))
            pyro.sample("x", dist.Normal(z + 0.3 * b, 0.7), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("b", dist.Poisson(pyro.param("rate", lambda: number(1.5))))
        loc, width = pyro.param("loc", lambda: torch.zeros(3, dtype=F64)), pyro.param("width", lambda: number(0.6))
        with pyro.plate("data", 3), handles["guide"]():
            pyro.sample("z", dist.Normal(loc, width))

    loss, plain = (MonteCarloELBO(2, estimator=e) for e in ({"b": "score"}, {"b": "score", "z": "pathwise"}))
    assert_same(gradient(loss, model, guide), gradient(plain, model, guide))
    assert loss.resolved["z"] == ANALYTIC


def test_a_scale_that_both_anneal_stays_integrated():
    made, loss, named = pair(handle=by_number), MonteCarloELBO(), MonteCarloELBO(estimator="analytic_kl")
    for scale in (0.1, 0.7, 1.0):
        SCALE.update(model=scale, guide=scale)
        assert_same(gradient(loss, *made), gradient(named, *made))
    assert chosen(loss) == ANALYTIC


def test_a_run_that_is_resumed_takes_the_same_gradients():
    """Whether numbers differ is no part of what was found out at first."""
    made, first = pair(handle=by_number), MonteCarloELBO()
    SCALE["model"] = 0.1
    gradient(first, *made)
    SCALE["model"] = 1.0
    assert_same(gradient(first, *made), gradient(MonteCarloELBO(), *made))


def test_a_mask_that_one_of_both_gets_later():
    masks = {"model": KEEP, "guide": KEEP}
    made, loss = pair(handle=mask_of(masks)), MonteCarloELBO()
    gradient(loss, *made)
    masks["guide"] = torch.tensor([True, True, True])
    assert_same(gradient(loss, *made), gradient(MonteCarloELBO(estimator="pathwise"), *made))


def test_a_prior_without_closed_form_later():
    kind = [normal]
    made, loss = pair(prior=lambda *args: kind[0](*args)), MonteCarloELBO()
    gradient(loss, *made)
    for kind[0] in (student, skewed):
        assert_same(gradient(loss, *made), gradient(MonteCarloELBO(estimator="pathwise"), *made))


def test_two_models_with_one_loss():
    """Once a model has none, the site is sampled for all; the order of the models does not matter."""
    (one, guide), (other, _) = pair(), pair(prior=student)
    for models in ((one, other), (other, one)):
        loss = MonteCarloELBO()
        for model in models:
            gradient(loss, model, guide)
        for model in models:
            assert_same(gradient(loss, model, guide), gradient(MonteCarloELBO(estimator="pathwise"), model, guide))
        assert chosen(loss) == PLAIN


def test_a_kl_that_is_not_finite_is_no_silent_gradient():
    """The draws lie inside of the prior's support, and the guide does not."""
    made = pair(prior=lambda *args: dist.Uniform(-4.0 * torch.ones(3, dtype=F64), 4.0))
    loss = MonteCarloELBO(estimator="analytic_kl")
    with pytest.raises(NonFiniteError, match="finite sites"):
        gradient(loss, *made)
    with pytest.raises(NonFiniteError, match="finite sites"):
        loss.loss(*made, X)
