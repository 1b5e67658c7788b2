r"""Latents that are masked altogether: by `poutine.mask` or inside their distribution, they count for nothing."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_emvae import EM, problems, steps
from pyro_emvae._checks import StepError
from pyro_emvae.particles import draw
from pyro_emvae.testing import assert_mean, check_step

X, KEEP = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64), torch.tensor([True, False, True])
CONTINUOUS = [steps.Gaussian(), steps.Laplace(), steps.Laplace(num_nodes=3), steps.Conjugate(), steps.MeanField()]
ONE = torch.ones(3, dtype=torch.float64)


def inside(x, elements: bool = False):
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(0 * ONE, 1.0).mask(KEEP))
        fn = dist.Normal(z, 1.0).mask(KEEP)
        pyro.sample("x", dist.Normal(z[..., None], 1.0).mask(KEEP[:, None]).to_event(1) if elements else fn, obs=x)


def latent_alone(x):
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(0 * ONE, 1.0).mask(KEEP))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def latent_alone_around(x):
    with pyro.plate("data", 3):
        with poutine.mask(mask=KEEP):
            z = pyro.sample("z", dist.Normal(0 * ONE, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def of_a_sum(x):
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(0 * ONE, 1.0).mask(KEEP))
    pyro.sample("x", dist.Normal((z * KEEP).sum(-1), 1.0), obs=x.sum())


def switch(x, both: bool = True, elements: bool = False):
    with pyro.plate("data", 3):
        k = pyro.sample("k", dist.Bernoulli(0.3 * ONE).mask(KEEP))
        if elements:
            pyro.sample("x", dist.Normal(k[..., None], 1.0).mask(KEEP[:, None]).to_event(1), obs=x[:, None])
        else:
            pyro.sample("x", dist.Normal(k, 1.0).mask(KEEP if both else KEEP | True), obs=x)


@pytest.mark.parametrize("step", CONTINUOUS, ids=repr)
def test_the_evidence_is_that_of_the_rest(step):
    """Evidence, ELBO and their derivatives by theta against the exact ones, in nested plates of ragged series."""
    problem = problems.masked()
    check_step(step, "E", problem=problem)
    _, valid, _ = problem.args
    exact, found = problem.posterior()["z"], step.infer(problem.model, problem.args, {})
    torch.testing.assert_close(found.marginal("z").mean, exact.mean, rtol=1e-9, atol=1e-9)  # the prior's where masked
    counted = found.support(10).total(lambda values: torch.ones_like(values["z"]))
    assert float(counted) == pytest.approx(float(valid.sum()))


def test_em_ends_at_the_maximum_of_the_rest():
    problem = problems.masked()

    def statistics(values, x, valid, observed):
        miss = torch.where(observed, (x - values["z"]).square(), 0.0)
        return {"z": values["z"], "one": torch.ones_like(x)[None], "miss": miss, "seen": 1.0 * observed[None]}

    def update(s, params):
        return {"mean": s["z"] / s["one"], "sigma": (s["miss"] / s["seen"]).sqrt()}

    em = EM(problem.model, e_step=steps.Gaussian(), m_step=steps.ClosedForm(statistics, update))
    fit = em.run(*problem.args, max_iter=400, accelerate="squarem", progress_bar=False)
    for name, value in problem.maximum().items():
        torch.testing.assert_close(fit.params[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", CONTINUOUS, ids=repr)
@pytest.mark.parametrize("elements", [False, True], ids=["mask", "mask of elements"])
def test_a_mask_inside_the_distribution_is_one_around_it(step, elements):
    posterior = step.infer(inside, (X[:, None] if elements else X, elements), {})
    exact = dist.Normal(0 * ONE, 2**0.5).log_prob(X)[KEEP].sum()
    bound = float(posterior.expected_log_joint(10)) + posterior.entropy
    assert bound == pytest.approx(float(exact), abs=1e-9)
    assert posterior.marginal("z").mean[1].abs() < 1e-12


@pytest.mark.parametrize("elements", [False, True], ids=["mask", "mask of elements"])
def test_enumerated_outcomes_of_a_masked_latent_add_up_to_one(elements):
    posterior = steps.Enumerated().infer(switch, (X,), {"elements": elements})
    log_p = torch.stack([dist.Normal(k * ONE, 1.0).log_prob(X) + math.log(p) for k, p in ((1, 0.3), (0, 0.7))])
    assert posterior.log_evidence == pytest.approx(float(log_p.logsumexp(0)[KEEP].sum()), rel=1e-9)
    assert float(posterior.marginal("k").probs[1]) == pytest.approx(0.3)
    assert float(posterior.expected_counts("k")[1].sum()) == 0.0


def test_a_run_has_the_mask_beside_the_density():
    for num_particles in (1, 4):
        site = draw(
            inside, lambda x: None, (X,), {}, num_particles=num_particles, vectorize=True, max_plate_nesting=1
        ).model["z"]
        assert torch.equal(site.mask, KEEP)
        torch.testing.assert_close(site.log_prob, dist.Normal(0 * ONE, 1.0).log_prob(site.value), rtol=0, atol=0)
        assert bool((site.scaled[..., 1] == 0).all())


@pytest.mark.parametrize("model", [latent_alone, latent_alone_around])
@pytest.mark.parametrize("step", [*CONTINUOUS[:3], steps.MeanField()], ids=repr)
def test_a_masked_latent_that_a_datum_depends_on_is_refused(step, model):
    with pytest.raises(StepError, match=r"'z' where it is masked.*'x'"):
        step.infer(model, (X,), {})


def test_enumerated_refuses_a_masked_latent_that_a_datum_depends_on():
    with pytest.raises(StepError, match=r"'k' where it is masked.*'x'"):
        steps.Enumerated().infer(switch, (X,), {"both": False})


@pytest.mark.parametrize("step", [steps.Gaussian(), steps.Laplace()], ids=repr)
def test_a_datum_may_depend_on_the_latents_that_are_kept(step):
    found = step.infer(of_a_sum, (X,), {})
    exact = dist.Normal(0 * ONE[0], 3**0.5).log_prob(X.sum())
    assert found.log_evidence == pytest.approx(float(exact), abs=1e-9)


@pytest.mark.parametrize("sampler", ["prior", steps.samplers.HMC(num_warmup=50)], ids=["prior", "hmc"])
def test_draws_of_a_masked_latent_are_of_its_prior(sampler):
    """A flat density, in place of the prior, would send the chains away."""
    step = steps.MonteCarlo(sampler, num_particles=2000)
    z = step.infer(inside, (X,), {}).support(1).values["z"][:, 1]
    assert_mean(z.abs(), math.sqrt(2 / math.pi), detect=0.2)
