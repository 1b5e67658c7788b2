r"""`MonteCarloELBO(estimator="pyro")` is `Trace_ELBO`: the same numbers and gradients at the same seed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.rejection_gamma import ShapeAugmentedGamma
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoHierarchicalNormalMessenger,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_emvae import MonteCarloELBO, config_estimators
from pyro_emvae._checks import ModelError
from pyro_emvae._registry import entries
from pyro_emvae.estimators import Pathwise, Score
from pyro_emvae.problems import Problem

X = torch.tensor([0.3, -1.2, 2.0, 0.7, -0.4], dtype=torch.float64)
DOUBLE = {"dtype": torch.float64}


def make_problem(name: str) -> Problem:
    (entry,) = [e for e in entries("problem") if e.name == name]
    return entry.factory()


PROBLEMS = [entry.name for entry in entries("problem")]


def gradients(
    loss: Any, model: Callable, guide: Callable, args: tuple, seed: int = 1
) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradient of every parameter that it met, or that a module holds."""
    pyro.set_rng_seed(seed)
    with poutine.trace(param_only=True) as traced:
        value = loss.loss_and_grads(model, guide, *args)
    values = {name: site["value"] for name, site in traced.trace.nodes.items()}
    leaves = {
        name: value.unconstrained() if hasattr(value, "unconstrained") else value for name, value in values.items()
    }
    for side in (model, guide):
        if isinstance(side, nn.Module):
            leaves |= {f"{type(side).__name__}.{n}": p for n, p in side.named_parameters()}
    found = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
    for leaf in leaves.values():
        leaf.grad = None
    return value, found


def assert_same(one: tuple[float, dict], two: tuple[float, dict], tolerance: float = 1e-9) -> None:
    assert one[0] == pytest.approx(two[0], rel=tolerance, abs=tolerance)
    assert one[1].keys() == two[1].keys()
    for name, gradient in one[1].items():
        scale = 1 + float(gradient.abs().max())
        torch.testing.assert_close(gradient, two[1][name], rtol=tolerance, atol=tolerance * scale)


WAYS = [(1, False), (3, False), (3, True)]
NAMES = ["one particle", "three looped", "three vectorized"]


def options(num_particles: int, vectorize: bool, nesting: int) -> dict[str, Any]:
    return {"num_particles": num_particles, "vectorize_particles": vectorize, "max_plate_nesting": nesting}


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_problem(name, way):
    problem = make_problem(name)
    how = options(*way, problem.max_plate_nesting)
    pair = (problem.model, problem.guide, problem.args)
    theirs = gradients(Trace_ELBO(**how), *pair)
    assert set(theirs[1]) == {*problem.model_params, *problem.guide_params}
    assert_same(gradients(MonteCarloELBO(**how, estimator="pyro"), *pair), theirs)


# What Pyro's programs can contain -----------------------------------------------------------------------------------


@dataclass
class Case:
    """How to make model and guide, the data, the number of nested plates, and how equal the gradients have to be."""

    make: Callable[[], tuple[Callable, Callable]]
    x: Tensor = field(default=X, repr=False)
    nesting: int = 1
    vectorizes: bool = True
    tolerance: float = 1e-9


def normal_guide(x: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.3, **DOUBLE))
    scale = pyro.param("scale", lambda: torch.tensor(0.6, **DOUBLE), constraint=constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))


def local_guide(x: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.3, **DOUBLE))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(loc * x, 0.7))


def bernoulli_guide(x: Tensor) -> None:
    logits = pyro.param("logits", lambda: 0.5 * X)
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Bernoulli(logits=logits))


def mean() -> Tensor:
    return pyro.param("mean", lambda: torch.tensor(0.4, **DOUBLE))


def local_model(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(mean(), 1.0))
        pyro.sample("x", dist.Normal(z, 0.8), obs=x)


def handler_mask() -> tuple:
    keep = torch.tensor([True, False, True, True, False])

    def masked(function: Callable) -> Callable:
        return lambda x: poutine.mask(function, mask=keep)(x)

    return masked(local_model), masked(local_guide)


def masked_bernoulli() -> tuple:
    keep = torch.tensor([True, False, True, True, False])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), poutine.mask(mask=keep):
            z = pyro.sample("z", dist.Bernoulli(logits=mean()))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    return model, poutine.mask(bernoulli_guide, mask=keep)


def scale_in_both() -> tuple:
    return poutine.scale(local_model, scale=0.3), poutine.scale(local_guide, scale=0.3)


def scale_in_model() -> tuple:
    return poutine.scale(local_model, scale=2.5), local_guide


def scaled_bernoulli() -> tuple:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), poutine.scale(scale=torch.linspace(0.5, 2.0, len(x), **DOUBLE)):
            z = pyro.sample("z", dist.Bernoulli(logits=mean()))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    return model, poutine.scale(bernoulli_guide, scale=1.7)


def annealed_kl() -> tuple:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            with poutine.scale(scale=0.2):
                z = pyro.sample("z", dist.Normal(mean(), 1.0))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    return model, poutine.scale(local_guide, scale=0.2)


def subsampled(discrete: bool) -> Callable:
    def make() -> tuple:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x), subsample_size=2, dim=-1):
                z = pyro.sample("z", dist.Bernoulli(logits=mean()) if discrete else dist.Normal(mean(), 1.0))
                pyro.sample("x", dist.Normal(z, 0.8), obs=pyro.subsample(x, event_dim=0))

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x), subsample_size=2, dim=-1):
                local = pyro.param("local", lambda: 0.5 * X, event_dim=0)
                pyro.sample("z", dist.Bernoulli(logits=local) if discrete else dist.Normal(local, 0.7))

        return model, guide

    return make


def observed_in_part() -> tuple:
    seen = torch.tensor([True, True, False, True, False])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(mean(), 0.8), obs=x, obs_mask=seen)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.tensor(0.3, **DOUBLE))
        with pyro.plate("data", len(x), dim=-1), poutine.mask(mask=~seen):
            pyro.sample("x_unobserved", dist.Normal(loc, 0.7))

    return model, guide


def events() -> tuple:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2, 3, **DOUBLE), 1.0).to_event(2))
        with pyro.plate("outer", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
            loc = z.mean((-2, -1)) + mean()
            loc = loc.reshape(*loc.shape, *([1, 1] if loc.dim() == 0 else []))
            pyro.sample("x", dist.Normal(loc, 0.8), obs=x.expand(2, 5))

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.arange(6.0, **DOUBLE).reshape(2, 3) / 10)
        pyro.sample("z", dist.Normal(loc, 0.7).to_event(2))

    return model, guide


def auxiliary() -> tuple:
    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.tensor(0.3, **DOUBLE))
        a = pyro.sample("a", dist.Normal(loc, 0.5), infer={"is_auxiliary": True})
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(a * x, 0.7))

    return local_model, guide


def factor_and_deterministic() -> tuple:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(mean(), 1.0))
        square = pyro.deterministic("square", z**2)
        pyro.factor("penalty", -0.1 * square)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    return model, normal_guide


def factor_in_the_guide() -> tuple:
    def guide(x: Tensor) -> None:
        normal_guide(x)
        pyro.factor("correction", 0.1 * pyro.param("loc"), has_rsample=True)

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(mean(), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    return model, guide


def sequential_plates() -> tuple:
    def model(x: Tensor) -> None:
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(mean(), 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 0.8), obs=x[i])

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.tensor(0.3, **DOUBLE))
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z_{i}", dist.Normal(loc, 0.7))

    return model, guide


def three_kinds() -> tuple:
    """A discrete global, a discrete local and a continuous local latent, each given the one before."""

    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.3))
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Bernoulli(logits=mean() + k))
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def guide(x: Tensor) -> None:
        logit = pyro.param("logit", lambda: torch.tensor(0.2, **DOUBLE))
        k = pyro.sample("k", dist.Bernoulli(logits=logit))
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Bernoulli(logits=logit * k + 0.3 * x))
            pyro.sample("z", dist.Normal(c + logit * x, 0.7))

    return model, guide


def rejection_sampler() -> tuple:
    """Reparameterised in part, with a shape that depends on an earlier site."""

    def model(x: Tensor) -> None:
        shape = pyro.sample("shape", dist.LogNormal(mean(), 0.5))
        rate = pyro.sample("rate", dist.Gamma(shape, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(rate, 0.8), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.tensor(0.3, **DOUBLE))
        shape = pyro.sample("shape", dist.LogNormal(loc, 0.5))
        pyro.sample("rate", ShapeAugmentedGamma(1.0 + shape, torch.ones_like(shape)))

    return model, guide


class Bayesian(PyroModule):
    """A `PyroModule` with a parameter, a random parameter and a plain network inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sigma = PyroParam(torch.tensor(0.8, **DOUBLE), constraint=constraints.positive)
        self.slope = PyroSample(dist.Normal(torch.tensor(0.0, **DOUBLE), 1.0))
        self.net = PyroModule[nn.Linear](1, 1).double()

    def forward(self, x: Tensor) -> None:
        slope, loc = self.slope, self.net(x.unsqueeze(-1)).squeeze(-1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(loc + slope * x, self.sigma), obs=x)


def pyro_modules() -> tuple:
    model = Bayesian()

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.tensor(0.3, **DOUBLE))
        pyro.sample("slope", dist.Normal(loc, 0.7))

    return model, guide


def registered_modules() -> tuple:
    encoder, decoder = nn.Linear(1, 2).double(), nn.Linear(1, 1).double()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros((), **DOUBLE), 1.0))
            pyro.sample("x", dist.Normal(decoder(z.unsqueeze(-1)).squeeze(-1), 0.8), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x.unsqueeze(-1)).unbind(-1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    return model, guide


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 2).double()

    def forward(self, x: Tensor) -> None:
        loc, log_scale = self.net(x.unsqueeze(-1)).unbind(-1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1).double()

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros((), **DOUBLE), 1.0))
            pyro.sample("x", dist.Normal(self.net(z.unsqueeze(-1)).squeeze(-1), 0.8), obs=x)


def auto_model(x: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(pyro.param("mean", lambda: torch.tensor(0.4)), 1.0))
    noise = pyro.sample("noise", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(slope, 1.0))
        pyro.sample("x", dist.Normal(z, noise), obs=x)


def auto(family: Callable) -> Case:
    """Autoguides make float32 parameters."""
    return Case(lambda: (auto_model, family(auto_model)), X.float(), tolerance=1e-5)


CASES = {
    "poutine.mask": Case(handler_mask),
    "mask, discrete": Case(masked_bernoulli),
    "scale in model and guide": Case(scale_in_both),
    "scale in the model": Case(scale_in_model),
    "scale per datum, discrete": Case(scaled_bernoulli),
    "annealed KL": Case(annealed_kl),
    "subsampling, local parameters": Case(subsampled(discrete=False)),
    "subsampling, discrete": Case(subsampled(discrete=True)),
    "obs_mask": Case(observed_in_part),
    "to_event, nested plates": Case(events, nesting=2, vectorizes=False),
    "auxiliary site": Case(auxiliary),
    "factor and deterministic": Case(factor_and_deterministic),
    "factor in the guide": Case(factor_in_the_guide),
    "sequential plate": Case(sequential_plates, nesting=0),
    "discrete, discrete, continuous": Case(three_kinds),
    "rejection sampler": Case(rejection_sampler),
    "PyroModule": Case(pyro_modules),
    "pyro.module": Case(registered_modules),
    "AutoNormal": auto(AutoNormal),
    "AutoDelta": auto(AutoDelta),
    "AutoMultivariateNormal": auto(AutoMultivariateNormal),
    "AutoLowRankMultivariateNormal": auto(AutoLowRankMultivariateNormal),
    "AutoStructured": auto(AutoStructured),
    "AutoNormalMessenger": auto(AutoNormalMessenger),
    "AutoHierarchicalNormalMessenger": auto(AutoHierarchicalNormalMessenger),
}


@pytest.mark.filterwarnings("ignore:Found auxiliary vars in the model")  # Pyro, of its own AutoStructured
@pytest.mark.parametrize("way", WAYS, ids=NAMES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_program(case, way):
    pyro.set_rng_seed(0)
    model, guide = case.make()
    how = options(way[0], way[1] and case.vectorizes, case.nesting)
    gradients(Trace_ELBO(max_plate_nesting=case.nesting), model, guide, (case.x,))
    theirs = gradients(Trace_ELBO(**how), model, guide, (case.x,))
    assert theirs[1]
    ours = gradients(MonteCarloELBO(**how, estimator="pyro"), model, guide, (case.x,))
    assert_same(ours, theirs, case.tolerance)


@pytest.fixture
def module_local() -> Iterator[None]:
    with pyro.settings.context(module_local_params=True):
        yield


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_module_local_parameters(module_local, way):
    pyro.set_rng_seed(0)
    model = Bayesian()
    guide = AutoNormal(model)
    how = options(*way, 1)
    gradients(Trace_ELBO(max_plate_nesting=1), model, guide, (X,))
    theirs = gradients(Trace_ELBO(**how), model, guide, (X,))
    assert {"Bayesian.net.weight", "AutoNormal.locs.slope"} <= set(theirs[1])
    assert not list(pyro.get_param_store().keys())
    assert_same(gradients(MonteCarloELBO(**how, estimator="pyro"), model, guide, (X,)), theirs)


# One number at one seed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["elbo", "elbo_analytic_kl"])
@pytest.mark.parametrize("estimator", ["auto", "pyro", "score", "leave_one_out", "decaying_average"])
@pytest.mark.parametrize("name", ["mixed_two_level", "local_global_subsampled", "masked"])
def test_three_methods_give_one_number(name, estimator, objective):
    problem = make_problem(name)
    loss = MonteCarloELBO(
        3, problem.max_plate_nesting, vectorize_particles=True, estimator=estimator, objective=objective
    )
    pair = (problem.model, problem.guide, problem.args)
    value, grads = gradients(loss, *pair)
    state = loss.state_dict()
    pyro.set_rng_seed(1)
    assert loss.loss(problem.model, problem.guide, *problem.args) == pytest.approx(value, rel=1e-12)
    loss.load_state_dict({"state": {}})
    pyro.set_rng_seed(1)
    surrogate = loss.differentiable_loss(problem.model, problem.guide, *problem.args)
    assert float(surrogate.detach()) == pytest.approx(value, rel=1e-12)
    assert loss.state == {}
    leaves = [pyro.param(n).unconstrained() for n in grads]
    found = torch.autograd.grad(surrogate, leaves)
    assert_same((value, dict(zip(grads, found, strict=True))), (value, grads))
    assert bool(state["state"]) == any(e.traits.stateful for e in loss.resolved.values())


def bayesian_with_autoguide() -> tuple:
    model = Bayesian()
    return model, AutoNormal(model)


def plain_modules() -> tuple:
    return Decoder(), Encoder()


@pytest.mark.parametrize("make", [bayesian_with_autoguide, plain_modules])
def test_elbo_module_with_a_torch_optimizer(make):
    """Ten steps of Adam through `ELBOModule` end where ten steps of Pyro's own loss end."""

    def train(loss: ELBO) -> Tensor:
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        model, guide = make()
        guide(X)
        elbo = loss(model, guide)
        elbo(X)
        optimizer = torch.optim.Adam(elbo.parameters(), lr=0.05)
        for _ in range(10):
            optimizer.zero_grad()
            elbo(X).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in elbo.parameters()])

    torch.testing.assert_close(train(MonteCarloELBO(estimator="pyro")), train(Trace_ELBO()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["normal_normal", "categorical", "local_global_subsampled"])
def test_a_run_of_pyro_s_svi(name):
    def train(loss: ELBO) -> tuple[list[float], Tensor]:
        pyro.clear_param_store()
        problem = make_problem(name)
        svi = SVI(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.05}), loss)
        pyro.set_rng_seed(4)
        losses = [svi.step(*problem.args) for _ in range(10)]
        return losses, torch.cat([pyro.param(n).detach().flatten() for n in problem.guide_params])

    ours, theirs = train(MonteCarloELBO(estimator="pyro")), train(Trace_ELBO())
    assert ours[0] == pytest.approx(theirs[0], rel=1e-9)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-9, atol=1e-9)


MEAN_FIELD = [
    name
    for name in PROBLEMS
    if (traits := make_problem(name).traits).reparameterised and not traits.two_level and "full" not in name
]


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
@pytest.mark.parametrize("name", MEAN_FIELD)
def test_analytic_kl_is_trace_mean_field(name, way):
    problem = make_problem(name)
    how = options(*way, problem.max_plate_nesting)
    pair = (problem.model, problem.guide, problem.args)
    theirs = gradients(TraceMeanField_ELBO(**how), *pair)
    assert_same(gradients(MonteCarloELBO(**how, estimator="pyro", objective="elbo_analytic_kl"), *pair), theirs)


# Vectorizing --------------------------------------------------------------------------------------------------------


def centred_model(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(mean(), 1.0))
        pyro.sample("x", dist.Normal(z - z.mean(), 0.8), obs=x)


def test_what_cannot_be_vectorized_is_looped_with_one_warning():
    loss = MonteCarloELBO(3, estimator="pyro")
    with pytest.warns(UserWarning, match="model's site 'x'") as caught:
        first = gradients(loss, centred_model, local_guide, (X,))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(gradients(loss, centred_model, local_guide, (X,)), first)
    assert_same(first, gradients(Trace_ELBO(3), centred_model, local_guide, (X,)))


@pytest.mark.parametrize("nesting", [{}, {"max_plate_nesting": 1}], ids=["guessed", "given"])
def test_vectorizing_it_all_the_same_is_an_error(nesting):
    """Pyro's loss gives a wrong number here."""
    loss = MonteCarloELBO(3, vectorize_particles=True, **nesting)
    with pytest.raises(ModelError, match="site 'x'"):
        loss.loss_and_grads(centred_model, local_guide, X)


def test_what_can_be_vectorized_is_without_a_word():
    loss = MonteCarloELBO(3, estimator="pyro")
    ours = gradients(loss, local_model, local_guide, (X,))
    assert_same(
        ours, gradients(Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1), local_model, local_guide, (X,))
    )


# Which estimator ----------------------------------------------------------------------------------------------------


def annotated_guide(x: Tensor) -> None:
    logit = pyro.param("logit", lambda: torch.tensor(0.2, **DOUBLE))
    k = pyro.sample("k", dist.Bernoulli(logits=logit), infer={"estimator": "leave_one_out"})
    with pyro.plate("data", len(x), dim=-1):
        c = pyro.sample("c", dist.Bernoulli(logits=logit * k + 0.3 * x))
        pyro.sample("z", dist.Normal(c + logit * x, 0.7), infer={"estimator": Score()})


def resolved(**settings: Any) -> dict[str, str]:
    loss = MonteCarloELBO(2, 1, vectorize_particles=True, **settings)
    loss.loss(three_kinds()[0], annotated_guide, X)
    return {name: type(estimator).__name__ for name, estimator in loss.resolved.items()}


def test_precedence():
    """The mapping, then the annotation, then the loss."""
    assert resolved() == {"k": "LeaveOneOut", "c": "LeaveOneOut", "z": "Score"}
    assert resolved(estimator="score") == {"k": "LeaveOneOut", "c": "Score", "z": "Score"}
    assert resolved(estimator={"z": "pathwise"}) == {"k": "LeaveOneOut", "c": "Enumerated", "z": "Pathwise"}
    assert resolved(estimator={"k": "score"}) == {"k": "Score", "c": "LeaveOneOut", "z": "Score"}
    assert resolved(annotations=False) == {"k": "Enumerated", "c": "Enumerated", "z": "Pathwise"}


def test_config_estimators_annotates_many_sites():
    model, guide = three_kinds()
    guide = config_estimators(guide, lambda site: "decaying_average" if site["name"] in ("k", "c") else None)
    loss = MonteCarloELBO(2, 1, vectorize_particles=True)
    loss.loss(model, guide, X)
    assert [type(e).__name__ for e in loss.resolved.values()] == ["DecayingAverage", "DecayingAverage", "Pathwise"]


@pytest.mark.parametrize("spelling", ["pathwise", "reparam", "reparameterized", Pathwise(), {"z": "pathwise"}])
def test_an_annotation_is_the_same_as_naming_it_in_the_loss(spelling):
    how = options(2, True, 1)
    ours = gradients(MonteCarloELBO(**how, estimator=spelling), local_model, local_guide, (X,))
    assert_same(ours, gradients(MonteCarloELBO(**how, estimator="pyro"), local_model, local_guide, (X,)))


def test_the_resolved_table_can_be_given_back():
    model, guide = three_kinds()
    first = MonteCarloELBO(2, 1, vectorize_particles=True)
    one = gradients(first, model, guide, (X,))
    second = MonteCarloELBO(2, 1, vectorize_particles=True, estimator=first.resolved)
    assert_same(gradients(second, model, guide, (X,)), one)
    assert [row.site for row in first.table] == ["k", "c", "z"]
    assert [type(e).__name__ for e in first.resolved.values()] == ["Enumerated", "Enumerated", "Pathwise"]
