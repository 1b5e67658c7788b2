"""Sleep and reweighted wake-sleep: gradients by hand and by enumeration, what they refuse, what they leave alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyro_emvae import EM, steps
from pyro_emvae._checks import EmvaeError, NonFiniteError, StepError
from pyro_emvae.parameters import GUIDE, MODEL
from pyro_emvae.particles import find_places
from pyro_emvae.steps.wake_sleep import Wake
from pyro_emvae.testing import check_step

N, B, K = 6, 2, 3
X = torch.tensor([0.7, -1.1], dtype=torch.float64)
INDEX = torch.tensor([4, 1])


def t(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def model(x: Tensor) -> None:
    prior, loc = pyro.param("prior", lambda: t(0.3)), pyro.param("loc", lambda: t(-0.4, 0.9))
    with pyro.plate("data", N, subsample=INDEX):
        z = pyro.sample("z", dist.Bernoulli(logits=prior))
        pyro.sample("x", dist.Normal(loc[z.long()], 0.8), obs=x)


def guide(x: Tensor) -> None:
    weight, bias = pyro.param("weight", lambda: t(0.5)), pyro.param("bias", lambda: t(-0.2))
    with pyro.plate("data", N, subsample=INDEX):
        pyro.sample("z", dist.Bernoulli(logits=weight * x + bias))


class Outcome(Messenger):
    """Let z take given values (K, B) wherever it is drawn."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = z

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] == "z" and msg["value"] is None:
            msg["value"], msg["done"] = self.z, True


def log_q(weight: Tensor, bias: Tensor, z: Tensor) -> Tensor:
    logits = weight * X + bias
    return torch.where(z > 0, logsigmoid(logits), logsigmoid(-logits))


def log_p(prior: Tensor, loc: Tensor, z: Tensor) -> Tensor:
    return torch.where(z > 0, logsigmoid(prior), logsigmoid(-prior)) + dist.Normal(loc[z.long()], 0.8).log_prob(X)


def outcomes() -> list[Tensor]:
    return [t(*z).reshape(K, B) for z in itertools.product((0.0, 1.0), repeat=K * B)]


def half_step_gradients(step: steps.HalfStep, block: str, draws: list[Tensor]) -> dict[str, Tensor]:
    """Return the expectation over all outcomes of what a half-step adds to the block at learning rate 1."""
    pyro.clear_param_store()
    rates = {GUIDE: 1.0 if block == GUIDE else 0.0, MODEL: 1.0 if block == MODEL else 0.0}
    optim = {name: pyro.optim.SGD({"lr": rate}) for name, rate in rates.items()}
    em = EM(model, guide, optim, e_step=step)
    em.engine.setup((X,), {})
    step.importance.look(model, (X,), {}, guide)  # which tries how the model may be run
    leaves = em.engine.parameters.leaves()
    start = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    total = {name: torch.zeros_like(leaf) for name, leaf in start.items()}
    for z in draws:
        with Outcome(z):
            em.step(X)
        probability = log_q(start["weight"], start["bias"], z).sum().exp()
        for name, leaf in leaves.items():
            total[name] += probability * (leaf.detach() - start[name])
            with torch.no_grad():
                leaf.copy_(start[name])
    return total


def assert_wake_phi(step: steps.HalfStep) -> None:
    """The expected gradient of wake-phi is that of per-datum weights, scaled by N/B."""
    found = half_step_gradients(step, GUIDE, outcomes())
    weight, bias = t(0.5).requires_grad_(), t(-0.2).requires_grad_()
    expected = t(0.0)
    for z in outcomes():
        terms = log_q(weight, bias, z)
        w = (log_p(t(0.3), t(-0.4, 0.9), z) - terms).detach().softmax(0)
        expected = expected + terms.sum().exp().detach() * N / B * (w * terms).sum()
    for name, gradient in zip(("weight", "bias"), torch.autograd.grad(expected, (weight, bias)), strict=True):
        assert torch.allclose(found[name], gradient, rtol=1e-10, atol=0), (
            f"{step}: the mean wake-phi gradient of {name!r} over all {len(outcomes())} outcomes: "
            f"observed {found[name]}, expected {gradient}"
        )


def test_wake_phi_is_the_gradient_of_weights_per_datum():
    assert_wake_phi(steps.WakeSleep(num_particles=K))


def test_wake_theta_is_the_gradient_of_the_importance_weighted_bound_per_datum():
    """The M-step after it: exact expectation of the bound, each datum with its own logarithm, scaled by N/B."""
    found = half_step_gradients(steps.WakeSleep(num_particles=K), MODEL, outcomes())
    prior, loc = t(0.3).requires_grad_(), t(-0.4, 0.9).requires_grad_()
    bound = t(0.0)
    for z in outcomes():
        terms = log_q(t(0.5), t(-0.2), z)
        log_weights = log_p(prior, loc, z) - terms
        bound = bound + terms.sum().exp() * N / B * (log_weights.logsumexp(0) - t(float(K)).log()).sum()
    for name, gradient in zip(("prior", "loc"), torch.autograd.grad(bound, (prior, loc)), strict=True):
        assert torch.allclose(found[name], gradient, rtol=1e-10, atol=0)


def test_the_loss_of_an_iteration_is_the_bound():
    em = EM(model, guide, pyro.optim.SGD({"lr": 1e-12}), e_step=steps.WakeSleep(num_particles=K))
    em.e_step.importance.look(model, (X,), {}, guide)
    z = outcomes()[21]
    with Outcome(z):
        loss = em.step(X)
    log_weights = log_p(t(0.3), t(-0.4, 0.9), z) - log_q(t(0.5), t(-0.2), z)
    assert -loss == pytest.approx(float(N / B * (log_weights.logsumexp(0) - t(float(K)).log()).sum()), rel=1e-9)


def test_one_particle_is_plain_wake_sleep():
    """With K = 1 all weights are one: wake-phi has gradient zero in expectation, wake-theta that of the ELBO."""
    found = half_step_gradients(steps.WakeSleep(num_particles=1), GUIDE, [t(a, b) for a in (0, 1) for b in (0, 1)])
    assert all(torch.allclose(g, torch.zeros_like(g), atol=1e-14) for g in found.values())


# Sleep --------------------------------------------------------------------------------------------------------------


def dream(seed: int) -> tuple[Tensor, Tensor]:
    """Draw z and x as the model does, by hand."""
    torch.manual_seed(seed)
    z = torch.bernoulli(torch.sigmoid(t(0.3)).expand(B))
    return z, torch.normal(t(-0.4, 0.9)[z.long()], t(0.8).expand(B))


def sleep_gradient(seed: int) -> tuple[Tensor, ...]:
    z, x = dream(seed)
    weight, bias = t(0.5).requires_grad_(), t(-0.2).requires_grad_()
    logits = weight * x + bias
    objective = N / B * torch.where(z > 0, logsigmoid(logits), logsigmoid(-logits)).sum()
    return torch.autograd.grad(objective, (weight, bias))


@pytest.mark.parametrize("backend", ["eager", "graph"])
def test_sleep_is_the_gradient_by_hand_on_the_same_dreams(backend):
    optim = {GUIDE: pyro.optim.SGD({"lr": 1.0}), MODEL: pyro.optim.SGD({"lr": 0.0})}
    em = EM(model, guide, optim, e_step=steps.Sleep(), backend=backend)
    em.engine.setup((X,), {})
    leaves = em.engine.parameters.leaves(GUIDE)
    for seed in range(4):
        before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        torch.manual_seed(seed)
        em.step(X)
        for name, gradient in zip(("weight", "bias"), sleep_gradient(seed), strict=True):
            assert torch.allclose(leaves[name] - before[name], gradient, rtol=1e-10, atol=0)
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(before[name])


class Proposals(Outcome):
    """Let z take given values where it is proposed, under the plate of particles, and not where it is dreamt."""

    def _pyro_sample(self, msg: dict) -> None:
        if len(msg["cond_indep_stack"]) > 1:
            super()._pyro_sample(msg)


def test_insomnia_mixes_the_two():
    leaves = [pyro.param(name, t(value)).unconstrained() for name, value in (("weight", 0.5), ("bias", -0.2))]
    found = {}
    for insomnia in (0.0, 0.25, 1.0):
        step = steps.WakeSleep(num_particles=K, insomnia=insomnia)
        loss = Wake(step.importance.look(model, (X,), {}, guide), K, insomnia, step.dream)
        torch.manual_seed(3)
        with Proposals(outcomes()[37]):
            objective = loss.evaluate(model, guide, (X,), {}).objective
        found[insomnia] = torch.stack(torch.autograd.grad(objective, leaves))
    sleep = torch.stack(sleep_gradient(3))
    assert torch.allclose(found[0.0], sleep, rtol=1e-10)
    assert torch.allclose(found[0.25], 0.25 * found[1.0] + 0.75 * sleep, rtol=1e-10)
    assert not torch.allclose(found[1.0], sleep, rtol=0.1)


# Which argument the data are ----------------------------------------------------------------------------------------


def seen_by_guide(step: steps.Sleep, model: Callable, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
    """Return the arguments that the guide is given in a dream."""
    found: dict[str, Tensor] = {}

    def guide(*args: Tensor, **kwargs: Tensor) -> None:
        found.update({str(i): x for i, x in enumerate(args)} | kwargs)
        pyro.sample("z", dist.Normal(pyro.param("loc", t(0.0)), 1.0))

    step.dream.evaluate(model, guide, args, kwargs)
    return found


def test_the_argument_is_found_by_identity():
    def model(y: Tensor, x: Tensor, *, label: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(t(100.0), 1.0))
        pyro.sample("x", dist.Normal(z, 0.01).expand([3]).to_event(1), obs=x)
        pyro.sample("label", dist.Normal(-z, 0.01), obs=label)

    y, x, label = torch.zeros(3).double(), torch.zeros(3).double(), t(0.0)
    found = seen_by_guide(steps.Sleep(), model, y, x, label=label)
    assert found["0"] is y and float(found["1"].min()) > 90 and float(found["label"]) < -90
    assert float(x.abs().max()) == 0


def test_rows_that_a_plate_draws_are_replaced():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(t(50.0), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 0.01).expand([2, 3]).to_event(1), obs=x[index])

    seen = []

    def guide(x: Tensor) -> None:
        scale = pyro.param("scale", t(1.0))
        with pyro.plate("data", len(x), subsample_size=2) as index:
            seen.append((x, index))
            pyro.sample("z", dist.Normal(x[index].mean(-1), scale))

    x = torch.randn(7, 3, dtype=torch.float64)
    evaluation = steps.Sleep().dream.evaluate(model, guide, (x,), {})
    dreamt, index = seen[0]
    assert float(dreamt[index].min()) > 40
    rest = [i for i in range(7) if i not in index.tolist()]
    assert torch.equal(dreamt[rest], x[rest]) and len(index) == 2
    z = evaluation.particles.guide["z"].value
    assert float((z - dreamt[index].mean(-1)).abs().max()) < 0.1, "the guide scores the z of these rows"
    expected = 3.5 * dist.Normal(dreamt[index].mean(-1), 1.0).log_prob(z).sum()
    assert evaluation.objective.item() == pytest.approx(float(expected))


def teacher_forced(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
    before = torch.cat([x.new_zeros(1), x[:-1]])
    pyro.sample("x", dist.Normal(before + z, 1.0).to_event(1), obs=x)


def with_a_factor(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
    pyro.factor("bonus", -(z**2))
    pyro.sample("x", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=x)


def observed_in_part(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0).expand([2]).to_event(1), obs=x[:2])


def observed_twice(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
    for name in ("x", "y"):
        pyro.sample(name, dist.Normal(z, 1.0).expand([3]).to_event(1), obs=x)


def z_guide(*args: Tensor) -> None:
    pyro.sample("z", dist.Normal(args[0].mean() * pyro.param("w", t(1.0)), 1.0))


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (teacher_forced, "site 'x': got a density that changes when its data are replaced"),
        (with_a_factor, "site 'bonus': got a factor"),
        (observed_in_part, "site 'x': got a value that is no argument"),
        (observed_twice, "site 'x': got an argument that several sites observe"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_cannot_be_dreamt_asks_for_a_program(model, got):
    x = torch.randn(3, dtype=torch.float64)
    with pytest.raises(StepError, match=f"`Sleep` cannot simulate {got}.*Write simulate=program"):
        steps.Sleep().dream.evaluate(model, z_guide, (x,), {})


def test_two_arguments_that_are_one_tensor_are_refused():
    def model(x: Tensor, y: Tensor) -> None:
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(t(0.0), 1.0)), 1.0).expand([3]).to_event(1), obs=x)

    x = torch.randn(3, dtype=torch.float64)
    with pytest.raises(StepError, match="got 2 arguments that are its observed value"):
        steps.Sleep().dream.evaluate(model, z_guide, (x, x), {})


@pytest.mark.parametrize("form", ["one", "tuple", "dict"])
def test_a_program_of_one_s_own(form):
    """The teacher-forced model, simulated step by step."""

    def program(x: Tensor, scale: Tensor) -> object:
        z = pyro.sample("z", dist.Normal(t(60.0), 1.0))
        y = torch.cumsum(z + torch.randn(3, dtype=torch.float64), 0)
        return {"one": y, "tuple": (y, scale), "dict": {"x": y}}[form]

    def model(x: Tensor, scale: Tensor) -> None:
        teacher_forced(x)

    def guide(x: Tensor, scale: Tensor) -> None:
        pyro.sample("z", dist.Normal(x[-1] / 3 * pyro.param("w", t(1.0)), scale))

    given = (torch.zeros(3).double(), t(2.0))
    args, kwargs = ((), {"x": given[0], "scale": given[1]}) if form == "dict" else (given, {})
    evaluation = steps.Sleep(simulate=program).dream.evaluate(model, guide, args, kwargs)
    site = evaluation.particles.guide["z"]
    assert float(site.value) > 50 and site.fn.loc.item() > 50 and float(site.fn.scale) == 2.0


def test_a_program_that_returns_nothing_is_refused():
    def program(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(t(0.0), 1.0))

    with pytest.raises(StepError, match="got NoneType from simulate= for 1 positional arguments"):
        steps.Sleep(simulate=program).dream.evaluate(teacher_forced, z_guide, (torch.zeros(3).double(),), {})


def test_auxiliary_sites_are_refused():
    guide = pyro.infer.autoguide.AutoNormal(model_of_real)
    with pytest.raises(StepError, match="cannot score site 'z_unconstrained' of the guide"):
        steps.Sleep().dream.evaluate(model_of_real, guide, (torch.randn(3).double(),), {})


def model_of_real(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: steps.WakeSleep(insomnia=1.5), "1.5"),
        (lambda: steps.WakeSleep(insomnia=True), "True"),
        (lambda: steps.WakeSleep(num_particles=0), "0"),
        (lambda: steps.Sleep(num_steps=0), "0"),
        (lambda: steps.Sleep(num_particles=-2), "-2"),
        (lambda: steps.Sleep(simulate="x"), "'x'"),
    ],
)
def test_arguments_out_of_range(make, got):
    with pytest.raises(EmvaeError, match=f"got {got}"):
        make()


# What stays ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:particles are run one by one")
@pytest.mark.parametrize("step", [steps.Sleep(), steps.WakeSleep(insomnia=0.5, num_particles=3)], ids=repr)
def test_the_model_stays(step):
    check_step(step, "E", num_steps=60)


def test_nothing_has_changed_after_weights_that_are_not_finite():
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                pyro.factor("none", torch.full((len(x),), -torch.inf))
                pyro.sample("x", dist.Normal(self.net(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("w", torch.tensor(0.5)) * x, 1.0))

    model, x = Decoder(), torch.randn(4)
    em = EM(model, guide, pyro.optim.Adam({"lr": 0.1}), e_step=steps.WakeSleep(num_particles=3))
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(NonFiniteError, match="3 weights that are all zero at datum 0"):
        em.step(x)
    assert pyro.param("w").item() == 0.5
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_posterior_is_weighted_draws_of_the_guide():
    step = steps.WakeSleep(num_particles=4)
    em = EM(model, guide, pyro.optim.SGD({"lr": 0.1}), e_step=step)
    em.step(X)
    support = em.posterior(X).support(1)
    assert support.values["z"].shape == (4, B) and support.scale == N / B
    assert torch.allclose(support.log_weights.logsumexp(0), torch.zeros(B).double(), atol=1e-12)


def test_values_that_reparam_computes_are_not_simulated():
    """`LocScaleReparam` leaves an observed point mass of the latent; the data alone are put in place of the batch."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.ones(()), 2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    moved = poutine.reparam(model, {"z": LocScaleReparam(0.0)})
    places = find_places(moved, (torch.zeros(3),), {})
    assert [place.site for place in places] == ["x"]
