r"""The direct score by the arguments of a distribution: what they are, what is learned, where `auto` leaves it out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_emvae import EM, SVI, MonteCarloELBO, NonFiniteError, steps
from pyro_emvae._registry import entries
from pyro_emvae.engine import gradient
from pyro_emvae.estimators import AdaptiveSticking, LeaveOneOut, Pathwise
from pyro_emvae.particles import quiet
from pyro_emvae.problems import exact_gradients
from pyro_emvae.sticking import ARGUMENTS
from pyro_emvae.testing import assert_mean
from pyro_emvae.testing.cubature import exact_mean
from pyro_emvae.testing.replay import Replay

F64 = torch.float64
STUCK, PLAIN = Pathwise(entropy=AdaptiveSticking()), Pathwise()


def f64(x: Any) -> Tensor:
    return torch.tensor(x, dtype=F64)


TRIL = [[0.9, 0.0], [0.4, 0.7]]
FAMILIES: dict[str, tuple[dict[str, Any], Callable]] = {
    "Beta": ({"a": [2.5, 3.1], "b": 1.7}, dist.Beta),
    "Dirichlet": ({"a": [[2.5, 1.3, 3.1], [1.5, 2.0, 4.0]]}, dist.Dirichlet),
    "Exponential": ({"a": [2.5, 0.4]}, dist.Exponential),
    "Gamma": ({"a": [2.5, 3.0], "b": 1.5}, dist.Gamma),
    "HalfNormal": ({"a": [2.5, 0.3]}, dist.HalfNormal),
    "Laplace": ({"a": [0.5, -0.3], "b": 0.8}, dist.Laplace),
    "LogNormal": ({"a": [0.5, -0.3], "b": 0.8}, dist.LogNormal),
    "LowRankMultivariateNormal": (
        {"a": [[0.4, -0.6], [0.1, 0.2]], "b": [[0.5], [-0.3]], "c": [0.3, 0.9]},
        dist.LowRankMultivariateNormal,
    ),
    "MultivariateNormal": (
        {"a": [[0.4, -0.6], [0.1, 0.2]], "b": TRIL},
        lambda a, b: dist.MultivariateNormal(a, scale_tril=b),
    ),
    "Normal": ({"a": [0.5, -0.3], "b": 0.8}, dist.Normal),
    "StudentT": ({"a": [0.3, 0.1], "b": 0.8}, lambda a, b: dist.StudentT(9.0, a, b)),
}


def pair(family: str, model: Callable | None = None, handle: Callable = lambda: poutine.scale(scale=1)):
    """Two draws of a family in a plate, their parameters functions of leaves; the model has the same unless given."""
    params, make = FAMILIES[family]

    def prior() -> None:
        with pyro.plate("data", 2):
            pyro.sample("z", make(*map(f64, params.values())))

    def guide() -> None:
        leaves = [pyro.param(n, f64(p).clone) for n, p in params.items()]
        with pyro.plate("data", 2), handle():
            pyro.sample("z", make(*(1.0 * leaf for leaf in leaves)))

    return model or prior, guide


def leaves() -> dict[str, Tensor]:
    return dict(pyro.get_param_store().named_parameters())


def learned(*names: str, coefficient: float = 1.0) -> dict[str, dict[str, Tensor]]:
    """A state with this coefficient at each argument."""
    return {"z": {name: f64([-coefficient, 1.0, 1.0]) for name in names}}


def test_every_family_is_tested():
    assert set(FAMILIES) == set(ARGUMENTS)


def test_private_attributes_of_torch_are_there():
    for family, (params, make) in FAMILIES.items():
        fn = make(*map(f64, params.values())).expand((3, 2))
        for path in ARGUMENTS[family]:
            tensor = fn
            for name in path.split("."):
                tensor = getattr(tensor, name)
            assert isinstance(tensor, Tensor)


# The control --------------------------------------------------------------------------------------------------------


HANDLES = {
    "plain": lambda: poutine.scale(scale=1),
    "scale": lambda: poutine.scale(scale=0.3),
    "tensor scale": lambda: poutine.scale(scale=f64([0.5, 2.0])),
    "mask": lambda: poutine.mask(mask=torch.tensor([True, False])),
}
OPTIONS = {
    "one": {"num_particles": 1},
    "vectorized": {"num_particles": 3, "vectorize_particles": True},
    "looped": {"num_particles": 3, "vectorize_particles": False},
}


@pytest.mark.parametrize("handle", HANDLES.values(), ids=HANDLES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beta", [None, 0.3])
def test_the_control_is_the_direct_score(family, options, handle, beta):
    """With one coefficient for all: the gradient of log q at detached values by the leaves, with scale and mask."""
    model, guide = pair(family, handle=handle)
    beta = None if beta is None else f64(beta)
    loss, plain = (MonteCarloELBO(max_plate_nesting=1, **options, estimator=e) for e in (STUCK, PLAIN))
    state = learned(*ARGUMENTS[family], coefficient=0.7)
    found = []
    for one, given in ((loss, state), (plain, {})):
        pyro.set_rng_seed(1)
        one.prepare(model, guide, (), {})
        pyro.set_rng_seed(1)
        evaluation = one.evaluate(model, guide, (), {}, given, beta)
        found.append(evaluation.descent(leaves()))
    pyro.set_rng_seed(1)
    site = plain.evaluate(model, guide, (), {}).particles.guide["z"]
    direct = site.each(lambda run: run.density(run.value.detach()))
    direct = dist.util.scale_and_mask(direct, site.scale, site.mask).sum() * (0.7 if beta is None else 0.7 * beta)
    scores = torch.autograd.grad(direct / options["num_particles"], list(leaves().values()))
    for (name, g), score in zip(found[1].items(), scores, strict=True):
        torch.testing.assert_close(found[0][name], g - score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [*OPTIONS.values()], ids=OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_where_q_is_the_posterior_nothing_is_left(family, options):
    """A coefficient of 1 is found there, and the gradient is zero in every draw."""
    model, guide = pair(family)
    loss = MonteCarloELBO(max_plate_nesting=1, **options, estimator=STUCK)
    norms = []
    for seed in range(22):
        pyro.set_rng_seed(seed)
        evaluation = loss.evaluate(model, guide, (), {})
        norms.append(max(float(g.abs().max()) for g in evaluation.descent(leaves()).values()))
        loss.state = evaluation.state
    assert max(norms[20:]) < 1e-9 < min(norms[:15])
    for name in ARGUMENTS[family]:
        covariance, square, _ = loss.state["z"][name]
        assert float(-covariance / square) == pytest.approx(1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_have_mean_zero(family):
    params, make = FAMILIES[family]
    params = tuple(map(f64, params.values()))
    with quiet(seed=0, validate=False):
        values = make(*params).sample((40_000,))
        score = torch.func.grad(lambda params, z: make(*params).log_prob(z).sum())
        rows = torch.func.vmap(score, (None, 0))(params, values)
    rows = torch.cat([row.reshape(len(values), -1) for row in rows], 1)
    if family == "MultivariateNormal":
        rows = rows[:, [i for i in range(rows.shape[1]) if i != 5]]  # above the diagonal
    assert_mean(rows / rows.std(0), torch.zeros(rows.shape[1], dtype=F64), detect=0.05)


# What is learned ----------------------------------------------------------------------------------------------------


def likely(family: str = "Normal", **options: Any):
    """A model with data of its own and a parameter."""

    def model() -> None:
        theta = pyro.param("theta", f64(0.4).clone)
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.StudentT(f64(4.0), theta, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=f64([0.3, -1.2]))

    return pair(family, model, **options)


@pytest.mark.parametrize("options", [*OPTIONS.values()], ids=OPTIONS)
def test_coefficients_are_of_earlier_steps(options):
    """By hand, from the gradients by loc and scale of the ELBO without controls, and the scores."""
    model, guide = likely()
    loss, plain = (MonteCarloELBO(max_plate_nesting=1, **options, estimator=e) for e in ("auto", PLAIN))
    moments = torch.zeros(2, 2, dtype=F64)
    for step in range(25):
        pyro.set_rng_seed(step)
        full = plain.evaluate(model, guide, (), {})
        site = full.particles.guide["z"]
        runs = site.runs or (site,)
        direct = sum(run.density(run.value.detach()).sum() for run in runs) / options["num_particles"]
        expected = torch.autograd.grad(full.climbed, list(leaves().values()), retain_graph=True)
        expected = {name: -g for name, g in zip(leaves(), expected, strict=True)}
        for i, (name, leaf) in enumerate({"loc": "a", "scale": "b"}.items()):
            tensors = [getattr(run.fn, name) for run in runs]
            scores, rest = (torch.autograd.grad(t, tensors, retain_graph=True) for t in (direct, full.climbed))
            (share,) = torch.autograd.grad(tensors, [leaves()[leaf]], scores, retain_graph=True)
            if step >= 16:
                expected[leaf] = expected[leaf] - max(0.0, float(-moments[i, 0] / moments[i, 1])) * share
            products = [sum((s * t).sum() for s, t in zip(scores, others, strict=True)) for others in (rest, scores)]
            moments[i] = 0.98 * moments[i] + 0.02 * torch.stack(products).detach()
        pyro.set_rng_seed(step)
        evaluation = loss.evaluate(model, guide, (), {})
        assert loss.resolved["z"] == STUCK
        for name, g in evaluation.descent(leaves()).items():
            torch.testing.assert_close(g, expected[name], rtol=1e-9, atol=1e-9)
        loss.state = evaluation.state


def test_every_way_to_a_gradient_learns_the_same():
    found = []
    for way in ("loss_and_grads", "surrogate", "descent", "state first"):
        pyro.clear_param_store()
        model, guide = likely()
        loss = MonteCarloELBO()
        for step in range(30):
            pyro.set_rng_seed(step)
            if way == "loss_and_grads":
                loss.loss_and_grads(model, guide)
                grads = {name: leaf.grad for name, leaf in leaves().items()}
                for leaf in leaves().values():
                    leaf.grad = None
                continue
            evaluation = loss.evaluate(model, guide, (), {})
            loss.state = evaluation.state if way == "state first" else loss.state
            if way == "surrogate":
                grads = torch.autograd.grad(-evaluation.surrogate, list(leaves().values()))
                grads = dict(zip(leaves(), grads, strict=True))
            else:
                grads = evaluation.descent(leaves())
            loss.state = evaluation.state
        found.append([grads[name] for name in ("a", "b", "theta")] + [loss.state["z"][n] for n in ("loc", "scale")])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_what_only_looks_learns_nothing():
    model, guide = likely()
    loss = MonteCarloELBO()
    for seed in range(20):
        pyro.set_rng_seed(seed)
        loss.loss_and_grads(model, guide)
    before = loss.state
    loss.loss(model, guide)
    loss.differentiable_loss(model, guide).backward()
    with torch.no_grad():
        assert loss.evaluate(model, guide, (), {}).sticking is None
    assert loss.state is before


def test_a_step_of_the_model_alone_learns_nothing():
    model, guide = likely()
    loss = MonteCarloELBO()
    loss.loss(model, guide)
    for only in ("theta", "a"):
        for _ in range(3):
            found = gradient(model, guide, loss, (), {}, only={only: leaves()[only]})
            loss.state = found.state
            assert set(found.grads) == {only}
        assert loss.state["z"].keys() == ({"loc", "scale"} if only == "a" else set())


def test_hooks_go_with_an_error():
    model, _ = likely()

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise ZeroDivisionError

    loc = torch.zeros(2, dtype=F64, requires_grad=True)
    fails = [False]

    def guide() -> None:
        scale = pyro.param("b", lambda: f64(0.7))
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(loc, (Fails.apply(scale) if fails[0] else scale) + torch.zeros(2, dtype=F64)))

    loss = MonteCarloELBO()
    loss.loss_and_grads(model, guide)
    before, fails[0] = loss.state, True
    with pytest.raises(ZeroDivisionError):
        loss.loss_and_grads(model, guide)
    assert loss.state is before and not loc._backward_hooks


# Where it is chosen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_takes_it_where_there_is_no_closed_form(family):
    def model() -> None:
        with pyro.plate("data", 2), poutine.scale(scale=f64(0.9)):
            pyro.sample("z", FAMILIES[family][1](*map(f64, FAMILIES[family][0].values())))

    loss = MonteCarloELBO()
    loss.loss(*pair(family, model))
    assert loss.resolved["z"] == STUCK
    assert "as much of the direct score as pays" in loss.table[0].why


def test_not_where_a_draw_is_upstream_nor_where_the_arguments_are_not_known():
    def model() -> None:
        for name in ("a", "b", "c", "d", "e"):
            pyro.sample(name, dist.StudentT(f64(4.0), 0.0, 1.0))

    def guide() -> None:
        scale = pyro.param("scale", lambda: f64(0.8), constraint=dist.constraints.positive)
        a = pyro.sample("a", dist.Normal(f64(0.0), scale))
        pyro.sample("b", dist.Normal(a, scale))
        pyro.sample("c", dist.Uniform(-scale, scale))
        pyro.sample("d", dist.TransformedDistribution(dist.Normal(f64(0.0), 1.0), [dist.transforms.ExpTransform()]))
        pyro.sample("e", dist.Normal(a.detach(), scale))

    loss = MonteCarloELBO()
    with torch.no_grad():
        loss.loss(model, guide)
    assert set(loss.resolved.values()) == {PLAIN} and not loss.announced  # it is not known yet
    loss.loss(model, guide)
    assert loss.resolved == dict(a=STUCK, b=PLAIN, c=PLAIN, d=PLAIN, e=STUCK) and loss.announced
    for plan in loss.plans.values():
        assert plan.arguments == {"a", "e"} and not plan.splits and plan.depends is None


def test_the_first_step_makes_the_random_numbers_of_pyro():
    """With parameters that are drawn when they are first met; and model and guide are run once per step."""
    runs, losses = [0], []

    def model() -> None:
        runs[0] += 1
        for name in ("a", "b"):
            z = pyro.sample(name, dist.StudentT(f64(4.0), 0.0, 1.0))
            pyro.sample(f"x_{name}", dist.Normal(z, 0.5), obs=f64(0.3))

    def guide() -> None:
        for name in ("a", "b"):
            loc = pyro.param(f"loc_{name}", lambda: torch.randn((), dtype=F64))
            pyro.sample(name, dist.Normal(loc, 1.0))

    ours = [MonteCarloELBO(), MonteCarloELBO()]
    for make, loss in zip([pyro.infer.SVI, pyro.infer.SVI, SVI], [pyro.infer.Trace_ELBO(), *ours], strict=True):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        svi = make(model, guide, pyro.optim.SGD({"lr": 0.0}), loss)
        runs[0] = 0
        losses.append([svi.step() for _ in range(4)])
        assert runs[0] == 4 or make is SVI  # that finds out its blocks
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0] == pytest.approx(losses[2], rel=1e-12)
    assert all(set(loss.resolved.values()) == {STUCK} for loss in ours)


# What changes from call to call -------------------------------------------------------------------------------------


def test_a_site_that_is_sometimes_observed():
    """Its score has no mean of zero there, and nothing is learned of it."""

    def model(y: Tensor | None = None) -> None:
        y = pyro.sample("y", dist.StudentT(f64(4.0), 0.0, 1.0), obs=y)
        pyro.sample("x", dist.Normal(y, 0.5), obs=f64(0.3))

    def guide(y: Tensor | None = None) -> None:
        loc, scale = (pyro.param(name, lambda: f64(0.7)) for name in ("loc", "scale"))
        pyro.sample("y", dist.Normal(loc, scale), obs=y)

    found = []
    for estimator in ("auto", PLAIN, STUCK, "sticking_the_landing"):
        pyro.clear_param_store()
        loss = MonteCarloELBO(estimator=estimator)
        for seed in range(20):
            pyro.set_rng_seed(seed)
            loss.loss_and_grads(model, guide)
        before = loss.state.get("y")
        evaluation = loss.evaluate(model, guide, (f64(2.0),), {})
        found.append(evaluation.descent(leaves()))
        assert evaluation.state.get("y") in (before, None)
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)


@pytest.mark.parametrize("family", ["Normal", "MultivariateNormal", "Laplace"])
def test_a_mask_that_leaves_nothing(family):
    mask: list[Any] = [False]
    model, guide = pair(family, handle=lambda: poutine.mask(mask=mask[0]))
    loss, plain = MonteCarloELBO(estimator=STUCK), MonteCarloELBO(estimator=PLAIN)
    for mask[0] in (False, True, torch.tensor([True, False])):
        for _ in range(20):
            loss.loss_and_grads(model, guide)
    for mask[0] in (False, torch.tensor([False, False])):
        found = []
        for one in (loss, plain):
            pyro.set_rng_seed(0)
            evaluation = one.evaluate(model, guide, (), {})
            found.append(evaluation.descent(leaves()))
        torch.testing.assert_close(*found)


def test_a_site_that_is_rarely_there_learns_from_its_own_steps():
    """Steps under a mask do not count: the coefficient is zero until it was there often enough."""
    mask = torch.tensor(False)

    def model() -> None:
        z = pyro.sample("z", dist.StudentT(f64(4.0), 0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=f64(0.3))

    def guide() -> None:
        with poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(pyro.param("loc", lambda: f64(0.2)), 1.0))

    loss = MonteCarloELBO(estimator=STUCK)
    for step in range(200):
        mask.fill_(step % 20 == 0)
        loss.loss_and_grads(model, guide)
    assert float(loss.state["z"]["loc"][2]) == pytest.approx(1 - 0.98**10)


@pytest.mark.parametrize("first", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("second", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", [dist.Normal, dist.Laplace])
def test_arguments_of_several_dtypes(first, second, family):
    def model() -> None:
        pyro.sample("z", dist.StudentT(torch.tensor(4.0), 0.0, 1.0))

    def guide() -> None:
        loc, scale = pyro.param("loc", lambda: torch.tensor(0.1)), pyro.param("scale", lambda: torch.tensor(0.5))
        pyro.sample("z", family(loc.to(first), scale.to(second)))

    loss = MonteCarloELBO()
    for _ in range(20):
        loss.loss_and_grads(model, guide)
    assert loss.resolved["z"] == STUCK
    assert {m.dtype for m in loss.state["z"].values()} <= {torch.float32, torch.float64}
    assert all(bool(torch.isfinite(leaf.grad)) for leaf in leaves().values())


def test_under_autocast():
    def guide() -> None:
        loc = pyro.param("loc", lambda: torch.zeros(2))
        pyro.sample("w", dist.MultivariateNormal(loc, scale_tril=pyro.param("tril", lambda: torch.eye(2))))

    def model() -> None:
        pyro.sample("w", dist.StudentT(4 * torch.ones(2), 0.0, 1.0).to_event(1))

    loss = MonteCarloELBO()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(20):
            loss.loss_and_grads(model, guide)
    assert loss.state["w"]["loc"].dtype == torch.float32


def test_a_recorded_state_that_changes():
    """An argument that is differentiated later, and a site that comes later: the same as eagerly."""

    def model(more: bool) -> None:
        for name in ("z", "w") if more else ("z",):
            pyro.sample(name, dist.StudentT(f64(4.0), 0.0, 1.0))

    def guide(more: bool) -> None:
        scale = pyro.param("scale", lambda: f64(0.7), constraint=dist.constraints.positive)
        for name in ("z", "w") if more else ("z",):
            pyro.sample(name, dist.Normal(pyro.param(f"{name}_loc", lambda: f64(0.1)), scale if more else 1.0))

    runs = []
    for backend in ("eager", "graph"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = MonteCarloELBO()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss, backend=backend)
        losses = [svi.step(more) for more in [False] * 20 + [True] * 20 + [False] * 3]
        runs.append((losses, {n: p.detach().clone() for n, p in pyro.get_param_store().items()}))
        assert loss.state.keys() == {"z", "w"}
    assert len(svi.engine._recordings) == 2
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-10)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-10, atol=1e-10)


def test_a_look_at_another_structure_does_not_keep_a_step_from_being_recorded():
    def model(more: bool) -> None:
        for name in ("z", "w") if more else ("z",):
            pyro.sample(name, dist.StudentT(f64(4.0), 0.0, 1.0))

    def guide(more: bool) -> None:
        for name in ("z", "w") if more else ("z",):
            pyro.sample(name, dist.Normal(pyro.param(f"{name}_loc", lambda: f64(0.1)), 1.0))

    loss = MonteCarloELBO()
    loss.loss(model, guide, True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss, backend="graph")
    for _ in range(4):
        svi.step(False)
    assert len(svi.engine._recordings) == 1


def test_a_state_that_is_loaded_is_kept():
    model, guide = likely()
    loss, other = MonteCarloELBO(), MonteCarloELBO()
    for _ in range(20):
        loss.loss_and_grads(model, guide)
    other.load_state_dict(loss.state_dict())
    for one in (loss, other):
        pyro.set_rng_seed(0)
        one.loss_and_grads(model, guide)
    torch.testing.assert_close(loss.state, other.state, rtol=0, atol=0)


@pytest.mark.parametrize("annotated", [False, True])
def test_a_sum_upstream_of_a_site_that_was_alone(annotated):
    infer = {"enumerate": "parallel"} if annotated else {}

    def model(alone: bool) -> None:
        k = 0.0 if alone else pyro.sample("k", dist.Bernoulli(f64(0.4)))
        pyro.sample("z", dist.StudentT(f64(4.0), k, 1.0))

    def guide(alone: bool) -> None:
        p, loc = pyro.param("p", lambda: f64(0.5)), pyro.param("loc", lambda: f64(0.2))
        k = 0.0 if alone else pyro.sample("k", dist.Bernoulli(p), infer=infer)
        pyro.sample("z", dist.Normal(k - loc, 1.0))

    loss, grads = MonteCarloELBO(max_plate_nesting=0), []
    plain = MonteCarloELBO(max_plate_nesting=0, estimator={"k": "enumerated", "z": "pathwise"})
    for _ in range(20):
        loss.loss_and_grads(model, partial(guide), True)
    assert loss.resolved["z"] == STUCK
    for one in (loss, plain):
        one.loss(model, guide, False)
        pyro.set_rng_seed(0)
        grads.append(one.evaluate(model, guide, (False,), {}).descent(leaves()))
    assert loss.resolved == plain.resolved
    torch.testing.assert_close(*grads)


def test_a_site_that_changes_its_family():
    made: list[Callable] = [dist.Normal]
    model, _ = likely()

    def guide() -> None:
        loc = pyro.param("loc", lambda: torch.zeros(2, dtype=F64))
        with pyro.plate("data", 2):
            pyro.sample("z", made[0](loc, loc + 1.0))

    loss, found = MonteCarloELBO(), {}
    for family, right in ((dist.Normal, STUCK), (dist.Uniform, PLAIN), (dist.Laplace, STUCK), (dist.Normal, STUCK)):
        made[0] = family
        for _ in range(20):
            loss.loss_and_grads(model, guide)
        assert loss.resolved["z"] == right
        found[family] = loss.state.get("z", {}).keys()
    assert found == {dist.Normal: {"loc", "scale"}, dist.Uniform: set(), dist.Laplace: {"loc", "scale"}}


@pytest.mark.parametrize("name", ["linear_gaussian_full", "skewed"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_mean_gradient_of_auto_is_exact(name, count):
    """With coefficients that were learned."""
    problem = next(entry.factory for entry in entries("problem") if entry.name == name)()
    (site,) = problem.sites
    replay = Replay(problem, {site: "auto"}, count)
    assert replay.loss.resolved == {site: STUCK}
    state: dict = {}
    for seed in range(20):
        with quiet(seed=seed, validate=False):
            state = replay.evaluate({}, state).state
    assert all(float(m[0] / m[1]) < -0.01 for m in state[site].values())
    found = exact_mean(Replay(problem, {site: "auto"}, count, state))
    assert found is not None
    for name, right in exact_gradients(problem).items():
        torch.testing.assert_close(found.gradients[name], right, rtol=1e-8, atol=1e-8)


def test_second_derivatives_are_those_of_the_plain_gradient():
    """The control's mean is zero, and it is left out of what is differentiated twice."""
    model, guide = likely()
    loss, plain = MonteCarloELBO(), MonteCarloELBO(estimator=PLAIN)
    for seed in range(20):
        pyro.set_rng_seed(seed)
        loss.loss_and_grads(model, guide)
    found = []
    for one in (loss, plain):
        pyro.set_rng_seed(5)
        grads = torch.autograd.grad(one.differentiable_loss(model, guide), list(leaves().values()), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), list(leaves().values())))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("other", ["score", LeaveOneOut(coefficient="learned")])
def test_beside_an_estimator_that_takes_the_terms_apart(other):
    """The control is the same as beside a plain one, draw by draw: its own part of the gradient by its parameters."""

    def model() -> None:
        k = pyro.sample("k", dist.Poisson(f64(2.0)))
        z = pyro.sample("z", dist.StudentT(f64(4.0), f64(0.0), 1.0))
        pyro.sample("x", dist.Normal(z + 0.1 * k, 1.0), obs=f64(0.4))

    def guide() -> None:
        pyro.sample("k", dist.Poisson(pyro.param("rate", lambda: f64(1.5))))
        pyro.sample("z", dist.Normal(pyro.param("loc", lambda: f64(0.2)), pyro.param("scale", lambda: f64(0.5))))

    losses = [MonteCarloELBO(2, estimator={"k": other, "z": entropy}) for entropy in ("auto", PLAIN)]
    for loss in losses:
        for seed in range(20):
            pyro.set_rng_seed(seed)
            loss.loss_and_grads(model, guide)
    assert losses[0].resolved["z"] == STUCK
    found = []
    for loss in losses:
        pyro.set_rng_seed(7)
        evaluation = loss.evaluate(model, guide, (), {})
        found.append(evaluation.descent(leaves()))
    torch.testing.assert_close(found[0]["rate"], found[1]["rate"])
    noise = (evaluation.particles.guide["z"].value - 0.2) / 0.5
    for name, argument, score in (("loc", "loc", noise / 0.5), ("scale", "scale", (noise**2 - 1) / 0.5)):
        covariance, square, _ = losses[0].state["z"][argument]
        coefficient = (-covariance / square).clamp(min=0.0)
        assert float(coefficient) > 0.1
        torch.testing.assert_close(found[1][name] - found[0][name], coefficient * score.mean())


def test_several_decays_and_dtypes():
    kinds = {"a": torch.float64, "b": torch.float32, "c": torch.float64}

    def model() -> None:
        for name, kind in kinds.items():
            pyro.sample(name, dist.StudentT(torch.tensor(4.0, dtype=kind), 0.0, 1.0))

    def guide() -> None:
        for name, kind in kinds.items():
            pyro.sample(name, dist.Normal(pyro.param(f"loc_{name}", lambda k=kind: torch.tensor(0.3, dtype=k)), 0.5))

    decays = {"a": 0.98, "b": 0.98, "c": 0.5}
    states = {}
    for names in ("abc", "a", "b", "c"):
        pyro.clear_param_store()
        stuck = {name: Pathwise(entropy=AdaptiveSticking(decays[name])) for name in names}
        loss = MonteCarloELBO(estimator=dict.fromkeys(kinds, PLAIN) | stuck)
        for seed in range(20):
            pyro.set_rng_seed(seed)
            loss.loss_and_grads(model, guide)
        states[names] = loss.state
    for name in kinds:
        for argument, moments in states[name][name].items():
            torch.testing.assert_close(states["abc"][name][argument], moments, check_dtype=False)


@pytest.mark.parametrize("cls", [SVI, EM])
@pytest.mark.parametrize("options", [*OPTIONS.values()], ids=OPTIONS)
def test_the_graph_is_eager(cls, options):
    runs = []
    for backend in ("eager", "graph"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = MonteCarloELBO(max_plate_nesting=1, **options)
        fitter = cls(*likely(), pyro.optim.Adam({"lr": 0.05}), loss, backend=backend)
        losses = [fitter.step() for _ in range(24)]
        assert loss.resolved["z"] == STUCK
        runs.append((losses, {n: p.detach().clone() for n, p in pyro.get_param_store().items()}))
    (first, params), (second, others) = runs
    assert first == pytest.approx(second, rel=1e-10)
    for name, p in params.items():
        torch.testing.assert_close(others[name], p, rtol=1e-10, atol=1e-10)


def test_em_learns_in_the_e_phase():
    pyro.set_rng_seed(0)
    loss = MonteCarloELBO()
    model, guide = likely()
    em = EM(model, guide, pyro.optim.Adam({"lr": 0.01}), loss, m_step=steps.Gradient(num_steps=3))
    for _ in range(5):
        em.step()
    weight = loss.state["z"]["loc"][2]
    assert float(weight) == pytest.approx(1 - 0.98**5)


# One tensor, several arguments; and entropies that are differentiated by their formula ----------------------------


@pytest.mark.parametrize("family", [dist.Normal, dist.Laplace])
@pytest.mark.parametrize("options", [{"num_particles": 1}, {"num_particles": 4, "vectorize_particles": False}])
def test_a_tensor_that_is_an_argument_of_many_sites_has_one_coefficient(family, options):
    """Several would take each other's control for the gradient, and the variance would grow with their number."""
    names = [f"z{i}" for i in range(12)]

    def model() -> None:
        for name in names:
            pyro.sample(name, dist.StudentT(f64(4.0), 0.0, 1.0))

    def guide() -> None:
        scale, loc = pyro.param("scale", lambda: f64(0.6)), pyro.param("loc", lambda: f64(0.4))
        for name in names:
            pyro.sample(name, family(loc, scale))

    variances = []
    for estimator in ("auto", PLAIN):
        pyro.clear_param_store()
        loss, grads = MonteCarloELBO(max_plate_nesting=0, **options, estimator=estimator), []
        for seed in range(150):
            pyro.set_rng_seed(seed)
            evaluation = loss.evaluate(model, guide, (), {})
            grads.append(torch.stack(list(evaluation.descent(leaves()).values())))
            loss.state = evaluation.state
        variances.append(torch.stack(grads[30:]).var(0))
        if estimator == "auto":
            assert {name: set(state) for name, state in loss.state.items() if state} == {"z0": {"loc", "scale"}}
    assert (variances[0] < 1.3 * variances[1]).all(), variances


@pytest.mark.parametrize("other", [LeaveOneOut(), LeaveOneOut(coefficient="learned"), "double_control_variate"])
def test_a_leaf_that_only_an_entropy_reaches(other):
    """Its gradient is known exactly: minus one over the scale."""

    def model() -> None:
        b = pyro.sample("b", dist.Bernoulli(f64(0.4)))
        pyro.sample("x", dist.Normal(b, 1.0), obs=f64(0.3))

    def guide() -> None:
        pyro.sample("aux", dist.Normal(f64(0.0), pyro.param("s", lambda: f64(0.7))), infer={"is_auxiliary": True})
        pyro.sample("b", dist.Bernoulli(pyro.param("p", lambda: f64(0.3))))

    loss = MonteCarloELBO(num_particles=3, estimator={"b": other})
    loss.loss_and_grads(model, guide)
    assert loss.resolved["aux"] == STUCK
    assert float(leaves()["s"].grad) == pytest.approx(-1 / 0.7)


def test_nothing_but_an_entropy():
    def model() -> None:
        with poutine.mask(mask=False):
            pyro.sample("z", dist.StudentT(f64(4.0), 0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(f64(0.0), pyro.param("s", lambda: f64(0.7))))

    loss, probing = MonteCarloELBO(), MonteCarloELBO(estimator="probe")
    for _ in range(16):  # without a coefficient yet
        loss.loss_and_grads(model, guide)
        assert float(leaves()["s"].grad) == pytest.approx(-1 / 0.7)
        leaves()["s"].grad = None
    for _ in range(100):
        probing.loss_and_grads(model, guide)


def test_an_entropy_that_the_objective_integrates_counts_once():
    _, guide = pair("Normal")

    def prior() -> None:
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(f64(0.0), 1.0))

    found = []
    for estimator in (STUCK, PLAIN):
        loss = MonteCarloELBO(objective="elbo_analytic_kl", estimator=estimator)
        for _ in range(20):
            pyro.set_rng_seed(0)
            evaluation = loss.evaluate(prior, guide, (), {})
            found.append(evaluation.descent(leaves()))
            loss.state = evaluation.state
    torch.testing.assert_close(found[19], found[-1])


# Plates and point masses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, torch.tensor(10)])
def test_a_plate_is_the_same_whatever_it_is_a_part_of(size):
    """Where the guide does not say what its plate is a minibatch of, terms are still those of the plate's elements."""
    x = torch.linspace(-1, 1, 10, dtype=F64)

    def model() -> None:
        with pyro.plate("d", 100, subsample_size=10):
            b = pyro.sample("b", dist.Poisson(f64(2.0)))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide() -> None:
        rate = pyro.param("rate", lambda: torch.ones(10, dtype=F64))
        with pyro.plate("d", size), poutine.scale(scale=10.0):
            pyro.sample("b", dist.Poisson(rate))

    pyro.set_rng_seed(0)
    loss = MonteCarloELBO(2, 1, estimator="score", vectorize_particles=True)
    evaluation = loss.evaluate(model, guide, (), {})
    sites = evaluation.particles
    assert (
        sites.guide["b"].frames == sites.model["b"].frames
        and len({*sites.guide["b"].frames, *sites.model["x"].frames}) == 1
    )
    signal = sites.model["b"].scaled + sites.model["x"].scaled - sites.guide["b"].scaled
    total = (sites.guide["b"].log_prob * signal.detach()).sum() / 2
    score = torch.autograd.grad(total, list(leaves().values()), retain_graph=True)
    torch.testing.assert_close(evaluation.descent(leaves())["rate"], -score[0])


def test_point_masses():
    """At its own value, a density is not asked for; at one that another handler gave, it is."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(f64(0.0), 1.0))
        with pyro.plate("k", 2):
            w = pyro.sample("w", dist.Normal(f64(0.0), 1.0))
            pyro.sample("x", dist.Normal(z + w, 1.0), obs=f64(0.3))

    def guide() -> None:
        pyro.sample("z", dist.Delta(pyro.param("z_loc", lambda: f64(0.2)), log_density=f64(0.7)))
        with pyro.plate("k", 2):
            pyro.sample("w", dist.Delta(pyro.param("w_loc", lambda: f64(0.4)), log_density=1.5))

    for options in ({}, {"num_particles": 3, "vectorize_particles": True}):
        loss, theirs = (
            MonteCarloELBO(max_plate_nesting=1, **options),
            pyro.infer.Trace_ELBO(max_plate_nesting=1, **options),
        )
        assert loss.loss(model, guide) == pytest.approx(theirs.loss(model, guide), rel=1e-12)
    other = poutine.trace(lambda: pyro.sample("z", dist.Delta(f64(0.9)))).get_trace()
    for handler in (poutine.condition(data={"z": f64(0.9)}), poutine.replay(trace=other)):
        with handler, pytest.raises(NonFiniteError, match="'z'"):
            MonteCarloELBO().loss(model, guide)
