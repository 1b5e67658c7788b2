r"""The Monte Carlo E-step: kernels, samplers against exact posteriors, chains by datum, with any M-step, bad input."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from torch import Tensor, nn

from pyro_emvae import EM, elbo, kernels, log_evidence, problems, steps
from pyro_emvae._checks import EmvaeError, NonFiniteError, StepError
from pyro_emvae.posterior import SamplesPosterior
from pyro_emvae.steps import MonteCarlo, samplers
from pyro_emvae.testing import assert_mean

ADAM = pyro.optim.Adam({"lr": 0.02})
NONE = {"prior": {}, "importance": {}, "hmc": {"num_warmup": 2}, "nuts": {"num_warmup": 2}, "gibbs": {"num_warmup": 2}}


def expect(em: EM, *args, **kwargs):
    """Make the E-step alone, and keep its state."""
    em.engine.setup(args, kwargs)
    state = em._initial(em.engine.state, args, kwargs)
    state, posterior, info = em.e_step.expect(em.engine, state, *args, **kwargs)
    em.engine.steps = state.steps
    return posterior, info


def full(problem, e_step, guide=None, **options) -> EM:
    options = {"optim": ADAM} | options
    return EM(problem.model, guide, e_step=e_step, **options)


# Kernels ------------------------------------------------------------------------------------------------------------


def gaussian(scale: Tensor):
    def density(u):
        return -0.5 * (u / scale).square().sum(-1), -u / scale**2

    return density


def test_leapfrog_is_reversible_and_of_second_order():
    torch.manual_seed(0)
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64)
    density, u, r = gaussian(scale), *torch.randn(2, 7, 2, dtype=torch.float64)
    start = kernels.Point(u, *density(u))
    errors = []
    for step, count in ((0.1, 10), (0.05, 20)):
        point, momentum = kernels.leapfrog(density, start, r, torch.tensor(step), count)
        back, _ = kernels.leapfrog(density, point, -momentum, torch.tensor(step), count)
        torch.testing.assert_close(back.position, u, rtol=1e-10, atol=1e-10)
        exact = u * torch.cos(1 / scale) + r * scale * torch.sin(1 / scale)
        errors.append(float((point.position - exact).abs().max()))
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_hmc_moves_leave_the_density_invariant_and_a_wrong_accept_does_not():
    """From exact draws, of which every chain has a scale of its own, with a step size that rejects often."""
    torch.manual_seed(0)
    scale = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    density = gaussian(scale.unsqueeze(-1))
    exact = scale.unsqueeze(-1) * torch.randn(40_000, 3, 1, dtype=torch.float64)
    point = kernels.Point(exact, *density(exact))
    for _ in range(5):
        point, acceptance = kernels.hmc(density, point, 1.6 * scale, 3)
    assert acceptance.shape == (40_000, 3) and 0.3 < float(acceptance.mean()) < 0.9
    u = point.position.squeeze(-1) / scale
    assert_mean(torch.stack([u, u.square() - 1, u.abs() - math.sqrt(2 / math.pi)], -1), 0.0, detect=0.06)
    always = kernels.Point(exact, *density(exact))
    for _ in range(5):
        step = 1.6 * scale.expand(40_000, 3)
        always, _ = kernels.leapfrog(density, always, torch.randn_like(exact), step, 3)
    with pytest.raises(AssertionError):
        assert_mean((always.position.squeeze(-1) / scale).abs(), math.sqrt(2 / math.pi), detect=0.1)


def test_each_chain_is_accepted_by_itself():
    torch.manual_seed(0)
    old = kernels.Point(torch.zeros(1000, 2, 1), *torch.zeros(2, 1000, 2))
    new = kernels.Point(torch.ones(1000, 2, 1), *torch.ones(2, 1000, 2))
    ratio = torch.tensor([math.log(0.3), 5.0]).expand(1000, 2)
    moved = kernels.metropolis(old, new, ratio).point
    assert torch.equal(moved.position[..., 0], moved.log_density)
    assert_mean(moved.log_density[:, 0], 0.3, detect=0.15)
    assert bool((moved.log_density[:, 1] == 1).all())


def test_step_sizes_come_to_the_target_acceptance_for_each_unit():
    torch.manual_seed(0)
    scale = torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
    density = gaussian(scale.unsqueeze(-1))
    u = scale.unsqueeze(-1) * torch.randn(20, 3, 1, dtype=torch.float64)
    point, state = kernels.Point(u, *density(u)), kernels.start_averaging(torch.ones(3, dtype=torch.float64))
    for _ in range(150):
        point, acceptance = kernels.hmc(density, point, state.log_step.exp(), 5)
        state = kernels.adapt(state, acceptance.mean(0), 0.8)
    found = []
    for _ in range(100):
        point, acceptance = kernels.hmc(density, point, state.log_average.exp(), 5)
        found.append(acceptance.mean(0))
    torch.testing.assert_close(torch.stack(found).mean(0), torch.full((3,), 0.8).double(), rtol=0, atol=0.1)


# Weights ------------------------------------------------------------------------------------------------------------


def exact_guide(problem):
    theta = problem.params | problem.exact_guide()

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = nn.functional.linear(x, theta["encoder_weight"], theta["encoder_bias"])
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=theta["scale_tril"]))

    return guide


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exact_guide_has_equal_weights_and_the_exact_evidence(dtype):
    problem = problems.linear_gaussian_full(dtype=dtype)
    em = full(problem, MonteCarlo("importance", 50), exact_guide(problem))
    posterior, info = expect(em, *problem.args)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(
        posterior.support().log_weights.exp(), torch.full((50, 12), 0.02, dtype=dtype), rtol=tolerance, atol=0
    )
    assert -info.loss == pytest.approx(float(problem.log_evidence()), rel=tolerance)
    torch.testing.assert_close(info.ess, torch.full((12,), 50.0, dtype=dtype), rtol=tolerance, atol=0)
    assert info.khat.shape == (12,) and posterior.kind == "importance"
    mean = posterior.expect(lambda values: values["z"])
    torch.testing.assert_close(mean, posterior.support().values["z"].mean(0), rtol=tolerance, atol=tolerance)


def test_the_objective_with_weights_is_the_evidence_that_they_estimate():
    """Minus the M-step's loss at the old theta: E[log p] plus the entropy that makes it the same number."""
    problem = problems.linear_gaussian_full()
    em = full(problem, MonteCarlo("importance", 20), problem.guide)
    posterior, info = expect(em, *problem.args)
    q = float(posterior.expected_log_joint().detach())
    assert q + posterior.entropy == pytest.approx(posterior.log_evidence, rel=1e-10)
    assert info.loss == -posterior.log_evidence


def probit(x: Tensor) -> None:
    """One latent per datum, no conjugacy; the posterior by quadrature."""
    shift = pyro.param("shift", torch.tensor(0.3, dtype=torch.float64))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("x", dist.Bernoulli(logits=2.0 * z + shift), obs=x)


BITS = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)


def quadrature() -> tuple[Tensor, Tensor, Tensor]:
    """Posterior mean and second moment of z, and the evidence, per datum."""
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64).unsqueeze(-1)
    joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Bernoulli(logits=2.0 * z + 0.3).log_prob(BITS)
    mass = joint.exp() * (z[1] - z[0])
    return (mass * z).sum(0) / mass.sum(0), (mass * z**2).sum(0) / mass.sum(0), mass.sum(0)


def test_prior_weights_are_likelihoods_and_average_to_the_posterior():
    first, second, evidence = quadrature()
    em = EM(probit, None, ADAM, e_step=MonteCarlo("prior", 20_000))
    pyro.set_rng_seed(0)
    posterior, info = expect(em, BITS)
    support = posterior.support()
    z, weights = support.values["z"], support.log_weights.exp()
    likelihood = dist.Bernoulli(logits=2.0 * z + 0.3).log_prob(BITS).exp()
    torch.testing.assert_close(weights, likelihood / likelihood.sum(0), rtol=1e-10, atol=0)
    assert_mean(likelihood, evidence, detect=0.02)
    assert_mean(20_000 * weights * (z - first), 0.0, detect=0.1)
    assert_mean(20_000 * weights * (z**2 - second), 0.0, detect=0.15)
    assert -info.loss == pytest.approx(float(evidence.log().sum()), abs=0.05)


def test_weights_are_per_datum_so_that_their_number_does_not_fall_with_the_data():
    x = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def model(x, rows=None):
        shift = pyro.param("shift", torch.tensor(0.0, dtype=torch.float64))
        if rows == "global":
            pyro.sample("g", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, rows=None):
        if rows == "global":
            pyro.sample("g", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    pyro.set_rng_seed(0)
    local, info = expect(EM(model, guide, ADAM, e_step=MonteCarlo("importance", 16)), x)
    assert info.ess.shape == (500,) and float(info.ess.mean()) > 13
    pyro.clear_param_store()
    joint, info = expect(EM(model, guide, ADAM, e_step=MonteCarlo("importance", 16)), x, rows="global")
    assert info.ess.shape == () and float(info.ess) < 3
    assert (local.support().log_weights.shape, joint.support().log_weights.shape) == ((16, 500), (16, 1))


# HMC ----------------------------------------------------------------------------------------------------------------


def test_chains_at_the_posterior_stay_there_with_the_acceptance_that_was_asked_for():
    problem = problems.linear_gaussian_full()
    em = full(problem, MonteCarlo("hmc", 400, num_warmup=40, num_leapfrog=4, num_moves=6))
    pyro.set_rng_seed(0)
    expect(em, *problem.args)
    posterior, info = expect(em, *problem.args)
    q = problem.posterior()["z"]
    z = posterior.support().values["z"]
    assert z.shape == (400, 12, 2) and posterior.kind == "hmc" and math.isnan(posterior.entropy)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(q.covariance_matrix), (z - q.mean).unsqueeze(-1), upper=False
    ).squeeze(-1)
    assert_mean(white.mean(1), 0.0, detect=0.15)
    assert_mean(white.square().mean(1), 1.0, detect=0.2)
    assert_mean((white[..., 0] * white[..., 1]).mean(1), 0.0, detect=0.15)
    assert info.acceptance.shape == (12,) and float((info.acceptance - 0.8).abs().max()) < 0.1


def truncated(x: Tensor) -> None:
    """Latents on a half line, an interval and a simplex, one of them global to the other two."""
    theta = pyro.param("theta", torch.tensor(1.5, dtype=torch.float64))
    with pyro.plate("data", len(x)):
        pyro.sample("rate", dist.Gamma(theta, 2.0))
        share = pyro.sample("share", dist.Beta(torch.tensor(2.0, dtype=torch.float64), 3.0))
        mix = pyro.sample("mix", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)))
        pyro.sample("x", dist.Normal((share + mix.sum(-1)) * 0.0, 1.0), obs=x)


def test_constrained_latents_move_with_the_jacobian_of_their_transform():
    """With a likelihood that says nothing the posterior is the prior, whose means are known."""
    em = EM(truncated, None, ADAM, e_step=MonteCarlo("hmc", 1500, num_warmup=30, num_leapfrog=6, num_moves=5))
    pyro.set_rng_seed(1)
    posterior, _ = expect(em, torch.zeros(2, dtype=torch.float64))
    values = posterior.support().values
    assert_mean(values["rate"].mean(1), 0.75, detect=0.1)
    assert_mean(values["share"].mean(1), 0.4, detect=0.05)
    assert_mean(values["mix"].mean(1), torch.tensor([1 / 6, 2 / 6, 3 / 6]), detect=0.05)
    assert float((values["mix"].sum(-1) - 1).abs().max()) < 1e-10


def test_one_accept_per_datum():
    """A step size that suits one datum and not the other moves the one only."""
    scale = torch.tensor([1.0, 1e-4], dtype=torch.float64)

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0, dtype=torch.float64))
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(loc, scale))
            pyro.sample("x", dist.Normal(z, 10.0), obs=x)

    em = EM(model, None, ADAM, e_step=MonteCarlo("hmc", 50, num_warmup=0, num_leapfrog=3))
    x = torch.zeros(2, dtype=torch.float64)
    pyro.set_rng_seed(0)
    expect(em, x)
    own = em.engine.steps["E"]
    frozen = {"E": own | {"log_average": torch.zeros_like(own["log_average"]).sub(1.0)}}
    em.engine.steps = frozen
    posterior, info = expect(em, x)
    z = posterior.support().values["z"].T
    moved = z.ne(frozen["E"]["position"][..., 0]).double().mean(1)
    assert float(moved[0]) > 0.8 and float(moved[1]) == 0.0
    assert float(info.acceptance[0]) > 0.8 and float(info.acceptance[1]) < 1e-6


def test_hidden_data_are_drawn_from_the_prior():
    def model(x, mask):
        loc = pyro.param("loc", torch.tensor(1.0, dtype=torch.float64))
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(loc, 2.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    x, mask = torch.tensor([5.0, 5.0], dtype=torch.float64), torch.tensor([True, False])
    em = EM(model, None, ADAM, e_step=MonteCarlo("hmc", 800, num_warmup=40, num_leapfrog=5, num_moves=4))
    pyro.set_rng_seed(0)
    posterior, _ = expect(em, x, mask)
    z = posterior.support().values["z"]
    assert_mean(z[:, 1], 1.0, detect=0.6)
    assert float((z[:, 0] - 5).abs().max()) < 1.0
    total = posterior.support().total(lambda values: {"z": values["z"]})["z"]
    assert float(total) == pytest.approx(float(z[:, 0].mean()), rel=1e-10)


def nested(x, joined=False):
    """A factor per group and one per member: nested plates, in a model whose runs vectorize or, joined, do not."""
    scale = pyro.param("scale", torch.tensor(0.5, dtype=x.dtype))
    with pyro.plate("groups", x.shape[-1], dim=-1):
        g = pyro.sample("g", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("members", x.shape[-2], dim=-2):
            if joined:
                assert g.shape == x.shape[-1:]
            m = pyro.sample("m", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(m, scale), obs=x)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sampler", ["prior", "hmc"])
@pytest.mark.filterwarnings("ignore:particles are run one by one")
def test_latents_of_nested_plates(sampler, dtype, joined):
    """Units are the outer plate's elements; g has the posterior of a sum of members."""
    x = torch.tensor([[1.0, -1.0], [2.0, 0.0], [0.0, 0.5]], dtype=dtype)
    options = {"num_warmup": 10, "num_leapfrog": 5} if sampler == "hmc" else {}
    counts = {("prior", False): 20_000, ("prior", True): 100, ("hmc", False): 1500, ("hmc", True): 3}
    em = EM(nested, None, ADAM, e_step=MonteCarlo(sampler, counts[sampler, joined], **options))
    pyro.set_rng_seed(0)
    posterior, info = expect(em, x, joined)
    values = posterior.support().values
    count = counts[sampler, joined]
    assert {n: tuple(v.shape) for n, v in values.items()} == {"g": (count, 1, 2), "m": (count, 3, 2)}
    assert posterior.support().log_weights.shape == (count, 1, 2) and info.ess.shape == (2,)
    assert values["m"].dtype == dtype and posterior.vectorize is not joined
    assert posterior.marginal("g").mean.shape == (2,) and posterior.marginal("m").mean.shape == (3, 2)
    assert posterior.expected_log_joint().isfinite()
    if not joined:
        precision = 1 + 3 / 1.25
        mean = x.sum(0) / 1.25 / precision
        atol = 5 * (precision * float(info.ess.min())) ** -0.5
        torch.testing.assert_close(posterior.marginal("g").mean, mean, rtol=0, atol=atol)
        torch.testing.assert_close(posterior.marginal("m").mean, (mean + 4 * x) / 5, rtol=0, atol=atol)
    em.engine.steps = {}
    em.step(x, joined)


# NUTS ---------------------------------------------------------------------------------------------------------------


def with_global(x: Tensor) -> None:
    scale = pyro.param("scale", torch.tensor(1.0, dtype=torch.float64))
    m = pyro.sample("m", dist.Normal(torch.zeros((), dtype=torch.float64), 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, scale), obs=x)


def test_nuts_draws_a_global_latent_and_goes_on_from_its_last_state():
    x = torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64)
    em = EM(with_global, None, ADAM, e_step=MonteCarlo("nuts", 150, num_warmup=40, num_moves=3))
    pyro.set_rng_seed(0)
    posterior, info = expect(em, x)
    own = em.engine.steps["E"]
    m = posterior.support().values["m"]
    assert m.shape == (150, 1) and float(own["position"].squeeze()) == pytest.approx(float(m[-1]))
    precision = 4 + 1 / 4
    assert float(info.ess) > 20 and 0.5 < float(info.acceptance) <= 1.0
    error = 5 * precision**-0.5 / math.sqrt(float(info.ess))
    assert float(m.mean()) == pytest.approx(5.0 / precision, abs=error)
    assert float(posterior.marginal("m").mean) == pytest.approx(float(m.mean()))
    again, _ = expect(em, x)
    assert float(em.engine.steps["E"]["count"]) == 40 + 150 + 3 + 150
    assert float(again.support().values["m"].mean()) == pytest.approx(5.0 / precision, abs=2 * error)


# Gibbs --------------------------------------------------------------------------------------------------------------


def noisy_or(x: Tensor) -> None:
    """Three dependent bits and a label per datum."""
    weight = pyro.param("weight", torch.tensor([1.0, -2.0, 1.5], dtype=torch.float64))
    with pyro.plate("data", len(x)):
        bits = [pyro.sample(f"b{i}", dist.Bernoulli(torch.tensor(0.3 + 0.2 * i, dtype=torch.float64))) for i in (0, 1)]
        label = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)))
        loc = weight[0] * bits[0] + weight[1] * bits[1] + weight[2] * label + bits[0] * bits[1]
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def test_gibbs_against_enumeration():
    x = torch.tensor([0.6, -0.2, 1.4], dtype=torch.float64)
    pyro.set_rng_seed(0)
    exact = EM(noisy_or, None, ADAM, e_step=steps.Enumerated())
    exact.engine.setup((x,), {})
    table = exact.posterior(x).support(1)

    def moments(values):
        b0, b1, k = (values[n].double() for n in ("b0", "b1", "k"))
        return torch.stack([b0, b1, k == 1, k == 2, b0 * b1, b1 * (k > 0)], -1)

    em = EM(noisy_or, None, ADAM, e_step=MonteCarlo("gibbs", 6000, num_warmup=8))
    posterior, info = expect(em, x)
    draws = moments(posterior.support().values)
    assert draws.shape == (6000, 3, 6) and info.ess.tolist() == [6000.0] * 3
    assert_mean(draws, table.expect(moments), detect=0.06)


def test_gibbs_with_global_and_local_latents():
    problem = problems.discrete_two_level()
    em = full(problem, MonteCarlo("gibbs", 4000, num_warmup=10))
    pyro.set_rng_seed(0)
    posterior, _ = expect(em, *problem.args)
    for site, q in problem.posterior().items():
        value = posterior.support().values[site].double()
        mean = q.mean if not isinstance(q, dist.Categorical) else (q.probs * torch.arange(q.probs.shape[-1])).sum(-1)
        assert_mean(value.reshape(4000, *mean.shape), mean, detect=0.1)


# With any M-step ----------------------------------------------------------------------------------------------------


def ppca_statistics(values, x):
    z = torch.cat([values["z"], torch.ones_like(values["z"][..., :1])], -1)
    x = x.expand(len(z), *x.shape)
    return {
        "zz": z.unsqueeze(-1) * z.unsqueeze(-2),
        "xz": x.unsqueeze(-1) * z.unsqueeze(-2),
        "xx": x.square().sum(-1),
        "n": torch.ones_like(x[..., 0]),
    }


def ppca_update(s, params):
    both = torch.linalg.solve(s["zz"], s["xz"].T).T
    variance = (s["xx"] - 2 * (both * s["xz"]).sum() + (both @ s["zz"] @ both.T).trace()) / (3 * s["n"])
    return {"weight": both[:, :2], "bias": both[:, 2], "sigma": variance.sqrt()}


M_STEPS = {
    "closed form": (steps.ClosedForm(ppca_statistics, ppca_update), 40),
    "gradient": (steps.Gradient(3), 60),
}
SAMPLED = {
    "importance": MonteCarlo("importance", 100),
    "prior": MonteCarlo("prior", 1000),
    "hmc": MonteCarlo("hmc", 100, num_leapfrog=3, num_warmup=10),
}


@pytest.mark.parametrize("m_step", M_STEPS)
@pytest.mark.parametrize("sampler", SAMPLED)
def test_em_climbs_to_the_maximum_of_a_factor_model(sampler, m_step):
    """The gap to the maximum of the likelihood is that of S draws: a few hundredths of a nat, of 28 at the start."""
    problem = problems.linear_gaussian_full()
    guide = exact_ppca_guide if sampler == "importance" else None
    step, iterations = M_STEPS[m_step]
    optim = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.98})
    em = full(problem, SAMPLED[sampler], guide, optim=optim, m_step=step)
    em.run(*problem.args, max_iter=iterations, seed=0)
    theta = {n: v for n, v in em.blocks.constrained().items() if n in problem.model_params}
    gap = float(problem.log_evidence(problem.maximum()) - problem.log_evidence(theta))
    start = float(problem.log_evidence(problem.maximum()) - problem.log_evidence())
    assert 0.0 <= gap < 0.5 < 20.0 < start


def exact_ppca_guide(x):
    """The posterior at the present theta, a little too wide."""
    theta = {n: pyro.param(n).detach() for n in ("weight", "bias", "sigma") if n in pyro.get_param_store()}
    theta = theta or {n: problems.linear_gaussian().params[n] for n in ("weight", "bias", "sigma")}
    precision = theta["weight"].T @ theta["weight"] / theta["sigma"] ** 2 + torch.eye(2, dtype=torch.float64)
    mean = (x - theta["bias"]) @ theta["weight"] @ torch.linalg.inv(precision) / theta["sigma"] ** 2
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=precision / 1.5))


def mixture(x):
    weight = pyro.param("weight", torch.tensor([0.5, 0.5]).double(), constraint=dist.constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]).double())
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weight))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def mixture_statistics(values, x):
    one_hot = nn.functional.one_hot(values["z"], 2).to(x)
    return {"n": one_hot, "x": one_hot * x.unsqueeze(-1)}


def mixture_update(s, params):
    return {"weight": s["n"] / s["n"].sum(), "loc": s["x"] / s["n"]}


@pytest.mark.parametrize("e_step", [MonteCarlo("gibbs", 200), MonteCarlo("prior", 200)], ids=["gibbs", "prior"])
def test_the_same_statistics_and_update_serve_enumeration_and_draws(e_step):
    noise = torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = noise + torch.tensor([-2.0, 2.0, 2.0], dtype=torch.float64).repeat(20)
    found = []
    for step in (steps.Enumerated(), e_step):
        pyro.clear_param_store()
        em = EM(mixture, e_step=step, m_step=steps.ClosedForm(mixture_statistics, mixture_update))
        found.append(em.run(x, max_iter=15, seed=0).params)
    for name, exact in found[0].items():
        torch.testing.assert_close(found[1][name], exact, rtol=0, atol=0.03)


# Chains by datum ----------------------------------------------------------------------------------------------------


def local(x, index=None, size=None):
    loc = pyro.param("loc", torch.tensor(0.0, dtype=torch.float64))
    with pyro.plate("data", size or len(x), subsample=index if size else None):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 0.01), obs=x)


X = torch.arange(6, dtype=torch.float64)


def short(**options) -> MonteCarlo:
    return MonteCarlo("hmc", 3, **({"num_warmup": 40, "num_leapfrog": 4} | options))


def test_chains_persist_and_start_anew_when_the_store_is_cleared():
    em = EM(local, None, ADAM, e_step=short())
    pyro.set_rng_seed(0)
    first, _ = expect(em, X)
    own = {k: v.clone() for k, v in em.engine.state.steps["E"].items()}
    assert torch.equal(own["position"][..., 0].T, first.support().values["z"]) and own["count"].tolist() == [41.0] * 6
    expect(em, X)
    assert em.engine.state.steps["E"]["count"].tolist() == [42.0] * 6
    pyro.clear_param_store()
    em.engine.refresh()
    expect(em, X)
    assert em.engine.state.steps["E"]["count"].tolist() == [41.0] * 6


@pytest.mark.parametrize("size", [None, 6])
def test_minibatches_move_the_chains_of_their_own_data(size):
    em = EM(local, None, ADAM, e_step=short())
    pyro.set_rng_seed(0)
    rows = torch.tensor([4, 1])
    expect(em, X[rows], index=rows, size=size)
    own = em.engine.state.steps["E"]
    assert (own["count"] > 0).nonzero().flatten().tolist() == [1, 4]
    torch.testing.assert_close(own["position"][rows].mean((1, 2)), X[rows], rtol=0, atol=0.1)
    before = own["position"].clone()
    others = torch.tensor([0, 4, 5])
    posterior, _ = expect(em, X[others], index=others, size=size)
    own = em.engine.state.steps["E"]
    assert own["position"].shape == (6, 3, 1) and torch.equal(own["position"][1], before[1])
    torch.testing.assert_close(own["position"][others].mean((1, 2)), X[others], rtol=0, atol=0.1)
    assert posterior.support().scale == (2.0 if size else 1.0) and own["count"][2:4].tolist() == [0.0, 0.0]


def test_a_plate_that_subsamples_at_random_places_its_batch():
    problem = problems.linear_gaussian(subsample_size=4)
    em = full(problem, MonteCarlo("hmc", 2, num_warmup=3, num_leapfrog=2))
    pyro.set_rng_seed(0)
    seen = set()
    for _ in range(3):
        posterior, _ = expect(em, *problem.args)
        rows = posterior.batch["data"].tolist()
        seen |= set(rows)
        own = em.engine.state.steps["E"]
        assert set((own["count"] > 0).nonzero().flatten().tolist()) == seen and len(rows) == 4
        assert torch.equal(own["position"][rows].transpose(0, 1), posterior.support().values["z"])
        assert posterior.support().scale == 3.0
        twice = [float(posterior.expected_log_joint().detach()) for _ in range(2)]
        assert twice[0] == twice[1]  # the same batch every time
    em.step(*problem.args)


def test_the_scale_of_a_minibatch_stays_out_of_the_weights():
    problem = problems.linear_gaussian(subsample_size=4)
    em = full(problem, MonteCarlo("prior", 30))
    pyro.set_rng_seed(0)
    posterior, info = expect(em, *problem.args)
    support, p = posterior.support(), problem.params
    mean = nn.functional.linear(support.values["z"], p["weight"], p["bias"])
    likelihood = dist.Normal(mean, p["sigma"]).log_prob(problem.args[0][posterior.batch["data"]]).sum(-1)
    torch.testing.assert_close(support.log_weights, likelihood.log_softmax(0), rtol=1e-10, atol=1e-10)
    evidence = 3 * (likelihood.logsumexp(0) - math.log(30)).sum()
    assert -info.loss == pytest.approx(float(evidence), rel=1e-10)
    assert float(posterior.expected_log_joint().detach()) + posterior.entropy == pytest.approx(-info.loss, rel=1e-10)


@pytest.mark.parametrize("sampler", ["hmc", "gibbs"])
def test_the_scale_of_a_minibatch_stays_out_of_the_chains(sampler):
    def model(x, rows):
        p = pyro.param("p", torch.tensor(0.6).double())
        with pyro.plate("data", 8, subsample=rows):
            z = pyro.sample("z", dist.Bernoulli(p) if sampler == "gibbs" else dist.Normal(p, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, rows = torch.tensor([0.2, 1.1], dtype=torch.float64), torch.tensor([3, 7])
    options = {"num_warmup": 20, "num_leapfrog": 4, "num_moves": 4} if sampler == "hmc" else {}
    em = EM(model, None, ADAM, e_step=MonteCarlo(sampler, 4000, **options))
    pyro.set_rng_seed(0)
    z = expect(em, x, rows)[0].support().values["z"]
    if sampler == "gibbs":
        odds = dist.Normal(1.0, 1.0).log_prob(x) - dist.Normal(0.0, 1.0).log_prob(x) + math.log(0.6 / 0.4)
        assert_mean(z, odds.sigmoid(), detect=0.08)
    else:
        assert_mean((z - (x + 0.6) / 2).square(), 0.5, detect=0.15)


WITHOUT_INDEX = {"fewer": X[:3], "others": X + 1, "another order": X.flip(0)}


@pytest.mark.parametrize("key", WITHOUT_INDEX)
def test_minibatches_that_do_not_say_which_data_they_hold(key):
    em = EM(local, None, ADAM, e_step=short(num_warmup=1))
    em.step(X)
    before = {k: v.clone() for k, v in em.engine.state.steps["E"].items()}
    theta = pyro.param("loc").clone()
    with pytest.raises(StepError, match=r"index=rows"):
        em.step(WITHOUT_INDEX[key])
    after = em.engine.state.steps["E"]
    assert all(torch.equal(v, after[k]) for k, v in before.items()) and torch.equal(pyro.param("loc"), theta)
    em.step(X)


def test_the_number_of_chains_may_grow_between_iterations():
    em = EM(local, None, ADAM, e_step=short())
    pyro.set_rng_seed(0)
    em.step(X)
    em.e_step.num_particles = 7
    posterior, _ = expect(em, X)
    assert posterior.support().values["z"].shape == (7, 6)
    assert em.engine.state.steps["E"]["position"].shape == (6, 7, 1)


# What an E-step leaves alone ----------------------------------------------------------------------------------------


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.4), nn.Linear(4, 2)).double()

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z.reshape(-1, 2)).reshape(z.shape)


def test_theta_and_buffers_are_left_alone_bit_for_bit():
    torch.manual_seed(0)
    decoder, zero = Decoder(), torch.zeros(2, dtype=torch.float64)
    x = torch.randn(5, 2, dtype=torch.float64)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))

    for name in ("prior", "importance", "hmc", "nuts"):
        em = EM(model, guide, ADAM, e_step=MonteCarlo(name, 2, **NONE[name]), m_step=steps.Gradient())
        em.engine.setup((x,), {})
        before = {k: v.clone() for k, v in decoder.state_dict().items()}
        expect(em, x)
        em.posterior(x[:3])
        assert all(torch.equal(v, before[k]) for k, v in decoder.state_dict().items())
        assert all(module.training for module in decoder.modules())
        assert all(p.grad is None for p in decoder.parameters())
        em.step(x)
        assert not torch.equal(decoder.net[0].weight, before["net.0.weight"])
        assert not torch.equal(decoder.net[1].running_mean, before["net.1.running_mean"])


# The posterior as a guide -------------------------------------------------------------------------------------------


def test_the_posterior_of_new_data_is_a_function_of_theta_and_data():
    problem = problems.linear_gaussian_full()
    em = full(problem, MonteCarlo("hmc", 60, num_leapfrog=4))
    em.step(*problem.args)
    own = em.engine.state.steps["E"]["position"].clone()
    new, generator = problem.args[0][:3] + 0.5, torch.get_rng_state()
    posterior = em.posterior(new)
    assert torch.equal(generator, torch.get_rng_state()) and em.posterior(new) is posterior
    assert torch.equal(em.engine.state.steps["E"]["position"], own)
    theta = em.blocks.constrained()
    precision = theta["weight"].T @ theta["weight"] / theta["sigma"] ** 2 + torch.eye(2, dtype=torch.float64)
    mean = (new - theta["bias"]) @ theta["weight"] @ torch.linalg.inv(precision) / theta["sigma"] ** 2
    torch.testing.assert_close(posterior.marginal("z").mean, mean, rtol=0, atol=0.5)
    with torch.no_grad():
        pyro.param("bias").add_(1.0)
    assert em.posterior(new) is not posterior


def test_as_a_guide_it_draws_all_latents_of_a_datum_from_one_particle():
    def model(x):
        theta = pyro.param("theta", torch.tensor(0.0, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(theta, 1.0))
            b = pyro.sample("b", dist.Normal(torch.stack([a, 2 * a], -1), 1e-3).to_event(1))
            pyro.sample("x", dist.Normal(b[..., 0], 1.0), obs=x)

    x = torch.tensor([-1.0, 3.0], dtype=torch.float64)
    em = EM(model, None, ADAM, e_step=MonteCarlo("prior", 2000))
    pyro.set_rng_seed(0)
    em.engine.setup((x,), {})
    exact = em.posterior(x).marginal("a").mean
    for parallel in (False, True):
        found = infer.Predictive(model, guide=em.guide, num_samples=400, parallel=parallel, return_sites=("a", "b"))(x)
        a, b = found["a"].reshape(400, 2), found["b"].reshape(400, 2, 2)
        assert float((b[..., 1] - 2 * a).abs().max()) < 0.01
        assert_mean(a, exact, detect=0.4)


def test_its_density_is_not_known_and_nothing_pretends_that_it_is():
    problem = problems.linear_gaussian()
    em = full(problem, MonteCarlo("prior", 30))
    em.step(*problem.args)
    with pytest.raises(NonFiniteError, match=r"nan.*guide's site 'z'"):
        elbo(em.model, em.guide, *problem.args, num_particles=5)
    evidence = log_evidence(em.model, em.guide, *problem.args, num_particles=5)
    assert "proposal is Laplace's approximation" in evidence.note and "no density" in str(evidence)
    assert evidence.value == pytest.approx(float(problem.log_evidence(em.blocks.constrained())), rel=1e-8)
    em = full(problem, MonteCarlo("importance", 30), problem.guide)
    em.step(*problem.args)
    assert em.guide is problem.guide
    assert math.isfinite(log_evidence(em.model, em.guide, *problem.args, num_particles=5).value)
    assert isinstance(em.posterior(problem.args[0][:4]), SamplesPosterior)


@pytest.mark.parametrize("sampler", ["prior", "hmc"])
def test_held_out_data_have_no_objective_by_draws_and_nothing_has_moved(sampler):
    problem = problems.normal_normal()
    em = EM(problem.model, optim=pyro.optim.Adam({"lr": 0.1}), e_step=MonteCarlo(sampler, num_particles=5))
    em.engine.setup(problem.args, {})
    before = {name: value.clone() for name, value in em.blocks.constrained().items()}
    with pytest.raises(StepError, match=r"held-out data.*validation= with MonteCarlo"):
        em.run(*problem.args, max_iter=20, validation=problem.args)
    assert all(torch.equal(value, before[name]) for name, value in em.blocks.constrained().items())


def test_a_marginal_of_no_latent():
    problem = problems.linear_gaussian()
    em = full(problem, MonteCarlo("prior", 3))
    posterior, _ = expect(em, *problem.args)
    assert posterior.marginal("z").mean.shape == (12, 2)
    with pytest.raises(StepError, match=r"'zz'.*'z'"):
        posterior.marginal("zz")


# Bad input ----------------------------------------------------------------------------------------------------------


WRONG = {
    "sampler": (lambda: MonteCarlo("importence"), "'importence'.*Did you mean 'importance'"),
    "option": (lambda: MonteCarlo("hmc", num_leapfrogs=3), "'num_leapfrogs'.*Did you mean 'num_leapfrog'"),
    "class": (lambda: MonteCarlo(samplers.HMC), "HMC"),
    "both": (lambda: MonteCarlo(samplers.HMC(), num_leapfrog=3), "num_leapfrog"),
    "number": (lambda: MonteCarlo("prior", 0), "0"),
    "leapfrogs": (lambda: MonteCarlo("hmc", num_leapfrog=0), "num_leapfrog.*0"),
    "target": (lambda: MonteCarlo("hmc", target_acceptance=1.5), "1.5"),
}


@pytest.mark.parametrize("key", WRONG)
def test_options_that_do_not_fit(key):
    make, observed = WRONG[key]
    with pytest.raises(EmvaeError, match=observed):
        make()


@pytest.mark.parametrize("sampler", ["hmc", "nuts"])
def test_a_discrete_site_under_a_sampler_that_follows_gradients(sampler):
    em = EM(mixture, None, ADAM, e_step=MonteCarlo(sampler))
    with pytest.raises(StepError, match=r"'z'.*Categorical.*Enumerated"):
        em.step(X)


def test_a_continuous_site_under_gibbs():
    with pytest.raises(StepError, match=r"'z'.*Normal.*hmc"):
        EM(local, None, ADAM, e_step=MonteCarlo("gibbs")).step(X)


def test_importance_without_a_guide():
    with pytest.raises(StepError, match=r"no guide, and MonteCarlo.Importance"):
        EM(local, None, ADAM, e_step="monte_carlo")


def test_a_global_latent_with_a_subsampled_plate():
    def model(x):
        m = pyro.sample("m", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("data", 6, subsample_size=2) as rows:
            pyro.sample("x", dist.Normal(m + pyro.param("b", torch.zeros(()).double()), 1.0), obs=x[rows])

    for name in ("prior", "hmc", "nuts"):
        with pytest.raises(StepError, match="'data'"):
            EM(model, None, ADAM, e_step=MonteCarlo(name)).step(X)


def test_a_site_that_joins_the_data_takes_their_weights_together():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("b", torch.zeros(()).double()), 1.0))
        pyro.sample("sum", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=x.sum())

    em = EM(model, None, ADAM, e_step=MonteCarlo("prior", 50))
    posterior, info = expect(em, X)
    assert posterior.support().log_weights.shape == (50, 1) and info.ess.shape == ()


def test_a_site_that_joins_elements_under_gibbs():
    def model(x):
        p = pyro.param("p", torch.tensor(0.4).double(), constraint=dist.constraints.unit_interval)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(p))
        pyro.sample("sum", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=x.sum())

    with pytest.raises(StepError, match=r"'z'.*'sum'"):
        EM(model, None, ADAM, e_step=MonteCarlo("gibbs")).step(X)


def test_a_support_that_depends_on_another_latent():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Gamma(pyro.param("b", torch.ones(()).double()), 1.0))
            z = pyro.sample("z", dist.Uniform(0.0, a))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(StepError, match=r"'z'.*Uniform"):
        EM(model, None, ADAM, e_step=MonteCarlo("hmc", num_warmup=1)).step(X)


def test_weights_that_are_all_zero():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(pyro.param("b", torch.zeros(()).double()), 1.0))
            pyro.factor("inside", torch.where(x > z + 3, -math.inf, 0.0))

    with pytest.raises(NonFiniteError, match=r"100 weights that are all zero at datum 4"):
        EM(model, None, ADAM, e_step=MonteCarlo("prior")).step(X)
    with pytest.raises(NonFiniteError, match=r"-inf at datum 4"):
        EM(model, None, ADAM, e_step=short(num_warmup=1)).step(X)
