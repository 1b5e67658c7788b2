"""Particles that are drawn together, coupled or weighted: their joint law, exact means, exact variances, errors."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from test_estimators import bernoulli_toy, moments
from torch.distributions import constraints

from pyro_emvae import MonteCarloELBO
from pyro_emvae._checks import EstimatorError
from pyro_emvae._registry import create
from pyro_emvae.estimators import RaoBlackwellTopK
from pyro_emvae.estimators.bernoulli import dirichlet, disagreement
from pyro_emvae.problems import Problem, exact_gradients
from pyro_emvae.problems._problem import ProblemTraits
from pyro_emvae.testing import Replay, assert_mean, exact_mean

F64 = torch.float64


def tensor(x: Any) -> torch.Tensor:
    return torch.tensor(x, dtype=F64)


VALUES = {
    "bits": tensor([[0, 0], [0, 1], [1, 0], [1, 1]]),
    "categorical": torch.arange(4),
    "one_hot": torch.eye(4, dtype=F64),
}


def latent(kind: str, logits: torch.Tensor) -> Any:
    if kind == "bits":
        return dist.Bernoulli(logits=logits).to_event(1)
    return (dist.Categorical if kind == "categorical" else dist.OneHotCategorical)(logits=logits)


def composite(kind: str, size: int, batch: int) -> Problem:
    r"""A global bit g and a local latent per datum, minibatches, masks on latents and on data, a scale on the data."""
    width = VALUES[kind].shape[-1] if kind == "bits" else 4
    x, masks = tensor([0.3, -1.2, 0.8])[:size], (torch.tensor([1, 0, 1]) > 0, torch.tensor([1, 1, 0]) > 0)
    params = {
        "prior": tensor([0.3, -0.5, 0.1, 0.2])[:width],
        "means": tensor([0.9, -1.1, 0.4, 0.2])[:width],
        "shift": tensor(0.7),
        "g_logit": tensor(0.4),
        "slopes": tensor([1.5, -0.8, 0.3, 0.6])[:width],
        "offset": tensor([-0.2, 0.4, 0.9, -0.6])[:width],
    }

    def mean(z: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        return means[z.long()] if kind == "categorical" else z @ means

    def model(x: torch.Tensor) -> None:
        p = {name: pyro.param(name, params[name].clone) for name in ("prior", "means", "shift")}
        g = pyro.sample("g", dist.Bernoulli(logits=tensor(-0.6)))
        with pyro.plate("data", size, subsample_size=batch) as i:
            with poutine.mask(mask=masks[0][i]):
                z = pyro.sample("z", latent(kind, p["prior"]))
            with poutine.mask(mask=masks[1][i]), poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(mean(z, p["means"]) + p["shift"] * g, 1.0), obs=x[i])

    def guide(x: torch.Tensor) -> None:
        p = {name: pyro.param(name, params[name].clone) for name in ("g_logit", "slopes", "offset")}
        pyro.sample("g", dist.Bernoulli(logits=p["g_logit"]))
        with pyro.plate("data", size, subsample_size=batch) as i, poutine.mask(mask=masks[0][i]):
            pyro.sample("z", latent(kind, p["offset"] + p["slopes"] * x[i, None]))

    def elbo(given: dict | None = None) -> torch.Tensor:
        p = {**params, **(given or {})}
        total = -torch.distributions.kl_divergence(
            dist.Bernoulli(logits=p["g_logit"]), dist.Bernoulli(logits=tensor(-0.6))
        )
        q, values = latent(kind, p["offset"] + p["slopes"] * x[:, None]), VALUES[kind]
        log_q = torch.stack([q.log_prob(v.expand(q.shape())) for v in values])
        log_p = torch.stack([latent(kind, p["prior"]).log_prob(v) for v in values])[:, None]
        total = total + (log_q.exp() * (log_p - log_q) * masks[0][:size]).sum()
        for g, weight in ((1.0, p["g_logit"].sigmoid()), (0.0, (-p["g_logit"]).sigmoid())):
            loc = mean(values, p["means"])[:, None] + p["shift"] * g
            term = 0.5 * dist.Normal(loc, 1.0).log_prob(x) * masks[1][:size]
            total = total + weight * (log_q.exp() * term).sum()
        return total

    return Problem(
        name=f"composite_{kind}",
        model=model,
        guide=guide,
        args=(x,),
        sites=("g", "z"),
        model_params=("prior", "means", "shift"),
        guide_params=("g_logit", "slopes", "offset"),
        params=MappingProxyType(params),
        constraints=MappingProxyType(dict.fromkeys(params, constraints.real)),
        max_plate_nesting=1,
        traits=ProblemTraits(support="discrete", reparameterised=False, subsampled=True, masked=True),
        elbo=elbo,
    )


COMPOSITE = [
    ("bits", 3, 2, 2, {"g": "disarm", "z": "disarm"}),
    ("bits", 3, 2, 2, {"g": "leave_one_out", "z": "arms"}),
    ("bits", 2, 1, 3, {"g": "arms", "z": "arms"}),
    ("bits", 2, 1, 4, {"g": "arms", "z": "disarm"}),
    ("bits", 2, 1, 2, {"g": "arms", "z": "arm"}),
    ("categorical", 3, 2, 2, {"g": "arms", "z": "rao_blackwell_topk"}),
    ("categorical", 2, 1, 3, {"g": "leave_one_out", "z": "rao_blackwell_topk"}),
    ("categorical", 2, 1, 4, {"g": "disarm", "z": RaoBlackwellTopK(rest=2)}),
    ("one_hot", 2, 1, 3, {"g": "score", "z": "rao_blackwell_topk"}),
    ("categorical", 3, 2, 2, {"g": "disarm", "z": "unordered_set"}),
    ("categorical", 2, 1, 3, {"g": "arms", "z": "unordered_set"}),
    ("one_hot", 2, 1, 4, {"g": "leave_one_out", "z": "unordered_set"}),
]


@pytest.mark.parametrize(("kind", "size", "batch", "num_particles", "estimators"), COMPOSITE, ids=str)
def test_plates_events_masks_scales_and_mixtures_are_exact(kind, size, batch, num_particles, estimators):
    """Every joint outcome of all particles and minibatches, with its joint probability."""
    problem = composite(kind, size, batch)
    mean, right = exact_mean(Replay(problem, estimators, num_particles)), exact_gradients(problem)
    for name, gradient in right.items():
        torch.testing.assert_close(
            mean.gradients[name], gradient, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


JOINT = [
    ("disarm", 2, dist.Bernoulli(logits=tensor([0.0, 0.4, -1.7, 3.0]))),
    ("disarm", 4, dist.Bernoulli(logits=tensor([0.6]))),
    ("arm", 2, dist.Bernoulli(logits=tensor([-0.9]))),
    ("arms", 3, dist.Bernoulli(logits=tensor([0.0, 0.4, -1.7, 3.0]))),
    ("arms", 5, dist.Bernoulli(logits=tensor([0.2, -1.0]))),
    ("rao_blackwell_topk", 3, dist.Categorical(logits=tensor([[0.1, 2.0, -0.4, 0.7], [3.0, 0.1, 0.2, 0.0]]))),
    (RaoBlackwellTopK(rest=2), 4, dist.Categorical(logits=tensor([[0.1, 2.0, -0.4, 0.7, 0.3]]))),
    ("unordered_set", 3, dist.Categorical(logits=tensor([[0.1, 2.0, -0.4, 0.7], [3.0, 0.1, 0.2, 0.0]]))),
    ("unordered_set", 2, dist.OneHotCategorical(logits=tensor([[0.1, 2.0, -0.4]]))),
]


@pytest.mark.parametrize(("estimator", "num_particles", "fn"), JOINT, ids=str)
def test_draws_have_the_joint_law_that_the_proofs_use(estimator, num_particles, fn):
    """Frequencies of all joint outcomes of all plate elements against `joint`, which sums to one."""
    part, fn = create("estimator", estimator), fn.expand((num_particles, *fn.batch_shape))
    plates, count = fn.batch_shape[1:].numel(), 40_000
    support = fn.enumerate_support(expand=False).reshape(-1, *fn.event_shape)
    tuples = torch.cartesian_prod(*[torch.arange(len(support))] * num_particles)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        drawn = torch.func.vmap(lambda _: part.draw(fn, num_particles).value, randomness="different")(
            torch.arange(count)
        )
    index = drawn.argmax(-1) if fn.event_shape else drawn.long()
    index = index.reshape(count, num_particles, plates)
    for plate in range(plates):
        rows = [support[t][:, None].expand(num_particles, plates, *fn.event_shape) for t in tuples]
        expected = torch.stack([part.joint(fn, row).reshape(-1)[plate].exp() for row in rows])
        assert float(expected.sum()) == pytest.approx(1.0, abs=1e-12)
        hit = (index[:, None, :, plate] == tuples).all(-1).to(F64)
        possible = expected > 0
        assert not hit[:, ~possible].any()
        often = expected > 0.01
        assert_mean(hit[:, often], expected[often], detect=0.05)


@pytest.mark.parametrize(("estimator", "rows", "uniform", "nodes"), [("disarm", 2, 1, 100_000), ("arms", 3, 3, 40)])
def test_copulas_by_grid_integration_of_the_uniform(monkeypatch, estimator, rows, uniform, nodes):
    """The share of a grid of uniform numbers that leads to each joint outcome is its probability by `joint`."""
    grid = (torch.arange(nodes, dtype=F64) + 0.5) / nodes
    grid = torch.cartesian_prod(*[grid] * uniform).reshape(-1, uniform).T
    part, logits = create("estimator", estimator), tensor([0.0, 0.4, -1.7, 2.0])
    monkeypatch.setattr(torch, "rand_like", lambda like: grid[..., None].expand(like.shape))
    drawn = part.draw(dist.Bernoulli(logits=logits).expand((rows, grid.shape[1], 4)), rows).value
    fn = dist.Bernoulli(logits=logits).expand((rows, 4))
    for outcome in torch.cartesian_prod(*[tensor([0.0, 1.0])] * rows):
        share = (drawn == outcome[:, None, None]).all(0).to(F64).mean(0)
        joint = part.joint(fn, outcome[:, None].expand(rows, 4)).exp()
        torch.testing.assert_close(share, joint, rtol=0, atol=2e-5 if uniform == 1 else 4e-3)


@pytest.mark.parametrize("estimator", ["disarm", "arms"])
@pytest.mark.parametrize("num_particles", [2, 4])
def test_each_particle_alone_is_distributed_as_the_site(estimator, num_particles):
    part = create("estimator", estimator)
    fn = dist.Bernoulli(logits=tensor([0.0, 0.4, -1.7, 3.0])).expand((num_particles, 4))
    outcomes = torch.cartesian_prod(*[tensor([0.0, 1.0])] * num_particles)
    joint = torch.stack([part.joint(fn, row[:, None].expand(num_particles, 4)).exp() for row in outcomes])
    for row in range(num_particles):
        torch.testing.assert_close((joint * outcomes[:, row, None]).sum(0), fn.mean[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [2, 3, 64, 1000])
def test_saturated_logits_have_finite_weights(rows, dtype):
    """The factor of the score lies in [1/2, 1], and goes to 1 where one outcome is all but sure."""
    logits = torch.tensor([-300.0, -80.0, -5.0, -1e-6, 0.0, 1e-6, 5.0, 80.0, 300.0], dtype=dtype)
    factor = disagreement(logits, rows)
    assert bool(((factor >= 0.5 - 1e-6) & (factor <= 1 + 1e-5)).all()), factor
    torch.testing.assert_close(factor, factor.flip(0), rtol=1e-5, atol=0)
    assert float(factor[0]) == pytest.approx(1.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = dirichlet(logits.expand(rows, -1))
    assert drawn.dtype == dtype and not drawn[:, :2].any() and drawn[:, -2:].all()


def test_arm_given_the_draws_is_disarm():
    noise, _ = Replay(bernoulli_toy(0.45, 2.0), "arm", 4).outcomes(tensor([[0.2, 0.7], [0.8, 0.3]]), tensor([1, 1]))
    arm = Replay(bernoulli_toy(0.45, 2.0), "arm", 4).gradients(noise)[0]["phi"].reshape(16, 2).mean(1)
    noise, _ = Replay(bernoulli_toy(0.45, 2.0), "disarm", 4).outcomes(torch.zeros(1, 0), tensor([1]))
    gradients, probability = Replay(bernoulli_toy(0.45, 2.0), "disarm", 4).gradients(noise)
    possible = probability > 0
    torch.testing.assert_close(arm[possible], gradients["phi"][possible], rtol=1e-12, atol=1e-15)
    assert possible.sum() == 9


@pytest.mark.parametrize("num_particles", [2, 4])
def test_disarm_has_no_variance_for_one_fair_coin(num_particles):
    assert moments(Replay(bernoulli_toy(0.3, 0.0), "disarm", num_particles))[1] < 1e-30
    assert moments(Replay(bernoulli_toy(0.3, 0.0), "leave_one_out", num_particles))[1] > 1e-6


def test_of_two_arms_is_disarm():
    noise, _ = Replay(bernoulli_toy(0.45, 2.0), "arms", 2).outcomes(torch.zeros(1, 0), tensor([1]))
    one, two = (Replay(bernoulli_toy(0.45, 2.0), e, 2).gradients(noise)[0]["phi"] for e in ("arms", "disarm"))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", ["rao_blackwell_topk", "unordered_set"])
def test_as_many_particles_as_values_are_exact(estimator):
    """No variance, whatever is drawn."""
    problem = composite("categorical", 2, 2)
    fixed = MonteCarloELBO(4, 1, vectorize_particles=True, estimator={"z": estimator})

    def guide(x: torch.Tensor) -> None:
        pyro.sample("g", dist.Delta(tensor(1.0)))
        logits = pyro.param("logits", tensor([[0.3, -1.0, 0.2, 1.5], [2.0, 0.1, 0.4, -0.3]]).clone)
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Categorical(logits=logits))

    found = []
    for seed in (0, 1):
        pyro.set_rng_seed(seed)
        loss = fixed.loss_and_grads(problem.model, guide, *problem.args)
        leaf = pyro.param("logits").unconstrained()
        found.append((loss, leaf.grad))
        leaf.grad = None
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-10, atol=1e-12)
    assert float(found[0][1].abs().max()) > 0.01


def upstream_guide() -> None:
    a = pyro.sample("a", dist.Bernoulli(pyro.param("p", tensor(0.3), constraint=constraints.unit_interval)))
    pyro.sample("b", dist.Bernoulli(logits=a - 0.5))
    pyro.sample("c", dist.Categorical(logits=torch.stack([a, 1 - a, 0.5 * a], -1)))


def upstream_model() -> None:
    pyro.sample("a", dist.Bernoulli(tensor(0.5)))
    pyro.sample("b", dist.Bernoulli(tensor(0.5)))
    pyro.sample("c", dist.Categorical(torch.ones(3, dtype=F64)))


def flat_guide() -> None:
    with pyro.plate("two", 2):
        pyro.sample("c", dist.Categorical(logits=pyro.param("l", torch.zeros(3, dtype=F64))))
    pyro.sample("d", dist.Categorical(logits=pyro.param("m", torch.zeros(3, dtype=F64))))
    pyro.sample("e", dist.Categorical(logits=pyro.param("n", torch.zeros(2, 3, dtype=F64))).to_event(1))
    pyro.sample("r", dist.RelaxedBernoulli(tensor(0.5), logits=pyro.param("o", torch.zeros((), dtype=F64))))
    pyro.sample("b", dist.Bernoulli(logits=pyro.param("q", torch.zeros((), dtype=F64))))


def flat_model() -> None:
    with pyro.plate("two", 2):
        c = pyro.sample("c", dist.Categorical(torch.ones(3, dtype=F64)))
    pyro.sample("d", dist.Categorical(torch.ones(3, dtype=F64)))
    pyro.sample("e", dist.Categorical(torch.ones(2, 3, dtype=F64)).to_event(1))
    pyro.sample("r", dist.RelaxedBernoulli(tensor(0.5), logits=tensor(0.0)))
    pyro.sample("b", dist.Bernoulli(tensor(0.5)))
    pyro.factor("f", c.to(F64).sum(-1, keepdim=True))


PAIR, FLAT = (upstream_model, upstream_guide), (flat_model, flat_guide)
REFUSED = {
    "arms on upstream": (PAIR, {"b": "arms"}, 2, "depends on the draw of 'a'"),
    "disarm on upstream": (PAIR, {"b": "disarm"}, 2, "depends on the draw of 'a'"),
    "top-k on upstream": (PAIR, {"c": "rao_blackwell_topk"}, 2, "depends on the draw of 'a'"),
    "unordered set on upstream": (PAIR, {"c": "unordered_set"}, 2, "depends on the draw of 'a'"),
    "odd": (FLAT, {"b": "disarm"}, 3, "pairs, and their number is odd"),
    "odd arm": (FLAT, {"b": "arm"}, 3, "pairs, and their number is odd"),
    "one particle": (FLAT, {"b": "arms"}, 1, "num_particles=1"),
    "categorical by arms": (FLAT, {"d": "arms"}, 2, r"Categorical\(batch_shape"),
    "relaxed by disarm": (FLAT, {"r": "disarm"}, 2, r"RelaxedBernoulli\(batch_shape"),
    "bernoulli by top-k": (FLAT, {"b": "rao_blackwell_topk"}, 2, r"Bernoulli\(batch_shape"),
    "several in an event": (FLAT, {"e": "rao_blackwell_topk"}, 2, "an event of this site holds several"),
    "all from the rest": (FLAT, {"d": RaoBlackwellTopK(rest=2)}, 2, "2 of the 2 particles"),
    "too few values": (FLAT, {"d": "unordered_set"}, 4, "its 4 particles have different values, and there are 3"),
    "two weighted": (
        FLAT,
        {"d": "unordered_set", "c": "rao_blackwell_topk"},
        2,
        "weighted draws of '. ' too|weighted draws",
    ),
    "outside the plate": (FLAT, {"c": "unordered_set"}, 2, "site 'f' outside plate 'two'"),
}


@pytest.mark.parametrize(("pair", "estimators", "num_particles", "observed"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_with_something_that_does(pair, estimators, num_particles, observed):
    loss = MonteCarloELBO(num_particles, 1, vectorize_particles=True, estimator=estimators)
    with pytest.raises(EstimatorError, match=observed) as caught:
        loss.loss_and_grads(*pair)
    assert "stimator=" in str(caught.value) or "num_particles=" in str(caught.value)
    assert all(pyro.param(name).unconstrained().grad is None for name in pyro.get_param_store())


def test_rest_has_to_be_a_number_of_rows():
    with pytest.raises(EstimatorError, match="rest=0"):
        RaoBlackwellTopK(rest=0)


def test_particles_run_one_by_one_are_not_drawn_together():
    loss = MonteCarloELBO(2, 1, vectorize_particles=False, estimator={"b": "arms"})
    with pytest.raises(EstimatorError, match="one by one"):
        loss.loss_and_grads(*FLAT)


def one_site(kind: str, phi: torch.Tensor, f: Any) -> Problem:
    """One site whose prior is the guide's distribution, held, and a function f of its value."""
    make = (
        (lambda p: dist.Bernoulli(logits=p).to_event(1)) if kind == "bits" else (lambda p: dist.Categorical(logits=p))
    )

    def model() -> None:
        pyro.factor("f", f(pyro.sample("z", make(phi))))

    def guide() -> None:
        pyro.sample("z", make(pyro.param("phi", phi.clone)))

    return Problem(
        name=f"one_site_{kind}",
        model=model,
        guide=guide,
        args=(),
        sites=("z",),
        model_params=(),
        guide_params=("phi",),
        params=MappingProxyType({"phi": phi}),
        constraints=MappingProxyType({"phi": constraints.real}),
        max_plate_nesting=0,
        traits=ProblemTraits(support="discrete", reparameterised=False),
    )


def exact_variance(replay: Replay) -> float:
    """The variance per coordinate over all outcomes."""
    noise, weights = replay.outcomes(torch.zeros(1, 0), tensor([1.0]))
    gradients, probability = replay.gradients(noise)
    p = weights * probability
    g, p = gradients["phi"][p > 0], p[p > 0][:, None]
    mean = (p * g).sum(0)
    return float((p * (g - mean) ** 2).sum(0).mean())


@pytest.mark.parametrize("num_particles", [2, 3])
@pytest.mark.parametrize(("scale", "seed"), [(0.3, 0), (0.3, 1), (3.0, 0), (3.0, 1)])
def test_five_categories_at_equal_evaluations(scale, seed, num_particles):
    """A flat or peaked q: the learned coefficient keeps to the better of baseline and none; both beat leave-one-out."""
    generator = torch.Generator().manual_seed(seed)
    phi, values = (scale**i * torch.randn(5, generator=generator, dtype=F64) for i in (1, 0))
    problem = one_site("categorical", phi, lambda z: values[z])
    replay, state = Replay(problem, "rao_blackwell_topk", num_particles), None
    for step in range(120):
        with torch.random.fork_rng():
            torch.manual_seed(step)
            state = replay.evaluate({}, state).state

    def held(a: float) -> dict:
        return {"z": {"baseline|phi": tensor([-a, 1.0, 1.0])}}  # covariance, square, weight

    learned, whole, none = (
        exact_variance(Replay(problem, "rao_blackwell_topk", num_particles, s)) for s in (state, held(0.0), held(-1.0))
    )
    loo, unordered = (exact_variance(Replay(problem, e, num_particles)) for e in ("leave_one_out", "unordered_set"))
    assert unordered < 0.9 * loo
    assert learned < 0.75 * loo
    assert learned < 1.05 * whole and (learned < 1.25 * none or learned < 1e-3 * loo)


@pytest.mark.slow
def test_twenty_bits_at_equal_evaluations(record_result):
    """Bernoulli sites under a Gaussian likelihood: arms never worse, disarm only at two, leave-one-out from four on."""
    for spread in (1.0, 4.0):
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(20, 10, generator=generator, dtype=F64) / 20**0.5
        phi = (2 * torch.rand(20, generator=generator, dtype=F64) - 1) * spread
        y = (torch.rand(20, generator=generator, dtype=F64) < 0.5).to(F64) @ mixing
        y = y + torch.randn(10, generator=generator, dtype=F64)
        problem = one_site("bits", phi, lambda z, m=mixing, y=y: -0.5 * ((y - z @ m) ** 2).sum(-1))
        for num_particles in (2, 4, 8):
            found = {}
            for name in ("leave_one_out", "disarm", "arms"):
                replay = Replay(problem, name, num_particles)
                gradients, _ = replay.gradients(replay.draws(40_000, seed=1))
                found[name] = float(gradients["phi"].var(0).mean())
            figures = ", ".join(f"{name} {v:.3g}" for name, v in found.items())
            record_result(f"gradient variance, 20 bits, logits within {spread:g}, K = {num_particles}", figures)
            loo, disarm, arms = found.values()
            assert 1.0 < loo / arms < 1.3
            assert (abs(disarm / arms - 1) < 0.04) if num_particles == 2 else (disarm > 1.2 * arms and disarm > loo)
