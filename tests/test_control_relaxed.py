"""Control variates from the derivative of the model: exact means and variances, what is learned, what is refused."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate
from test_drawn_together import composite, tensor
from test_estimators import TRUE, bernoulli_toy, moments
from torch.distributions import constraints

from pyro_emvae import SVI, MonteCarloELBO, problems
from pyro_emvae._checks import EstimatorError
from pyro_emvae._registry import Traits, create
from pyro_emvae.controls import _learn
from pyro_emvae.estimators import Control, Estimator, Rebar, Relax
from pyro_emvae.estimators._network import Network
from pyro_emvae.problems import Problem, exact_gradients
from pyro_emvae.problems._problem import ProblemTraits
from pyro_emvae.testing import Replay, assert_mean, exact_mean
from pyro_emvae.testing.cubature import STEPS, _logistic

F64 = torch.float64


def net(hidden: int = 3, model: bool = True) -> dict[str, torch.Tensor]:
    """A state of `Relax` with a network that is not zero, and with an average."""
    weights = {
        "log_temperature": tensor(0.4).log(),
        "weight_in": tensor([[0.7, -1.2, 0.4]])[:, :hidden],
        "bias_in": tensor([0.1, 0.3, -0.5])[:hidden],
        "weight_out": tensor([0.5, 0.2, -0.9])[:hidden],
        "average": tensor(0.02),
        "seen": tensor(0.3),
    }
    slots = {k: torch.zeros(3 * hidden + model, dtype=F64) for k in ("mean", "square")}
    return {**weights, **slots, "count": tensor(0.0), "products": tensor([-0.7, 1.0])}


RELAXED = {
    "rebar": (Rebar(), None),
    "rebar, hot": (Rebar(temperature=1.3, lr=0.0), None),
    "relax": (Relax(hidden=3), {"b": net()}),
    "relax without the model": (Relax(hidden=3, model=False), {"b": net(model=False)}),
}


@pytest.mark.parametrize(("estimator", "state"), RELAXED.values(), ids=RELAXED)
@pytest.mark.parametrize("where", [(0.45, 2.0), (0.499, 0.0)])
def test_mean_is_exact_by_quadrature(where, estimator, state):
    """Over b and over both draws of z."""
    replay = Replay(bernoulli_toy(*where), estimator, 1, state)
    mean = exact_mean(replay)
    assert mean.how == "quadrature"
    assert float(mean.gradients["phi"]) == pytest.approx(TRUE[where], rel=1e-5)
    torch.testing.assert_close(mean.gradients["phi"], exact_gradients(replay.problem)["phi"], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("shape", "event_dim"), [((2, 4, 6, 5), 1), ((2, 7), 0), ((2,), 0), ((2, 3, 2, 3), 2)])
def test_the_network_s_derivatives_are_autograd_s(shape, event_dim):
    z = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    inputs = (2 * z.sigmoid() - 1).reshape(*shape[: len(shape) - event_dim], -1)
    sizes = {"weight_in": (inputs.shape[-1], 3), "bias_in": (3,), "weight_out": (3,)}
    weights = {name: torch.randn(size, dtype=F64).requires_grad_() for name, size in sizes.items()}
    value = (inputs @ weights["weight_in"] + weights["bias_in"]).tanh() @ weights["weight_out"]
    (slope,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    network = Network.at(z.detach(), event_dim, weights)
    torch.testing.assert_close((network.value, network.slope), (value[1].detach(), slope.detach()))
    given = torch.randn_like(value[1]), torch.randn_like(slope)
    right = torch.autograd.grad([value[1], slope], list(weights.values()), given)
    torch.testing.assert_close(tuple(network.by_weights(*given)[name] for name in weights), right)


def rebar_variance(t: float, phi: float, temperature: float, eta: float = 1.0) -> float:
    r"""Var of $(f(b)-\eta f(\tilde x))(b-p)+\eta\,\partial f(x)-\eta\,\partial f(\tilde x)$, $f(b)=(b-t)^2$, by scipy.

    Given b the two draws of z are independent, so that one-dimensional integrals of both parts are enough.
    """
    p = 1 / (1 + np.exp(-phi))
    first = second = 0.0
    for b, weight in ((1.0, p), (0.0, 1 - p)):
        residual, low, high = b - p, *((1 - p, 1.0) if b else (0.0, 1 - p))

        def draw(v: float, low: float = low, high: float = high) -> tuple[float, float, float]:
            u = low + v * (high - low)
            z = phi + np.log(u) - np.log1p(-u)
            du = p * (1 - p) * ((1 - v) * -1 if high == 1.0 else -v)  # d u / d phi at fixed v
            x = 1 / (1 + np.exp(-z / temperature))
            return x, x * (1 - x) / temperature, 1 + du / (u * (1 - u))

        def one(v: float) -> float:
            x, dx, _ = draw(v)
            return 2 * (x - t) * dx

        def two(v: float, residual: float = residual) -> float:
            x, dx, dz = draw(v)
            return (x - t) ** 2 * residual + 2 * (x - t) * dx * dz

        def integral(g: Any) -> float:
            return integrate.quad(g, 0, 1, epsabs=1e-13, epsrel=1e-11, limit=500)[0]

        a1, a2, b1, b2 = integral(one), integral(lambda v: one(v) ** 2), integral(two), integral(lambda v: two(v) ** 2)
        score = (b - t) ** 2 * residual
        mean = score + eta * (a1 - b1)
        first += weight * mean
        second += weight * (mean**2 + eta**2 * (a2 - a1**2 + b2 - b1**2))
    return second - first**2


@pytest.mark.parametrize("temperature", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("where", TRUE)
def test_variance_of_rebar_on_the_toy_of_the_relax_paper(where, temperature):
    """Against integrals that are written down without the package."""
    replay = Replay(bernoulli_toy(*where), Rebar(temperature=temperature), 1)
    mean, found = moments(replay, *_logistic(2, 0))
    assert mean == pytest.approx(TRUE[where], rel=1e-5)
    assert found == pytest.approx(rebar_variance(*where, temperature), rel=1e-6)
    assert STEPS > 100


def train(replay: Replay, count: int, state: Any = None) -> Any:
    for step in range(count):
        with torch.random.fork_rng():
            torch.manual_seed(step)
            state = replay.evaluate({}, state).state
    return state


@pytest.mark.parametrize(("estimator", "factor"), [(Rebar(1.0, lr=0.05), 1.3), (Relax(temperature=1.0, lr=0.05), 3.0)])
def test_what_is_learned_lowers_the_variance(estimator, factor):
    """Temperature, network and coefficients, with the parameters held."""
    where = (0.45, 2.0)
    replay = Replay(bernoulli_toy(*where), estimator, 1)
    before = moments(replay, *_logistic(2, 0))[1]
    state = train(replay, 250)
    mean, after = moments(Replay(bernoulli_toy(*where), estimator, 1, state), *_logistic(2, 0))
    assert mean == pytest.approx(TRUE[where], rel=1e-5)
    assert after < before / factor, (before, after)


def test_the_temperature_goes_down_the_variance():
    """The mean of many stochastic gradients is the derivative of the exact variance."""
    where, step = (0.45, 2.0), 1e-4
    replay = Replay(bernoulli_toy(*where), Rebar(lr=1e-3), 1)
    t = torch.linspace(-9, 9, 17, dtype=F64)
    grid, weights = (torch.cartesian_prod(x, x) for x in (t.sigmoid(), t.sigmoid() * (-t).sigmoid()))
    noise, weights = replay.outcomes(grid, weights.prod(-1))
    p = tensor(where[1]).sigmoid()
    found = total = 0.0
    for i in range(len(weights)):
        row = {name: rows[i] for name, rows in noise.items()}
        slope = replay.evaluate(row).state["b"]["mean"][0] / 0.1
        weight = weights[i] * (p if int(row["b"]) else 1 - p)
        found, total = found + weight * slope, total + weight
    high, low = (rebar_variance(*where, 0.5 * np.exp(s)) for s in (step, -step))
    expected = (high - low) / (2 * step)
    assert float(found / total) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("decay", "waits"), [(0.5, 1), (0.95, 14), (0.98, 16)])
def test_coefficients_are_learned_from_earlier_steps(decay, waits):
    """By hand: minus the running covariance over the running second moment, of the steps before; none at first."""
    control, state = Control(tensor(0.0), low=-5.0, high=5.0, decay=decay), {}
    generator = torch.Generator().manual_seed(0)
    covariance = square = 0.0
    for step in range(20):
        rest, part = torch.randn(2, 3, generator=generator, dtype=F64)
        pairs = [(rest, part), (2 * rest, part)]
        state, (coefficient, again) = _learn(control, state, ["c", "d"], pairs)
        expected = -covariance / square if step >= waits else 0.0
        assert float(coefficient) == pytest.approx(expected, abs=1e-12)
        assert float(again) == pytest.approx(min(max(2 * expected, -5.0), 5.0), abs=1e-12)  # each tensor has its own
        covariance = decay * covariance + (1 - decay) * float(rest @ part)
        square = decay * square + (1 - decay) * float(part @ part)
    bounded = _learn(dataclasses.replace(control, low=-1e-3, high=1e-3), state, ["c"], pairs[:1])[1][0]
    assert abs(float(bounded)) == pytest.approx(1e-3)


@pytest.mark.parametrize("estimator", ["rao_blackwell_topk", "double_control_variate"])
def test_a_learned_coefficient_is_near_the_best(estimator):
    """The variance over all outcomes after learning against that of a grid of coefficients."""
    kind = "bits" if estimator == "double_control_variate" else "categorical"
    problem = composite(kind, 2, 1)
    replay = Replay(problem, {"z": estimator, "g": "leave_one_out"}, 3)
    noise, weights = replay.outcomes(torch.zeros(1, 0), tensor([1.0]))

    def variance(coefficient: float) -> float:
        held = {}
        label = "slope" if kind == "bits" else "baseline"
        for name in ("slopes", "offset"):
            held[f"{label}|{name}"] = tensor([-coefficient, 1.0, 1.0])  # covariance, square, weight
        rows, p = Replay(problem, {"z": estimator, "g": "leave_one_out"}, 3, {"z": held}).gradients(noise)
        p, g = weights * p, rows["offset"]
        possible = p > 0
        p, g = p[possible], g[possible]
        mean = (p[:, None] * g).sum(0)
        return float((p[:, None] * (g - mean) ** 2).sum())

    grid = {a: variance(a) for a in (-1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5)}
    state = train(replay, 40)
    label = "slope" if kind == "bits" else "baseline"
    # the mean of the running moments is what a longer memory would hold
    moved = torch.zeros(3, dtype=F64)
    for step in range(90):
        with torch.random.fork_rng():
            torch.manual_seed(1000 + step)
            state = replay.evaluate({}, state).state
        moved += state["z"][f"{label}|offset"]
    learned = -float(moved[0] / moved[1])
    best = min(grid, key=grid.get)
    assert variance(learned) < 1.05 * grid[best], (learned, grid)
    assert max(grid.values()) > 1.2 * grid[best]


def spread(downstream: bool = True, num: int = 3) -> Problem:
    """Bits in a plate, a term outside of it that all of them reach, and a normal latent downstream in the guide."""
    params = {"logits": tensor([0.5, -0.4, 0.9]), "loc": tensor(0.3), "weights": tensor([0.7, -1.1, 0.4])}
    x = tensor(0.6)

    def model() -> None:
        weights = pyro.param("weights", params["weights"].clone)
        with pyro.plate("bits", num):
            b = pyro.sample("b", dist.Bernoulli(logits=tensor([-0.8, 0.3, 0.6])))
        total = (b * weights).sum(-1, keepdim=True)
        z = pyro.sample("z", dist.Normal(total.squeeze(-1) if total.dim() == 1 else total, 1.0))
        pyro.sample("x", dist.Normal(z + total.reshape(z.shape) ** 2, 1.0), obs=x)

    def guide() -> None:
        with pyro.plate("bits", num):
            b = pyro.sample("b", dist.Bernoulli(logits=pyro.param("logits", params["logits"].clone)))
        total = b.sum(-1, keepdim=b.dim() > 1) if downstream else 2.0
        pyro.sample("z", dist.Normal(pyro.param("loc", params["loc"].clone) * total, 1.0))

    def elbo(given: dict | None = None) -> torch.Tensor:
        p = {**params, **(given or {})}
        outcomes = torch.cartesian_prod(*[tensor([0.0, 1.0])] * num)
        q, prior = dist.Bernoulli(logits=p["logits"]), dist.Bernoulli(logits=tensor([-0.8, 0.3, 0.6]))
        log_q, total = q.log_prob(outcomes).sum(-1), (outcomes * p["weights"]).sum(-1)
        loc = p["loc"] * (outcomes.sum(-1) if downstream else 2.0)
        kl = 0.5 * (loc - total) ** 2
        data = dist.Normal(loc + total**2, 1.0).log_prob(x) - 0.5
        return (log_q.exp() * (prior.log_prob(outcomes).sum(-1) - log_q - kl + data)).sum()

    return Problem(
        name="spread",
        model=model,
        guide=guide,
        args=(),
        sites=("b", "z"),
        model_params=("weights",),
        guide_params=("logits", "loc"),
        params=MappingProxyType(params),
        constraints=MappingProxyType(dict.fromkeys(params, constraints.real)),
        max_plate_nesting=1,
        traits=ProblemTraits(support="mixed", reparameterised=False, two_level=True),
        elbo=elbo,
    )


@pytest.mark.parametrize(("estimator", "evaluations"), [("rebar", 5), ("double_control_variate", 2)])
def test_plates_inside_a_term_and_draws_downstream(estimator, evaluations):
    """A term outside the plate counts once in the derivative; downstream draws are drawn anew."""
    problem, samples = spread(), []
    loss = MonteCarloELBO(200, 1, vectorize_particles=True, estimator={"b": estimator, "z": "pathwise"})
    pyro.set_rng_seed(2)
    for _ in range(200):
        loss.loss_and_grads(problem.model, problem.guide)
        leaves = [pyro.param(name).unconstrained() for name in ("logits", "loc", "weights")]
        samples.append(torch.cat([-leaf.grad.reshape(-1) for leaf in leaves]))
        for leaf in leaves:
            leaf.grad = None
    assert loss.evaluations == 200 * evaluations
    right = exact_gradients(problem)
    expected = torch.cat([right[name].reshape(-1) for name in ("logits", "loc", "weights")])
    assert_mean(torch.stack(samples), expected, detect=0.15 * float(expected.abs().max()))


class Given(MonteCarloELBO):
    """A loss whose estimators find the given uniform numbers."""

    given: torch.Tensor

    def _uniform(self, name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        return self.given.reshape(shape)


@pytest.mark.parametrize("estimator", ["rebar", "relax", "double_control_variate"])
@pytest.mark.parametrize("num_particles", [2, 3])
def test_particles_run_one_by_one_have_the_gradient_of_vectorized_ones(estimator, num_particles):
    """The same draws and the same noise, other guide sites kept, further values too."""
    problem = spread(downstream=False)
    loss = Given(num_particles, 1, vectorize_particles=False, estimator={"b": estimator, "z": "pathwise"})
    loss.given = torch.rand(2 * num_particles * 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    replay = Replay(problem, {"b": estimator, "z": "pathwise"}, num_particles)
    state = None if estimator != "relax" else train(replay, 3)
    pyro.set_rng_seed(3)
    looped = loss.evaluate(problem.model, problem.guide, (), {}, state)
    b, z = (looped.particles.guide[name].value for name in ("b", "z"))
    noise = {
        "b": b.long(),
        "z": (z - 0.6).reshape(-1, 1).detach(),
        "b|uniform": loss.given.reshape(2, num_particles, 3),
    }
    right = replay.gradient(replay.evaluate(noise, state))
    leaves = [pyro.param(name).unconstrained() for name in problem.params]
    for name, found in zip(problem.params, torch.autograd.grad(looped.surrogate, leaves), strict=True):
        torch.testing.assert_close(found, right[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", ["rebar", "relax"])
def test_one_particle_alone_has_the_gradient_of_vectorized_values(estimator):
    problem, found = spread(downstream=False), []
    for vectorize in (True, False):
        loss = Given(1, 1, estimator={"b": estimator, "z": "pathwise"})
        loss.given = torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=F64)
        pyro.set_rng_seed(3)
        loss.particles(problem.model, problem.guide, (), {})
        plan = loss.plans[(problem.model, problem.guide)]
        assert plan.probes[0]
        plan.probes = (vectorize, plan.probes[1])
        pyro.set_rng_seed(3)
        loss.loss_and_grads(problem.model, problem.guide)
        leaves = [pyro.param(name).unconstrained() for name in problem.params]
        found.append(torch.cat([leaf.grad.reshape(-1) for leaf in leaves]))
        for leaf in leaves:
            leaf.grad = None
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert int((found[0] != 0).sum()) >= 5


@pytest.mark.parametrize("estimator", ["rebar", "relax", "double_control_variate"])
def test_masks_scales_and_minibatches(estimator):
    problem = composite("bits", 3, 2)
    replay = Replay(problem, {"z": estimator, "g": "leave_one_out"}, 2)
    if estimator == "double_control_variate":
        found, right = exact_mean(replay).gradients, exact_gradients(problem)
        for name, gradient in right.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10)
        return
    gradients, _ = replay.gradients(replay.draws(10_000, seed=4))
    for name, gradient in exact_gradients(problem).items():
        assert_mean(gradients[name], gradient, detect=0.15)


def indexed() -> None:
    b = pyro.sample("b", dist.Bernoulli(tensor(0.4)))
    pyro.sample("x", dist.Normal(tensor([0.0, 1.0])[b.long()], 1.0), obs=tensor(0.3))


def indexed_raw() -> None:
    b = pyro.sample("b", dist.Bernoulli(tensor(0.4)))
    pyro.sample("x", dist.Normal(torch.stack([1 - b, b], -1)[..., b.to(torch.uint8).tolist()], 1.0), obs=tensor(0.3))


def compared() -> None:
    b = pyro.sample("b", dist.Bernoulli(tensor(0.4)))
    pyro.sample("x", dist.Normal(torch.where(b > 0.5, 1.0, -1.0).to(F64), 1.0), obs=tensor(0.3))


def rounded() -> None:
    b = pyro.sample("b", dist.Bernoulli(tensor(0.4)))
    pyro.sample("x", dist.Normal(b.round(), 1.0), obs=tensor(0.3))


def singular() -> None:
    b = pyro.sample("b", dist.Bernoulli(tensor(0.4)))
    pyro.sample("x", dist.Normal(b, (2 * b - 1).abs()), obs=tensor(0.3))


def counted() -> None:
    b = pyro.sample("b", dist.Bernoulli(tensor(0.4)))
    pyro.sample("x", dist.Binomial(2 + b, tensor(0.3)), obs=tensor(1.0))


def typed() -> None:
    b = pyro.sample("b", dist.Bernoulli(tensor(0.4)))
    if bool(((b != 0) & (b != 1)).any()):
        raise TypeError("bits only")
    pyro.sample("x", dist.Normal(b, 1.0), obs=tensor(0.3))


def bit_guide() -> None:
    pyro.sample("b", dist.Bernoulli(logits=pyro.param("phi", tensor(0.2))))


def two_level_model() -> None:
    b = pyro.sample("b", dist.Bernoulli(tensor(0.4)))
    c = pyro.sample("c", dist.Bernoulli(tensor(0.4)))
    pyro.sample("x", dist.Normal(b + c, 1.0), obs=tensor(0.3))


def two_level_guide() -> None:
    b = pyro.sample("b", dist.Bernoulli(logits=pyro.param("phi", tensor(0.2))))
    pyro.sample("c", dist.Bernoulli(logits=b))


REFUSED = {
    "index": (indexed, bit_guide, "the term of 'x' at the value 0.5, which has no derivative"),
    "comparison": (compared, bit_guide, "the term of 'x' at the value 0.5, which has no derivative"),
    "rounded": (rounded, bit_guide, r"'x' at the value 0.5, which moves by -5 and has the derivative 0"),
    "binomial": (counted, bit_guide, r"'x' at the value 0.5, which moves by .* and has the derivative -0\.357"),
    "singular": (singular, bit_guide, "the term of 'x' at the value 0.5, which is not finite"),
    "raises": (typed, bit_guide, r"TypeError \(bits only\), which is an error"),
    "discrete downstream": (two_level_model, two_level_guide, "guide site 'c' downstream, which has no"),
}


@pytest.mark.parametrize(("model", "guide", "observed"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("estimator", ["rebar", "relax"])
def test_a_model_that_cannot_take_relaxed_values_is_refused(estimator, model, guide, observed):
    loss = MonteCarloELBO(estimator={"b": estimator})
    before = torch.get_rng_state()
    with pytest.raises(EstimatorError, match=observed) as caught:
        loss.loss_and_grads(model, guide)
    assert '"leave_one_out"' in str(caught.value) and loss.state == {}
    assert pyro.param("phi").grad is None
    assert len(before) == len(torch.get_rng_state())


@pytest.mark.parametrize("estimator", [Rebar(), Relax()], ids=str)
@pytest.mark.parametrize("backend", ["eager", "graph"])
def test_a_model_that_is_linear_in_the_bits(estimator, backend):
    """The derivative by the relaxed values does not move with them."""
    x = tensor([0.5, -1.0, 2.0])

    def model() -> None:
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(3, dtype=F64)))
            pyro.factor("f", z * x * pyro.param("theta", tensor(1.0)))

    def guide() -> None:
        with pyro.plate("n", 3):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", torch.zeros(3, dtype=F64))))

    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), MonteCarloELBO(2, estimator=estimator), backend=backend)
    for _ in range(3):
        svi.step()
    torch.testing.assert_close(pyro.param("logits").detach().sign(), x.sign())


@pytest.mark.parametrize("model", [indexed, compared])
def test_relax_without_the_model_takes_any(model):
    loss = MonteCarloELBO(estimator={"b": Relax(model=False)})
    for _ in range(3):
        loss.loss_and_grads(model, bit_guide)
    assert loss.evaluations == 1 and float(loss.state["b"]["weight_out"].abs().max()) > 0


@pytest.mark.parametrize("estimator", [Rebar(), Relax(), "measure_valued"], ids=str)
@pytest.mark.parametrize("num_particles", [1, 2])
@pytest.mark.parametrize("make", [problems.bernoulli, problems.bernoulli_vector], ids=["three bits", "vector"])
def test_the_model_alone_says_the_same_of_further_values(estimator, num_particles, make, monkeypatch):
    """As guide and model together do, bit for bit but for rounding; and the guide is then not called again."""
    problem, found, calls = make(), [], []

    def guide(*args: torch.Tensor) -> None:
        calls.append(1)
        problem.guide(*args)

    for alone in (True, False):
        if not alone:
            monkeypatch.setattr("pyro_emvae.probing._model_alone", lambda *_: False)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = MonteCarloELBO(num_particles, problem.max_plate_nesting, estimator=estimator)
        for _ in range(4):  # the third looks again at what depends on what
            calls.clear()
            loss.loss_and_grads(problem.model, guide, *problem.args)
        found.append([pyro.param(name).unconstrained().grad for name in problem.guide_params])
        assert (len(calls) == 1) == alone
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("make", "observed"),
    [
        (lambda: Rebar(temperature=0.0), r"temperature=0\.0"),
        (lambda: Rebar(lr=-1.0), r"lr=-1\.0"),
        (lambda: Relax(hidden=0), "hidden=0"),
        (lambda: Relax(temperature=-2.0), r"temperature=-2\.0"),
    ],
)
def test_settings_are_checked(make, observed):
    with pytest.raises(EstimatorError, match=observed):
        make()


def test_a_relaxed_bernoulli_is_no_bernoulli_site():
    def guide() -> None:
        pyro.sample("b", dist.RelaxedBernoulli(tensor(0.5), logits=pyro.param("phi", tensor(0.2))))

    with pytest.raises(EstimatorError, match=r"RelaxedBernoulli\(batch_shape"):
        MonteCarloELBO(estimator={"b": "rebar"}).loss_and_grads(indexed, guide)


def test_registered_names_make_the_defaults():
    assert create("estimator", "rebar") == Rebar() and create("estimator", "relax") == Relax()


@dataclasses.dataclass(frozen=True)
class OnePath(Rebar):
    """The second draw's path, given b, is left out."""

    def surrogate(self, site, signal, rows, state):
        first = tensor([1.0, 0.0]).reshape(2, *(1,) * site.value.dim())
        half = dataclasses.replace(site.probed, gradient=site.probed.gradient * first)
        return super().surrogate(dataclasses.replace(site, probed=half), signal, rows, state)


@dataclasses.dataclass(frozen=True)
class OneDraw(Rebar):
    """Both relaxed draws are the same."""

    def probes(self, site, rows, state):
        return super().probes(site, rows, state)[:1].expand(2, *site.value.shape)


@pytest.mark.parametrize("estimator", [OnePath(), OneDraw()])
def test_planted_defects_are_caught(estimator):
    replay = Replay(bernoulli_toy(0.45, 2.0), estimator, 1)
    mean = moments(replay, *_logistic(2, 0))[0]
    assert abs(mean - TRUE[(0.45, 2.0)]) > 1e-4


@dataclasses.dataclass(frozen=True)
class Flip(Estimator):
    """The whole sum over a bit, by running the model at both of its values."""

    traits: ClassVar[Traits] = Traits(support="binary", probes="yes")

    def probes(self, site, rows, state):
        return torch.stack([torch.zeros_like(site.value), torch.ones_like(site.value)])

    def surrogate(self, site, signal, rows, state):
        zero, one = site.probed.signal
        term = (one - zero) * site.fn.logits.sigmoid()
        return {"value": term, "guide": term}


@pytest.mark.parametrize("weighted", ["rao_blackwell_topk", "unordered_set"])
def test_further_values_keep_the_weights_of_another_site(weighted):
    problem = composite("categorical", 2, 1)
    mean = exact_mean(Replay(problem, {"g": Flip(), "z": weighted}, 2))
    for name, gradient in exact_gradients(problem).items():
        torch.testing.assert_close(mean.gradients[name], gradient, rtol=1e-10, atol=1e-10)


def test_further_values_are_annealed_as_the_draws_are():
    """By hand: the data's terms whole, the latent's by beta."""

    def model() -> None:
        b = pyro.sample("b", dist.Bernoulli(tensor(0.4)))
        pyro.sample("x", dist.Normal(b, 1.0), obs=tensor(0.3))

    q = tensor(0.2).sigmoid()
    for beta in (1.0, 0.25):
        loss = MonteCarloELBO(estimator={"b": Flip()})
        evaluation = loss.evaluate(model, bit_guide, (), {}, beta=tensor(beta))
        (found,) = torch.autograd.grad(evaluation.surrogate, pyro.param("phi").unconstrained())
        latent = (tensor(0.4 / 0.6)).log() - 0.2
        expected = q * (1 - q) * (0.5 * (0.3**2 - 0.7**2) + beta * latent)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("estimator", [Rebar(), Relax(hidden=3), Relax(model=False)])
def test_logits_may_depend_on_other_draws(estimator):
    def guide() -> None:
        b = pyro.sample("b", dist.Bernoulli(logits=pyro.param("phi", tensor(0.2))))
        pyro.sample("c", dist.Bernoulli(logits=pyro.param("psi", tensor(0.7)) * (b - 0.3)))

    problem = dataclasses.replace(
        bernoulli_toy(0.45, 0.2),
        model=two_level_model,
        guide=guide,
        sites=("b", "c"),
        guide_params=("phi", "psi"),
        params=MappingProxyType({"phi": tensor(0.2), "psi": tensor(0.7)}),
        constraints=MappingProxyType(dict.fromkeys(("phi", "psi"), constraints.real)),
        elbo=None,
    )
    found, right = (exact_mean(Replay(problem, {"b": "score", "c": e}, 1)) for e in (estimator, "score"))
    assert (found.how, right.how) == ("quadrature", "enumeration")
    for name, gradient in right.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=0, atol=1e-10)
        assert abs(float(gradient)) > 1e-3
