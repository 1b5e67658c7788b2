r"""The tests' own tools: the one door for statistics, exact means, and the checks of guides and steps."""

from __future__ import annotations

import dataclasses
import math
from types import MappingProxyType

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch.distributions import constraints

from pyro_emvae import Traits, problems, steps
from pyro_emvae._checks import ModelError, StepError
from pyro_emvae._registry import entries
from pyro_emvae.estimators import LeaveOneOut
from pyro_emvae.guides import AutoMeanField
from pyro_emvae.parameters import assign
from pyro_emvae.problems import exact_gradients
from pyro_emvae.steps.samplers import SAMPLERS
from pyro_emvae.testing import (
    Replay,
    Underpowered,
    assert_mean,
    check_estimator,
    check_guide,
    check_step,
    exact_mean,
    needed,
)
from pyro_emvae.testing.cubature import _cubature, _product


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Statistics ---------------------------------------------------------------------------------------------------------


def test_assert_mean_passes_the_mean_and_fails_a_shift():
    samples = 2.0 + normal(10_000, 3)
    assert_mean(samples, 2.0, detect=0.1)
    assert_mean(samples, torch.tensor([2.0, 2.0, 2.0]), detect=torch.tensor([0.1, 0.2, 0.3]))
    with pytest.raises(AssertionError, match=r"mean\[1\]: observed 1\.99\d* .* expected 2\.(1|0999)"):
        assert_mean(samples, torch.tensor([2.0, 2.1, 2.0]), detect=0.1)


def test_assert_mean_names_a_coordinate_of_any_shape():
    samples = normal(10_000, 2, 3)
    samples[:, 1, 2] += 0.5
    with pytest.raises(AssertionError, match=r"gradient\[1, 2\]: observed 0\.[45]"):
        assert_mean(samples, 0.0, detect=0.1, what="gradient")
    with pytest.raises(AssertionError, match="gradient: observed 0"):
        assert_mean(samples[:, 1, 2], 0.0, detect=0.1, what="gradient")


def test_too_few_samples_are_no_test():
    with pytest.raises(Underpowered, match=r"got 100 samples .* deviation of 0\.1 .* it takes \d{4}\."):
        assert_mean(normal(100), 0.0, detect=0.1)


def test_a_skewed_mean_is_no_test():
    samples = normal(2000).exp() ** 2
    with pytest.raises(Underpowered, match="2000 samples"):
        assert_mean(samples, samples.mean(), detect=1e9)


def test_underpowered_is_no_failure_of_what_is_tested():
    assert not issubclass(Underpowered, AssertionError)


def test_needed_is_the_number_at_which_the_test_is_allowed():
    samples = normal(20_000)
    number = needed(samples, 0.1)
    assert_mean(samples[:number], 0.0, detect=0.102)
    with pytest.raises(Underpowered):
        assert_mean(samples[: number // 2], 0.0, detect=0.1)


def test_a_coordinate_without_variance_is_compared_to_rounding():
    samples = torch.full((50, 2), 1 / 3, dtype=torch.float32)
    assert_mean(samples, 1 / 3, detect=1e-9)
    assert_mean(torch.zeros(50), 0.0, detect=1e-9)
    with pytest.raises(AssertionError, match=r"observed 0\.3333333\d* .* expected 0\.3334"):
        assert_mean(samples, 0.3334, detect=1.0)


def test_false_alarms_are_as_rare_as_alpha_says():
    """2,000 tests of two coordinates at alpha = 5 %: two-sided binomial test of the share, alpha 1e-6."""
    samples = normal(2000, 400, 2, seed=3)
    alarms = 0
    for x in samples:
        try:
            assert_mean(x, 0.0, detect=1.0, alpha=0.05)
        except AssertionError:
            alarms += 1
    assert abs(alarms / 2000 - 0.05) < 4.9 * (0.05 * 0.95 / 2000) ** 0.5


# Exact means --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [3, 5, 12])
@pytest.mark.parametrize("degree", [3, 5])
def test_cubature_integrates_polynomials_of_its_degree(dims, degree):
    nodes, weights = _cubature(dims, degree, turn=1)
    direction = normal(dims, seed=2)
    moments = {0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0, 5: 0.0, 6: 15.0}
    for power, moment in moments.items():
        value = float((weights * (nodes @ (direction / direction.norm())) ** power).sum())
        assert (abs(value - moment) < 1e-12) == (power <= degree or power % 2 == 1)


def test_product_rule_integrates_what_is_no_polynomial():
    for turn in (0, 1):
        nodes, weights = _product(2, turn)
        value = (weights * (0.7 * nodes[:, 0] + 0.4 * nodes[:, 1]).exp()).sum()
        assert float(value) == pytest.approx(math.exp(0.5 * (0.49 + 0.16)), rel=1e-12)


def test_what_no_rule_integrates_is_not_called_exact():
    """Eight schools: ten latents, a LogNormal that multiplies others; two turned rules differ."""
    assert exact_mean(Replay(problems.eight_schools(), "pathwise", 1)) is None


@pytest.mark.parametrize(("make", "outcomes"), [(problems.bernoulli, 64), (problems.categorical, 59049)])
def test_probabilities_of_all_outcomes_sum_to_one(make, outcomes):
    replay = Replay(make(), "leave_one_out", 2)
    noise, weights = replay.outcomes(torch.zeros(1, 0), torch.ones(1, dtype=torch.float64))
    _, probability = replay.gradients(noise)
    assert len(weights) == outcomes
    assert float((weights * probability).sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("make", [problems.discrete_two_level, problems.subsampled, problems.mixed_two_level])
def test_random_rows_have_the_exact_mean(make):
    """Draws by quantile and minibatches by permutation follow guide and plate."""
    replay = Replay(make(), "leave_one_out", 3)
    right = exact_mean(replay).gradients
    samples, _ = replay.gradients(replay.draws(20_000, seed=5))
    scale = max(float(g.abs().max()) for g in right.values())
    for name, g in samples.items():
        assert_mean(g, right[name], detect=0.2 * scale)


def test_dictated_draws_are_the_guide_s_own():
    """A particle's value is the one that the noise stands for, and log q scores it."""
    problem = problems.mixed_two_level()
    replay = Replay(problem, "score", 1)
    with torch.no_grad():
        particles = replay.evaluate({"k": torch.tensor(1), "z": torch.tensor(0.5, dtype=torch.float64)}).particles
    loc, scale = problem.params["locs"][1], problem.params["guide_scales"][1]
    assert float(particles.guide["k"].value) == 1.0
    assert float(particles.guide["z"].value) == pytest.approx(float(loc + 0.5 * scale))
    assert float(particles.guide["z"].log_prob) == pytest.approx(float(dist.Normal(0.0, scale).log_prob(0.5 * scale)))


def test_a_replay_leaves_store_and_generator_alone():
    before = torch.get_rng_state()
    replay = Replay(problems.two_level(), "leave_one_out", 2)
    exact_mean(replay)
    assert not list(pyro.get_param_store().keys())
    assert torch.equal(torch.get_rng_state(), before)


@dataclasses.dataclass(frozen=True)
class Branching(LeaveOneOut):
    """Leave-one-out that looks at a number: right, but not recordable."""

    traits = dataclasses.replace(LeaveOneOut().traits, recordable=False, auto=None)

    def surrogate(self, site, signal, rows, state):
        assert float(signal.sum()) < 1e9
        return super().surrogate(site, signal, rows, state)


def test_what_cannot_be_recorded_is_looped():
    problem = problems.discrete_two_level()
    right = exact_gradients(problem)
    found = exact_mean(Replay(problem, Branching(), 2)).gradients
    for name, g in right.items():
        torch.testing.assert_close(found[name], g, rtol=1e-10, atol=1e-10)


# Estimators, guides, steps ------------------------------------------------------------------------------------------


def test_check_estimator_says_what_it_checked():
    rows = check_estimator("score", problems=["bernoulli", "two_level"], num_particles=[1, 2])
    assert [(r.problem, r.num_particles, r.how) for r in rows] == [
        ("bernoulli", 1, "enumeration"),
        ("bernoulli", 2, "enumeration"),
        ("two_level", 1, "quadrature"),
        ("two_level", 2, "quadrature"),
    ]


def test_check_estimator_takes_instances():
    (row,) = check_estimator(LeaveOneOut(), problems=[problems.two_level()], num_particles=[3])
    assert row.how == "quadrature"


def test_check_estimator_refuses_to_check_nothing():
    with pytest.raises(AssertionError, match=r"Pathwise.* fits no site of the problems \['bernoulli'\]"):
        check_estimator("pathwise", problems=["bernoulli"])


def test_check_estimator_says_when_it_cannot_know():
    with pytest.raises(Underpowered, match="eight_schools"):
        check_estimator("score", problems=["eight_schools"], num_particles=[1])
    (row,) = check_estimator("score", problems=["eight_schools"], num_particles=[1], strict=False)
    assert row.how == "underpowered"


def regression(x: torch.Tensor, y: torch.Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.Gamma(2.0, 2.0))
    with pyro.plate("groups", 2, dim=-1):
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("y", dist.Normal(slope * x.unsqueeze(-1) + bias, noise), obs=y)


DATA = (torch.tensor([0.1, 1.0, -0.7]), torch.tensor([[0.3, 0.9], [1.3, 2.0], [-0.4, 0.2]]))
AUTOGUIDES = [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal]


@pytest.mark.parametrize("family", AUTOGUIDES)
def test_pyro_s_autoguides_pass(family):
    check_guide(family, regression, DATA)


def test_a_guide_of_finite_sites_passes():
    def model() -> None:
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.3, 0.4])))
        pyro.sample("z", dist.Normal(k.float(), 1.0))

    def guide() -> dict[str, torch.Tensor]:
        probs = pyro.param("probs", torch.tensor([0.2, 0.5, 0.3]), constraint=constraints.simplex)
        k = pyro.sample("k", dist.Categorical(probs))
        return {"k": k, "z": pyro.sample("z", dist.Normal(0.5 * k, 1.2))}

    check_guide(lambda model: guide, model)


@pytest.mark.parametrize("slot", ["E", "M"])
@pytest.mark.parametrize("optim", [None, torch.optim.SGD], ids=["adam", "sgd"])
def test_gradient_steps_pass(slot, optim):
    optim = optim and pyro.optim.SGD({"lr": 1e-3, "momentum": 0.9})
    check_step(steps.Gradient(num_steps=2), slot, optim=optim, num_steps=30)


@pytest.mark.parametrize("slot", ["e", "joint", 1, None])
def test_check_step_knows_two_slots(slot):
    with pytest.raises(StepError, match=rf"got {slot!r}\. .* Known: 'E', 'M'"):
        check_step("gradient", slot)


class PosteriorMean(steps.HalfStep):
    """A closed form for one kind of model: theta, the mean of the prior, becomes the guide's location."""

    traits = Traits(slots=("M",))

    def __init__(self, theta: str, shift: float = 0.0, also: float = 0.0) -> None:
        self.theta, self.shift, self.also = theta, shift, also

    def maximise(self, problem, state, posterior, *args, **kwargs):
        loc = problem.parameters.constrained()["loc"]
        assign(problem.parameters, {self.theta: loc + self.shift, "loc": loc + self.also})
        return state, steps.Info()


def prior_mean_model(x: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(-0.7)), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def prior_mean_guide(x: torch.Tensor) -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.4)), 0.5))


@pytest.mark.parametrize("given", ["problem", "tuple"])
def test_check_step_on_a_problem_of_one_s_own(given):
    own = (prior_mean_model, prior_mean_guide, torch.tensor([0.2, 1.0, 0.7]))
    theta, problem = ("prior_mean", problems.normal_normal()) if given == "problem" else ("theta", own)
    check_step(PosteriorMean(theta), "M", problem, num_steps=2)
    name = "exact ELBO of normal_normal" if given == "problem" else "ELBO of prior_mean_model"
    with pytest.raises(AssertionError, match=f"took the {name} from -.* expected a rise"):
        check_step(PosteriorMean(theta, shift=9.0), "M", problem, num_steps=2)
    with pytest.raises(AssertionError, match=r"M-step .* moved 'loc' of the guide"):
        check_step(PosteriorMean(theta, also=0.1), "M", problem, num_steps=2)
    if given == "tuple":
        kept = {name: round(float(value.detach()), 3) for name, value in pyro.get_param_store().items()}
        assert kept == {"theta": -0.7, "loc": 0.4}
    else:
        assert not list(pyro.get_param_store().keys())


def test_check_step_estimates_an_elbo_that_is_not_known():
    problem = dataclasses.replace(problems.normal_normal(), elbo=None)
    check_step(PosteriorMean("prior_mean"), "M", problem, num_steps=1)
    with pytest.raises(AssertionError, match="took the ELBO of _Substituted"):
        check_step(PosteriorMean("prior_mean", shift=9.0), "M", problem, num_steps=1)


@pytest.mark.parametrize("problem", ["normal_normal", (prior_mean_model,), (prior_mean_model, 3), problems.digits_vae])
def test_check_step_refuses_what_is_no_problem(problem):
    with pytest.raises(ModelError, match="`check_step` cannot take steps on this problem: got "):
        check_step("gradient", "M", problem)


def test_checks_leave_store_and_generator_alone():
    before = torch.get_rng_state()
    check_step("gradient", "E", num_steps=5)
    check_estimator("score", problems=["bernoulli"], num_particles=[1])
    assert not list(pyro.get_param_store().keys())
    assert torch.equal(torch.get_rng_state(), before)


def test_replay_uses_other_parameter_values():
    problem = problems.normal_normal()
    moved = dataclasses.replace(problem, params=MappingProxyType({**problem.params, **problem.exact_guide()}))
    found = exact_mean(Replay(moved, "score", 1)).gradients
    torch.testing.assert_close(found["loc"], torch.zeros_like(found["loc"]), rtol=0, atol=1e-10)


def test_other_parameters_of_the_same_name_do_not_matter():
    """The problem's ``scale`` is positive; the one in the store is not."""
    pyro.param("scale", torch.tensor(-1.0))
    check_estimator("pathwise", problems=["normal_normal"], num_particles=[1])
    assert float(pyro.param("scale").detach()) == -1.0


# E-steps that make a posterior ----------------------------------------------------------------------------------


def free(traits):
    """Return a problem with a guide of free parameters for a step that moves no other."""
    if not traits.free_guide:
        return None

    def model(x):
        theta = pyro.param("theta", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide, x = AutoMeanField(model), torch.randn(6)
    guide(x)
    return model, guide, x


@pytest.mark.filterwarnings("ignore:particles are run one by one")  # the check's networks have batch norm
@pytest.mark.parametrize("slot", ["E", "M"])
@pytest.mark.parametrize("entry", [e for e in entries("step") if not e.traits.arguments], ids=lambda e: e.name)
def test_every_registered_step_proves_itself(entry, slot):
    if slot in entry.traits.slots:
        check_step(entry.name, slot, problem=free(entry.traits), num_steps=40)
    else:
        with pytest.raises(StepError):
            check_step(entry.name, slot)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_leaves_the_parameters_alone(sampler):
    step = steps.MonteCarlo(sampler, num_particles=2)
    check_step(step, "E", problems.categorical() if step.traits.latents == "discrete" else problems.normal_normal())


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ("enumerated", problems.discrete_two_level),
        ("gaussian", problems.two_level),
        ("conjugate", problems.skewed_gamma),
    ],
)
def test_exact_steps_on_other_problems(step, problem):
    check_step(step, "E", problem())


class Moving(steps.Gaussian):
    def expect(self, problem, state, *args):
        with torch.no_grad():
            problem.parameters.rows[0].leaf.add_(1e-3)
        return super().expect(problem, state, *args)


class Boasting(steps.Gaussian):
    def expect(self, problem, state, *args):
        state, posterior, info = super().expect(problem, state, *args)
        return state, posterior, info._replace(loss=info.loss - 1e-3)


class Elsewhere(steps.Gaussian):
    """The posterior of other data: its ELBO is that of a wrong q, and it reports so."""

    def expect(self, problem, state, x):
        state, posterior, _ = super().expect(problem, state, x + 0.01)
        posterior.args = (x,)
        bound = float(posterior.expected_log_joint(1).detach()) + posterior.entropy
        return state, posterior, steps.Info(loss=-bound)


@pytest.mark.parametrize(
    ("step", "said"), [(Moving(), "moved"), (Boasting(), "reports"), (Elsewhere(), "expected log p")]
)
def test_wrong_posteriors_are_caught(step, said):
    with pytest.raises(AssertionError, match=said):
        check_step(step, "E")


def test_a_posterior_is_judged_by_a_known_evidence():
    with pytest.raises(ModelError, match="log_evidence"):
        check_step("gaussian", "E", (lambda x: None, lambda x: None, torch.zeros(1)))
