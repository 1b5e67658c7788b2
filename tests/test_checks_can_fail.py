r"""Every check can fail: planted defects, and the name of the check that has to catch each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from test_estimators import assert_zero_at_posterior
from test_wake_sleep import B, K, N, assert_wake_phi
from torch import Tensor

from pyro_emvae import steps
from pyro_emvae._registry import Traits
from pyro_emvae.estimators import (
    Arms,
    DecayingAverage,
    DoubleControlVariate,
    Estimator,
    LeaveOneOut,
    Pathwise,
    RaoBlackwellTopK,
    Score,
    UnorderedSet,
)
from pyro_emvae.estimators.base import base
from pyro_emvae.posterior import GuidePosterior
from pyro_emvae.problems import normal_normal, two_level
from pyro_emvae.steps import HalfStep, Info
from pyro_emvae.testing import check_estimator, check_guide, check_step

# Estimators ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WrongSign(Score):
    def surrogate(self, site, signal, rows, state):
        return {path: -term for path, term in super().surrogate(site, signal, rows, state).items()}


@dataclass(frozen=True)
class BaselineOfAll(LeaveOneOut):
    """The mean of all particles in place of the others': (n-1)/n of the gradient."""

    def surrogate(self, site, signal, rows, state):
        term = (signal - signal.mean(0, keepdim=True)) * site.log_q
        return {"value": term, "guide": term}


@dataclass(frozen=True)
class NotDetached(Score):
    """The score function on a value that is still attached: both gradients at once."""

    traits: ClassVar[Traits] = replace(Score.traits, needs_rsample=True)


@dataclass(frozen=True)
class BaselineNotDetached(Score):
    """A learned-looking baseline, log q of the site, whose own gradient leaks in."""

    def surrogate(self, site, signal, rows, state):
        term = (signal - 0.1 * site.log_q) * site.log_q
        return {"value": term, "guide": term}


@dataclass(frozen=True)
class PlateScaleTwice(Score):
    """The signal carries the plate's scale already."""

    def surrogate(self, site, signal, rows, state):
        term = signal * -site.entropy
        return {"value": term, "guide": term}


@dataclass(frozen=True)
class PlatesSummed(Score):
    """Every datum's score is weighted by the mean signal of all data."""

    def surrogate(self, site, signal, rows, state):
        term = signal.mean(-1, keepdim=True) * site.log_q
        return {"value": term, "guide": term}


@dataclass(frozen=True)
class Leaking(DecayingAverage):
    """The baseline holds the present signal."""

    def surrogate(self, site, signal, rows, state):
        return super().surrogate(site, signal, rows, self.update(site, signal, state))


@dataclass(frozen=True)
class DetachedDistribution(Pathwise):
    """Sticking the landing by detaching loc and scale: upstream values in them lose their path.

    Its mean is right where the lost path goes through the parameters of a density (the score's mean is zero), its
    variance at the posterior is not.
    """

    def surrogate(self, site, signal, rows, state):
        fn = base(site.fn)
        term = -type(fn)(fn.loc.detach(), fn.scale.detach()).log_prob(site.value)
        return {"value": term, "guide": term}


@dataclass(frozen=True)
class Undeclared(Estimator):
    """Straight-through-like: biased, and says nothing."""

    traits: ClassVar[Traits] = Traits(support="binary")

    def surrogate(self, site, signal, rows, state):
        term = 0.5 * signal * site.log_q
        return {"value": term, "guide": term}


@dataclass(frozen=True)
class HiddenState(Score):
    """A baseline kept on the object: the same state and seed give another gradient."""

    seen: list = field(default_factory=list)
    traits: ClassVar[Traits] = replace(Score.traits, recordable=False)

    def surrogate(self, site, signal, rows, state):
        self.seen.append(1.0)
        term = (signal - len(self.seen)) * site.log_q
        return {"value": term, "guide": term}


@dataclass(frozen=True)
class OverwritesState(DecayingAverage):
    def update(self, site, signal, state):
        state["average"].add_(0.1 * signal.mean())
        return dict(state)


@dataclass(frozen=True)
class GrowingState(DecayingAverage):
    def update(self, site, signal, state):
        new = super().update(site, signal, {k: state[k] for k in ("average", "weight")})
        return {**new, "past": torch.cat([state.get("past", signal.new_zeros(0)), signal.flatten()])}


@dataclass(frozen=True)
class SilentState(DecayingAverage):
    traits: ClassVar[Traits] = replace(DecayingAverage.traits, stateful=False)


@dataclass(frozen=True)
class LooksAtANumber(Score):
    """Says that it can be recorded."""

    def surrogate(self, site, signal, rows, state):
        return super().surrogate(site, signal if float(signal.mean()) < 1e9 else 0 * signal, rows, state)


@dataclass(frozen=True)
class HalfPrecision(Score):
    """Right to ten digits in float64, not in float32."""

    def surrogate(self, site, signal, rows, state):
        term = ((signal + 1e6) - 1e6) * site.log_q
        return {"value": term, "guide": term}


@dataclass(frozen=True)
class CouplingIgnored(Arms):
    """Repelling draws with the weights of independent ones."""

    def surrogate(self, site, signal, rows, state):
        return LeaveOneOut().surrogate(site, signal, rows, state)


@dataclass(frozen=True)
class BaselineOfTheDraw(RaoBlackwellTopK):
    """The baseline holds the row that was drawn."""

    traits: ClassVar[Traits] = replace(RaoBlackwellTopK.traits, controls=False, stateful=False)

    def surrogate(self, site, signal, rows, state):
        term = (signal - site.weight * signal.mean(0)) * site.log_q
        return {"value": term, "guide": term}


@dataclass(frozen=True)
class RestUnweighted(RaoBlackwellTopK):
    """The row that was drawn from the rest has its own probability as its weight."""

    def weigh(self, fn, value):
        weight = fn.log_prob(value).detach().exp()
        return weight / weight.sum(0)


@dataclass(frozen=True)
class OrderIgnored(UnorderedSet):
    """Draws without replacement, weighted by their probabilities alone."""

    def weigh(self, fn, value):
        weight = fn.log_prob(value).detach().exp()
        return weight / weight.sum(0)


@dataclass(frozen=True)
class BaselineOfAllRows(UnorderedSet):
    """Each row's baseline is the weighted mean of all rows."""

    def surrogate(self, site, signal, rows, state):
        term = (signal - site.weight * signal.mean(0)) * site.log_q
        return {"value": term, "guide": term}


@dataclass(frozen=True)
class SlopeOfItself(DoubleControlVariate):
    """A particle's control variate uses the derivative at the particle itself."""

    traits: ClassVar[Traits] = replace(DoubleControlVariate.traits, controls=False, stateful=False)

    def surrogate(self, site, signal, rows, state):
        own = site.probed.gradient
        probed = replace(site.probed, gradient=own.sum(0, keepdim=True) - (rows - 1) * own)
        parts = super().surrogate(replace(site, probed=probed), signal, rows, state)
        term = parts["guide"] - parts.pop("controls")["slope"].term
        return {"value": term, "guide": term, "controls": {}}


MEAN = "the mean gradient of .* over all .* outcomes: observed .*, expected"
PLANTED = [
    (WrongSign(), "bernoulli", MEAN),
    (WrongSign(), "two_level", MEAN),
    (BaselineOfAll(), "bernoulli", MEAN),
    (BaselineOfAll(), "linear_gaussian", MEAN),
    (BaselineOfAll(), "categorical", MEAN),
    (NotDetached(), "normal_normal", MEAN),
    (BaselineNotDetached(), "discrete_two_level", MEAN),
    (PlateScaleTwice(), "local_global_subsampled", MEAN),
    (PlatesSummed(), "categorical", MEAN),
    (Leaking(), "bernoulli", MEAN),
    (Leaking(), "subsampled", MEAN),
    (Undeclared(), "bernoulli", MEAN),
    (CouplingIgnored(), "bernoulli", MEAN),
    (CouplingIgnored(), "mixed_two_level", MEAN),
    (BaselineOfTheDraw(), "categorical", MEAN),
    (RestUnweighted(), "categorical", MEAN),
    (OrderIgnored(), "categorical", MEAN),
    (BaselineOfAllRows(), "categorical", MEAN),
    (SlopeOfItself(), "bernoulli_vector", MEAN),
    (HiddenState(), "bernoulli", "two evaluations with the same state and seed"),
    (OverwritesState(), "bernoulli", "changed the given state"),
    (GrowingState(), "bernoulli", "the state of site 'z_0' changes from"),
    (SilentState(), "bernoulli", r"traits\.stateful is False"),
    (LooksAtANumber(), "bernoulli", r"traits\.recordable is True"),
    (HalfPrecision(), "bernoulli", r"in torch\.float32, the gradient of"),
]


@pytest.mark.parametrize(
    ("estimator", "problem", "check"), PLANTED, ids=[f"{type(e).__name__}-{problem}" for e, problem, _ in PLANTED]
)
def test_check_estimator_catches(estimator: Estimator, problem: str, check: str):
    with pytest.raises(AssertionError, match=check) as caught:
        check_estimator(estimator, problems=[problem])
    assert type(estimator).__name__ in str(caught.value)
    assert repr(problem) in str(caught.value)


INVISIBLE = [
    (PlateScaleTwice(), "local_global"),
    (DetachedDistribution(), "two_level"),
    (PlatesSummed(), "bernoulli"),
]


@pytest.mark.parametrize(("estimator", "problem"), INVISIBLE, ids=[type(e).__name__ for e, _ in INVISIBLE])
def test_where_a_defect_cannot_be_seen(estimator: Estimator, problem: str):
    """Why the problems have to be as many as they are."""
    check_estimator(estimator, problems=[problem])


def test_sticking_by_a_detached_distribution_is_caught_at_the_posterior():
    assert_zero_at_posterior(DetachedDistribution(), normal_normal())
    with pytest.raises(AssertionError, match=r"DetachedDistribution.* at the posterior: gradient of 'loc'"):
        assert_zero_at_posterior(DetachedDistribution(), two_level())


def test_a_declared_bias_is_no_defect():
    @dataclass(frozen=True)
    class Declared(Undeclared):
        traits: ClassVar[Traits] = replace(Undeclared.traits, unbiased=False)

    rows = check_estimator(Declared(), problems=["bernoulli"])
    assert {row.how for row in rows} == {"biased"}


# Guides -------------------------------------------------------------------------------------------------------------


def skewed_model() -> None:
    pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("groups", 2, dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def loc() -> Tensor:
    return pyro.param("loc", lambda: torch.tensor([0.2, -0.3]))


def draw_rate() -> Tensor:
    return pyro.sample("rate", dist.LogNormal(pyro.param("m", lambda: torch.tensor(0.3)), 0.5))


def right() -> dict[str, Tensor]:
    rate = draw_rate()
    with pyro.plate("groups", 2, dim=-1):
        return {"rate": rate, "z": pyro.sample("z", dist.Normal(loc(), 0.7))}


class WiderThanItSays(dist.Normal):
    """Samples and density disagree by 20 %."""

    def rsample(self, sample_shape=()):
        return self.loc + 1.2 * (super().rsample(sample_shape) - self.loc)


def wider() -> dict[str, Tensor]:
    rate = draw_rate()
    with pyro.plate("groups", 2, dim=-1):
        return {"rate": rate, "z": pyro.sample("z", WiderThanItSays(loc(), torch.tensor(0.7)))}


class WithoutJacobian(dist.LogNormal):
    """The density of the logarithm."""

    def log_prob(self, value):
        return self.base_dist.log_prob(value.log())


def without_jacobian() -> dict[str, Tensor]:
    rate = pyro.sample("rate", WithoutJacobian(pyro.param("m", lambda: torch.tensor(0.3)), torch.tensor(0.5)))
    with pyro.plate("groups", 2, dim=-1):
        return {"rate": rate, "z": pyro.sample("z", dist.Normal(loc(), 0.7))}


def returns_nothing() -> None:
    right()


def returns_half() -> dict[str, Tensor]:
    return {"rate": right()["rate"]}


def returns_another_shape() -> dict[str, Tensor]:
    values = right()
    return {**values, "z": values["z"].sum()}


def outside_the_support() -> dict[str, Tensor]:
    rate = pyro.sample("rate", dist.Normal(pyro.param("m", lambda: torch.tensor(-3.0)), 0.5))
    with pyro.plate("groups", 2, dim=-1):
        return {"rate": rate, "z": pyro.sample("z", dist.Normal(loc(), 0.7))}


def counts_plates_from_the_left() -> dict[str, Tensor]:
    rate = draw_rate()
    with pyro.plate("groups", 2, dim=-1):
        return {"rate": rate, "z": pyro.sample("z", dist.Normal(loc() + rate.mean(), 0.7))}


def idle_parameter() -> dict[str, Tensor]:
    pyro.param("idle", lambda: torch.tensor(1.0))
    return right()


def scaled_alone() -> dict[str, Tensor]:
    with poutine.scale(scale=2.0):
        return right()


def masked_alone() -> dict[str, Tensor]:
    with poutine.mask(mask=torch.tensor([True, False])):
        return right()


def idle_auxiliary() -> dict[str, Tensor]:
    pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    return right()


def without_parameters() -> dict[str, Tensor]:
    rate = pyro.sample("rate", dist.LogNormal(torch.tensor(0.3), torch.tensor(0.5)))
    with pyro.plate("groups", 2, dim=-1):
        return {"rate": rate, "z": pyro.sample("z", dist.Normal(torch.zeros(2), 0.7))}


def deaf_to_parameters() -> dict[str, Tensor]:
    loc()
    return without_parameters()


GUIDES: list[tuple[Callable, str]] = [
    (wider, r"E_q\[h\(z\) / q\(z\)\]"),
    (without_jacobian, r"E_q\[h\(z\) / q\(z\)\]"),
    (returns_nothing, "returns NoneType, expected a dict"),
    (returns_half, r"returns \['rate'\], without \['z'\]"),
    (returns_another_shape, r"site 'z': the guide returns shape \(\), the model draws \(2,\)"),
    (outside_the_support, "site 'rate': the guide draws"),
    (counts_plates_from_the_left, "cannot be vectorized"),
    (idle_parameter, "parameter 'idle' gets no gradient"),
    (scaled_alone, "site 'rate': scale 1 in the model, 2 in the guide"),
    (masked_alone, "mask none in the model, 1 of 2 in the guide"),
    (idle_auxiliary, "site 'u': an auxiliary guide site"),
    (without_parameters, "no parameter that requires a gradient"),
    (deaf_to_parameters, r"none of the guide's parameters \['.*'\] gets a gradient"),
]


def test_a_right_guide_passes():
    check_guide(lambda model: right, skewed_model)


@pytest.mark.parametrize(("guide", "check"), GUIDES, ids=[guide.__name__ for guide, _ in GUIDES])
def test_check_guide_catches(guide: Callable, check: str):
    with pyro.validation_enabled(guide is not outside_the_support), pytest.raises(AssertionError, match=check):
        check_guide(lambda model: guide, skewed_model)


# Half-steps ---------------------------------------------------------------------------------------------------------


class Joint(steps.Gradient):
    """An E-step that moves theta too."""

    def expect(self, problem, state, *args, **kwargs):
        problem.step(None, args, kwargs)
        return state, GuidePosterior(problem.model, problem.guide, args, kwargs), Info()


class JointM(steps.Gradient):
    def maximise(self, problem, state, posterior, *args, **kwargs):
        problem.step(None, args, kwargs)
        return state, Info()


class MovesBuffers(steps.Gradient):
    """An E-step that runs the model once more in training mode: batch norm counts it."""

    def expect(self, problem, state, *args, **kwargs):
        result = super().expect(problem, state, *args, **kwargs)
        problem.loss.loss(problem.model, problem.guide, *args, **kwargs)
        return result


class Descends(steps.Gradient):
    def expect(self, problem, state, *args, **kwargs):
        result = super().expect(problem, state, *args, **kwargs)
        leaves = problem.parameters.leaves("guide")
        with torch.no_grad():
            for leaf in leaves.values():
                leaf += 0.2
        return result


class Idle(HalfStep):
    traits = Traits(slots=("E", "M"))

    def expect(self, problem, state, *args, **kwargs):
        return state, GuidePosterior(problem.model, problem.guide, args, kwargs), Info()

    def maximise(self, problem, state, posterior, *args, **kwargs):
        return state, Info()


class ReturnsALoss(steps.Gradient):
    def expect(self, problem, state, *args, **kwargs):
        return super().expect(problem, state, *args, **kwargs)[2].first_loss, Info()

    def maximise(self, problem, state, posterior, *args, **kwargs):
        return super().maximise(problem, state, posterior, *args, **kwargs)[1].first_loss


class InitReturnsATensor(steps.Gradient):
    def init(self, problem, state, *args, **kwargs):
        return torch.zeros(2)


class LeakingSleep(steps.Sleep):
    """Dreams that are attached to theta, and an update of all that they reach."""

    def expect(self, problem, state, *args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules["pyro_emvae.particles.simulate"], "held", lambda program: program)
            problem.step(None, args, kwargs, loss=self.dream)
        return state, GuidePosterior(problem.model, problem.guide, args, kwargs), Info()


class SleepsInTraining(steps.Sleep):
    """Dreams of the model in training mode: batch norm counts them."""

    def expect(self, problem, state, *args, **kwargs):
        result = super().expect(problem, state, *args, **kwargs)
        with poutine.block():
            problem.model(*args, **kwargs)
        return result


STEPS = [
    (LeakingSleep(), "E", "E-step .* moved 'decoder.*' of the model"),
    (SleepsInTraining(), "E", "E-step .* moved 'decoder.*running_mean' of the model"),
    (InitReturnsATensor(), "E", "`init` returned tensor"),
    (Joint(), "E", "E-step .* moved 'decoder.*' of the model"),
    (JointM(), "M", "M-step .* moved 'encoder.*|log_scale' of the guide"),
    (MovesBuffers(), "E", "E-step .* moved 'decoder.*running_mean' of the model"),
    (Descends(), "E", "took the exact ELBO .* expected a rise"),
    (Idle(), "E", "took the exact ELBO .* expected a rise"),
    (Idle(), "M", "took the exact ELBO .* expected a rise"),
    (ReturnsALoss(), "E", "`expect` returned"),
    (ReturnsALoss(), "M", "`maximise` returned"),
]


@pytest.mark.parametrize(("step", "slot", "check"), STEPS, ids=[f"{type(s).__name__}-{slot}" for s, slot, _ in STEPS])
def test_check_step_catches(step: HalfStep, slot: str, check: str):
    with pytest.raises(AssertionError, match=check):
        check_step(step, slot, num_steps=10)


class BatchWeights(steps.WakeSleep):
    """One weight for the whole batch, as in Pyro's `ReweightedWakeSleep`."""

    def expect(self, problem, state, *args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "softmax", lambda x, dim: x.sum(-1, keepdim=True).softmax(dim).expand_as(x))
            return super().expect(problem, state, *args, **kwargs)


class ScaleInsideTheWeights(steps.WakeSleep):
    """N/B times the log weights before they are normalised."""

    def expect(self, problem, state, *args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            softmax = torch.softmax
            patch.setattr(torch, "softmax", lambda x, dim: softmax(N / B * x, dim))
            return super().expect(problem, state, *args, **kwargs)


@pytest.mark.parametrize("step", [BatchWeights, ScaleInsideTheWeights])
def test_wake_phi_is_checked_against_all_outcomes(step: type[HalfStep]):
    with pytest.raises(AssertionError, match="the mean wake-phi gradient of 'weight' over all 64 outcomes"):
        assert_wake_phi(step(num_particles=K))
