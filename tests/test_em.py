r"""EM: the alternation against hand-written half-steps, what each half-step leaves alone, textbook EM, blocks."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from pyro.infer import autoguide
from torch import Tensor, nn

from pyro_emvae import EM, MonteCarloELBO, problems, steps
from pyro_emvae._checks import BlockError, EmvaeError, StepError
from pyro_emvae._registry import Traits, create, entries
from pyro_emvae.engine import State
from pyro_emvae.parameters import GUIDE, MODEL, assign
from pyro_emvae.posterior import GuidePosterior
from pyro_emvae.steps import HalfStep, Info

SMALL = {"digits_vae": functools.partial(problems.digits_vae, num_train=12, num_hidden=6)}
PROBLEMS = {entry.name: SMALL.get(entry.name, entry.factory) for entry in entries("problem")}
BOTH = [name for name, make in PROBLEMS.items() if (p := make()).model_params and p.guide_params]
OPTIMIZERS = {
    "SGD": functools.partial(torch.optim.SGD, lr=1e-3),
    "momentum": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "Adam": functools.partial(torch.optim.Adam, lr=0.02),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.02),
}
X = torch.tensor([[0.3, -1.2], [1.7, 0.4], [-0.5, 2.2], [0.9, 0.8]], dtype=torch.float64)


def declare(model, guide, args) -> dict[str, Tensor]:
    """Make all parameters and return their unconstrained leaves."""
    infer.Trace_ELBO().loss(model, guide, *args)
    return dict(pyro.get_param_store().named_parameters())


def by_hand(problem, optim, iterations: int, *, e_steps: int = 1, m_steps: int = 1, loss: Any = None) -> list[float]:
    """The alternation as one would write it: phi at theta_t, then theta at phi_t+1, each on draws of its own."""
    leaves = declare(problem.model, problem.guide, problem.args)
    loss = loss or infer.Trace_ELBO()
    blocks = [[leaves[n] for n in names] for names in (problem.guide_params, problem.model_params)]
    optimizers = [optim(block) for block in blocks]
    pyro.set_rng_seed(3)
    losses = []
    for _ in range(iterations):
        for block, optimizer, count in zip(blocks, optimizers, (e_steps, m_steps), strict=True):
            for _ in range(count):
                value = loss.differentiable_loss(problem.model, problem.guide, *problem.args)
                for leaf, grad in zip(block, torch.autograd.grad(value, block), strict=True):
                    leaf.grad = grad
                optimizer.step()
                losses.append(float(value.detach()))
    return losses


def values(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in leaves.items()}


# The alternation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("name", BOTH)
def test_alternation_equals_a_pair_of_half_steps_written_by_hand(name, optim):
    problem, rule = PROBLEMS[name](), OPTIMIZERS[optim]
    losses = by_hand(problem, rule, 3)
    expected = values(dict(pyro.get_param_store().named_parameters()))
    pyro.clear_param_store()
    problem = PROBLEMS[name]()
    leaves = declare(problem.model, problem.guide, problem.args)
    em = EM(problem.model, problem.guide, rule, MonteCarloELBO(estimator="pyro"))
    pyro.set_rng_seed(3)
    records = [em._iterate(problem.args, {}) for _ in range(3)]
    assert [g.loss for r in records for _, g in r.gradients] == pytest.approx(losses, rel=1e-10)
    assert [r.loss for r in records] == pytest.approx(losses[1::2], rel=1e-10)
    assert [r.before for r in records] == pytest.approx(losses[::2], rel=1e-10)
    for n, leaf in leaves.items():
        torch.testing.assert_close(leaf.detach(), expected[n], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("e_steps", "m_steps"), [(1, 1), (5, 1), (1, 3), (2, 2)])
def test_half_steps_of_many_updates_with_optimizer_and_loss_of_their_own(e_steps, m_steps):
    problem = problems.linear_gaussian()
    losses = by_hand(problem, OPTIMIZERS["Adam"], 2, e_steps=e_steps, m_steps=m_steps)
    expected = values(dict(pyro.get_param_store().named_parameters()))
    halves = [
        steps.Gradient(k, optim=OPTIMIZERS["Adam"], loss=MonteCarloELBO(estimator="pyro")) for k in (e_steps, m_steps)
    ]
    for optim in (None, OPTIMIZERS["SGD"]):
        pyro.clear_param_store()
        leaves = declare(problem.model, problem.guide, problem.args)
        em = EM(problem.model, problem.guide, optim, infer.TraceGraph_ELBO(), e_step=halves[0], m_step=halves[1])
        fit = em.run(*problem.args, max_iter=2, seed=3)
        assert (-fit.history["elbo"]).values.tolist() == pytest.approx(losses, rel=1e-10)
        assert fit.history["phase"].values.tolist() == ([0] * e_steps + [1] * m_steps) * 2
        assert all(torch.allclose(leaf, expected[n], rtol=1e-10, atol=0) for n, leaf in leaves.items())


@pytest.mark.parametrize("loss", [infer.Trace_ELBO, infer.TraceGraph_ELBO, infer.TraceMeanField_ELBO])
@pytest.mark.parametrize("name", ["linear_gaussian", "local_global"])
def test_alternation_with_pyros_losses(name, loss):
    problem = PROBLEMS[name]()
    kind = infer.Trace_ELBO if loss is infer.TraceGraph_ELBO else loss  # the same numbers where all is reparameterised
    losses = by_hand(problem, OPTIMIZERS["Adam"], 3, loss=kind())
    pyro.clear_param_store()
    declare(problem.model, problem.guide, problem.args)
    em = EM(problem.model, problem.guide, OPTIMIZERS["Adam"], loss())
    pyro.set_rng_seed(3)
    assert [em.step(*problem.args) for _ in range(3)] == pytest.approx(losses[1::2], rel=1e-10)


def test_each_block_has_its_own_optimizer():
    problem = problems.linear_gaussian()
    for frozen, moving in ((GUIDE, MODEL), (MODEL, GUIDE)):
        pyro.clear_param_store()
        optim = {frozen: pyro.optim.SGD({"lr": 0.0}), moving: pyro.optim.Adam({"lr": 0.1})}
        em = EM(problem.model, problem.guide, optim)
        em.step(*problem.args)
        before = em.blocks.constrained()
        em.step(*problem.args)
        after = em.blocks.constrained()
        assert {n for n, v in after.items() if not torch.equal(v, before[n])} == set(em.blocks.leaves(moving))


# What each half-step leaves alone -------------------------------------------------------------------------------


class Net(nn.Module):
    """Linear, batch norm, dropout, and a running count that is replaced, not written."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(rows, columns), nn.BatchNorm1d(columns), nn.Dropout(0.4)
        self.register_buffer("count", torch.zeros(()))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return self.drop(self.norm(self.linear(x).tanh()))


def autoencoder(registered: str = "own"):
    torch.manual_seed(0)
    decoder, encoder = Net(2, 2), Net(2, 4)

    def register(own):
        for name, net in (("decoder", decoder), ("encoder", encoder)):
            if registered == "both" or name == own:
                pyro.module(name, net)

    def model(x):
        register("decoder")
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        register("encoder")
        loc, scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return model, guide, decoder, encoder


def everything(em, decoder, encoder) -> dict[str, dict[str, Any]]:
    """Parameters, buffers and optimizer slots of either side."""
    slots = {k: copy.deepcopy(em.engine.optimizers[k].get_state()) for k in (GUIDE, MODEL)}
    nets = {GUIDE: copy.deepcopy(encoder.state_dict()), MODEL: copy.deepcopy(decoder.state_dict())}
    return {k: {"net": nets[k], "slots": slots[k]} for k in (GUIDE, MODEL)}


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for name, sub in tree.items() for k, v in flat(sub, f"{path}/{name}").items()}
    return {path: tree}


def changed(one: Any, two: Any) -> set[str]:
    one, two = flat(one), flat(two)
    assert one.keys() == two.keys()
    same = {k: torch.equal(v, two[k]) if isinstance(v, Tensor) else v == two[k] for k, v in one.items()}
    return {k for k, equal in same.items() if not equal}


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("registered", ["own", "both"])
@pytest.mark.parametrize("loss", [MonteCarloELBO, infer.Trace_ELBO])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_half_steps_leave_the_other_block_alone_after_joint_steps(optim, loss, registered, num_steps):
    """Also with momentum, Adam's averages and weight decay, which move a parameter whose gradient is zero."""
    model, guide, decoder, encoder = autoencoder(registered)
    halves = {"e_step": steps.Gradient(num_steps), "m_step": steps.Gradient(num_steps)}
    em = EM(model, guide, OPTIMIZERS[optim], loss(), **halves)
    em.step(X)
    for _ in range(3):
        em.engine.step(None, (X,), {})
    before = everything(em, decoder, encoder)
    _, posterior, info = em.e_step.expect(em.engine, em.engine.state, X)
    between = everything(em, decoder, encoder)
    assert len(info.gradients) == num_steps
    assert not changed(before[MODEL], between[MODEL])
    moved = changed(before[GUIDE], between[GUIDE])
    assert {"/net/linear.weight", "/net/norm.running_mean", "/net/norm.num_batches_tracked", "/net/count"} <= moved
    _, info = em.m_step.maximise(em.engine, em.engine.state, posterior, X)
    after = everything(em, decoder, encoder)
    assert len(info.gradients) == num_steps
    assert not changed(between[GUIDE], after[GUIDE])
    moved = changed(between[MODEL], after[MODEL])
    assert {"/net/linear.weight", "/net/norm.running_mean", "/net/norm.num_batches_tracked", "/net/count"} <= moved
    tracked = encoder.norm.num_batches_tracked, decoder.norm.num_batches_tracked
    assert [int(n) for n in tracked] == [3 + 2 * num_steps] * 2


def test_gradients_of_the_other_block_are_not_left_behind():
    model, guide, decoder, encoder = autoencoder()
    for loss in (None, infer.Trace_ELBO()):
        em = EM(model, guide, OPTIMIZERS["Adam"], loss)
        em.step(X)
        assert all(p.grad is None for net in (decoder, encoder) for p in net.parameters())


class Counting(steps.Gradient):
    """A half-step with a state of its own: how many iterations it has seen, from what `init` says."""

    def init(self, problem: Any, state: State, x: Tensor) -> dict[str, Tensor]:
        assert set(state.params) >= {"sigma"}
        return {"seen": torch.tensor(len(x))}

    def expect(self, problem: Any, state: State, x: Tensor) -> tuple[State, GuidePosterior, Info]:
        state, posterior, info = super().expect(problem, state, x)
        return state.with_own("E", {"seen": state.steps["E"]["seen"] + 1}), posterior, info

    def maximise(self, problem: Any, state: State, posterior: GuidePosterior, x: Tensor) -> tuple[State, Info]:
        state, info = super().maximise(problem, state, posterior, x)
        return state.with_own("M", {"seen": state.steps["M"]["seen"] + 2}), info


def test_half_steps_carry_their_own_state():
    problem = problems.linear_gaussian()
    em = EM(problem.model, problem.guide, OPTIMIZERS["Adam"], e_step=Counting(), m_step=Counting())
    (x,) = problem.args
    for iteration in (1, 2, 3):
        em.step(x)
        seen = {slot: int(own["seen"]) for slot, own in em.engine.state.steps.items()}
        assert seen == {"E": len(x) + iteration, "M": len(x) + 2 * iteration}
    pyro.clear_param_store()
    em.step(x)
    assert int(em.engine.state.steps["E"]["seen"]) == len(x) + 1


# Textbook EM ----------------------------------------------------------------------------------------------------


class ExactPosterior(HalfStep):
    """An E-step for probabilistic PCA: the guide has the posterior written into it, theta held."""

    traits = Traits(slots=("E",))

    def __init__(self, problem: problems.Problem) -> None:
        self.problem = problem

    def expect(self, problem: Any, state: State, x: Tensor) -> tuple[State, GuidePosterior, Info]:
        theta = problem.parameters.constrained()
        info = Info(loss=-float(self.problem.log_evidence(theta)))
        return state, GuidePosterior(problem.model, problem.guide, (x,)), info


class LeastSquares(HalfStep):
    """The M-step of probabilistic PCA: weights and offset by least squares, then the noise that is left."""

    traits = Traits(slots=("M",))

    def maximise(self, problem: Any, state: State, posterior: GuidePosterior, x: Tensor) -> tuple[State, Info]:
        q = posterior.marginal("z")
        z = torch.cat([q.mean, torch.ones_like(q.mean[:, :1])], -1)
        second = z.T @ z
        second[:2, :2] += q.covariance_matrix.sum(0) if q.covariance_matrix.dim() == 3 else len(x) * q.covariance_matrix
        both = torch.linalg.solve(second, z.T @ x).T
        variance = (x.square().sum() - 2 * (x * (z @ both.T)).sum() + (both @ second @ both.T).trace()) / x.numel()
        assign(problem.parameters, {"weight": both[:, :2], "bias": both[:, 2], "sigma": variance.sqrt()})
        return state, Info()


def exact_guide(problem: problems.Problem):
    """The posterior at the present theta as a guide without parameters."""

    def guide(x):
        theta = {n: pyro.param(n).detach() for n in problem.model_params if n in pyro.get_param_store()}
        q = problem.posterior(theta)["z"]
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    return guide


def test_plain_em_raises_the_evidence_every_iteration_and_lands_on_the_maximum():
    problem = problems.linear_gaussian_full()
    halves = {"e_step": ExactPosterior(problem), "m_step": LeastSquares()}
    em = EM(problem.model, exact_guide(problem), None, **halves)
    fit = em.run(*problem.args, max_iter=600, track=problem.model_params)
    evidence = fit.history["objective"].values
    assert evidence[0] == pytest.approx(float(problem.log_evidence()), rel=1e-12)
    gains = evidence[1:] - evidence[:-1]
    assert gains.min() >= -1e-11 and gains[0] > 1.0
    best = problem.maximum()
    assert evidence[-1] == pytest.approx(float(problem.log_evidence(best)), abs=1e-9)
    assert fit.status == "MAX_ITER" and fit.num_iterations == 600 and len(fit.history["step"]) == 0
    for name in ("bias", "sigma"):
        torch.testing.assert_close(fit.params[name], best[name], rtol=1e-5, atol=1e-5)
    square = fit.params["weight"] @ fit.params["weight"].T
    torch.testing.assert_close(square, best["weight"] @ best["weight"].T, rtol=1e-4, atol=1e-4)
    assert fit.history["param_sigma"].shape == (601,)
    assert math.isclose(em.step(*problem.args), -float(problem.log_evidence(best)), abs_tol=1e-9)


def test_an_exact_e_step_goes_with_a_gradient_m_step():
    problem = problems.linear_gaussian_full()
    em = EM(problem.model, exact_guide(problem), pyro.optim.Adam({"lr": 0.02}), e_step=ExactPosterior(problem))
    fit = em.run(*problem.args, max_iter=300, seed=0)
    theta = {n: v for n, v in fit.params.items() if n in problem.model_params}
    assert float(problem.log_evidence(theta)) > float(problem.log_evidence()) + 20.0
    assert set(em.optim.get_state()) == set(problem.model_params)


def test_em_with_gradient_steps_reaches_the_exact_maximum_of_the_bound():
    """With the posterior in the guide's family and its KL integrated, alternation climbs to the maximum likelihood."""
    problem = problems.linear_gaussian_full()
    loss = MonteCarloELBO(objective="elbo_analytic_kl", num_particles=8)
    em = EM(problem.model, problem.guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), loss)
    em.run(*problem.args, max_iter=400, seed=0)
    gap = problem.log_evidence(problem.maximum()) - problem.elbo(em.blocks.constrained())
    assert 0.0 < float(gap) < 0.5


# Blocks ---------------------------------------------------------------------------------------------------------


def hierarchical(x):
    """A model without parameters: one global, one local latent."""
    loc = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc.unsqueeze(-1) * torch.ones(2, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def test_a_model_without_parameters_is_split_into_local_and_global():
    guide = autoguide.AutoNormal(hierarchical)
    with pytest.raises(BlockError, match=r"a model without parameters.*local/global"):
        EM(hierarchical, guide, pyro.optim.Adam({"lr": 0.1})).step(X)
    em = EM(hierarchical, guide, pyro.optim.Adam({"lr": 0.1}), blocks="local/global")
    em.run(X, max_iter=3)
    assert set(em.blocks.leaves(MODEL)) == {"AutoNormal.locs.mu", "AutoNormal.scales.mu"}
    assert set(em.blocks.leaves(GUIDE)) == {"AutoNormal.locs.z", "AutoNormal.scales.z"}


def test_the_point_mass_of_a_global_latent_is_found_by_the_m_step():
    """EM for a posterior mode: the conjugate model's mode of mu is known."""
    guide = autoguide.AutoGuideList(hierarchical)
    guide.append(autoguide.AutoDelta(pyro.poutine.block(hierarchical, expose=["mu"])))
    guide.append(autoguide.AutoNormal(pyro.poutine.block(hierarchical, expose=["z"])))
    optim = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.99})
    em = EM(hierarchical, guide, optim, MonteCarloELBO(num_particles=16))
    fit = em.run(X, max_iter=400, seed=0)
    assert em.blocks.block_of("AutoGuideList.0.mu") == MODEL
    mode = X.sum() / 1.25 / (1 + X.numel() / 1.25)
    assert float(fit.params["AutoGuideList.0.mu"]) == pytest.approx(float(mode), abs=0.03)


def test_blocks_are_an_empty_table_before_the_first_step_and_print_after_it():
    problem = problems.linear_gaussian()
    em = EM(problem.model, problem.guide, OPTIMIZERS["Adam"])
    assert em.blocks.rows == ()
    em.step(*problem.args)
    assert {row.name: row.block for row in em.blocks.rows} == (
        dict.fromkeys(problem.guide_params, GUIDE) | dict.fromkeys(problem.model_params, MODEL)
    )
    assert "encoder_weight" in str(em.blocks)


def test_an_override_moves_a_parameter_to_the_other_half_step():
    problem = problems.linear_gaussian()
    em = EM(problem.model, problem.guide, OPTIMIZERS["Adam"], blocks={"sigma": "guide", "bias": "unused"})
    em.step(*problem.args)
    before = em.blocks.constrained()
    em.e_step.expect(em.engine, em.engine.state, *problem.args)
    after = em.blocks.constrained()
    moved = {n for n, v in after.items() if not torch.equal(v, before[n])}
    assert moved == {*problem.guide_params, "sigma"}
    assert "bias" not in em.optim.get_state()


# Posterior and half-steps ---------------------------------------------------------------------------------------


def test_the_posterior_is_the_guide_on_any_data():
    problem = problems.linear_gaussian()
    em = EM(problem.model, problem.guide, OPTIMIZERS["Adam"])
    em.step(*problem.args)
    before, generator = em.blocks.constrained(), torch.get_rng_state()
    posterior = em.posterior(problem.args[0][:3])
    torch.set_rng_state(generator)
    assert posterior.marginal("z").mean.shape == (3, 2)
    assert posterior.particles(5).log_p.shape == (5,)
    pyro.set_rng_seed(0)
    mean = posterior.expect(lambda values: values["z"], num_particles=4000)
    torch.testing.assert_close(mean, posterior.marginal("z").mean, rtol=0, atol=0.1)
    assert all(torch.equal(v, before[n]) for n, v in em.blocks.constrained().items())
    with pytest.raises(EmvaeError, match=r"'zz'.*'z'"):
        posterior.marginal("zz")


WRONG_STEPS = {
    "slot": ({"m_step": ExactPosterior(None)}, "ExactPosterior"),
    "class": ({"e_step": steps.Gradient}, "Gradient'>"),
    "number": ({"e_step": 3}, "int"),
    "name": ({"e_step": "gradeint"}, "'gradeint'.*'gradient'"),
}


@pytest.mark.parametrize("key", WRONG_STEPS)
def test_half_steps_that_do_not_fit_are_refused(key):
    options, observed = WRONG_STEPS[key]
    problem = problems.linear_gaussian()
    with pytest.raises(EmvaeError, match=observed):
        EM(problem.model, problem.guide, OPTIMIZERS["Adam"], **options)


NAMED = [entry.name for entry in entries("step") if not entry.traits.arguments]


@pytest.mark.parametrize("name", NAMED)
def test_half_steps_are_found_by_name_and_refuse_what_they_lack(name):
    step = create("step", name)
    problem = problems.linear_gaussian()
    EM(problem.model, problem.guide, OPTIMIZERS["Adam"], **{f"{slot.lower()}_step": name for slot in step.traits.slots})
    assert step.init(None, None) == {}
    with pytest.raises(StepError, match="LeastSquares"):
        LeastSquares().expect(None, None)
    with pytest.raises(StepError, match="Enumerated"):
        steps.Enumerated().maximise(None, None, None)


def test_gains_of_the_history_are_differences_of_the_objective():
    problem = problems.linear_gaussian()
    em = EM(problem.model, problem.guide, OPTIMIZERS["Adam"])
    history = em.run(*problem.args, max_iter=4, seed=0).history
    elbo = history["elbo"].values.reshape(4, 2)
    assert history["objective"].values.tolist() == elbo[:, 1].tolist()
    assert history["e_gain"].values == pytest.approx(elbo[:, 1] - elbo[:, 0])
    assert history["m_gain"].values[:-1] == pytest.approx(elbo[1:, 0] - elbo[:-1, 1])
    assert math.isnan(history["m_gain"].values[-1])
