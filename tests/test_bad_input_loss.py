r"""Bad input to `MonteCarloELBO`: a clear error that states what was observed, and nothing changed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor

from pyro_emvae import MonteCarloELBO
from pyro_emvae._checks import EmvaeError, EstimatorError, ModelError, NonFiniteError

X = torch.tensor([0.3, -1.2, 2.0])


def model(x: Tensor) -> None:
    k = pyro.sample("switch", dist.Bernoulli(0.4))
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(pyro.param("mean", lambda: torch.tensor(0.5)), 1.0))
        pyro.sample("x", dist.Normal(z + k, 0.8), obs=x)


def guide(x: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.3))
    pyro.sample("switch", dist.Bernoulli(logits=loc))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(loc * x, 0.7))


def evaluate(loss: MonteCarloELBO, model: Callable = model, guide: Callable = guide, x: Tensor = X) -> float:
    return loss.loss_and_grads(model, guide, x)


# Estimators ---------------------------------------------------------------------------------------------------------

NEAREST = [("pathwize", "pathwise"), ("leave_one_uot", "leave_one_out"), ("reinfroce", "reinforce"), ("atuo", "auto")]


@pytest.mark.parametrize(("typed", "meant"), NEAREST)
def test_unknown_estimator_names_the_nearest(typed, meant):
    with pytest.raises(EstimatorError, match=f"{typed}.*Did you mean '{meant}'"):
        MonteCarloELBO(estimator=typed)
    with pytest.raises(EstimatorError, match=f"{typed}.*Did you mean '{meant}'"):
        MonteCarloELBO(estimator={"z": typed})


def test_unknown_estimator_in_an_annotation():
    def annotated(x: Tensor) -> None:
        pyro.sample("switch", dist.Bernoulli(0.3), infer={"estimator": "leave_one_uot"})
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 0.7))

    with pytest.raises(EstimatorError, match=r"leave_one_uot.*Did you mean 'leave_one_out'"):
        evaluate(MonteCarloELBO(2), guide=annotated)


def test_unknown_objective_names_the_nearest():
    with pytest.raises(EmvaeError, match=r"'elbow'.*Did you mean 'elbo'"):
        MonteCarloELBO(objective="elbow")


@pytest.mark.parametrize("part", [3, 0.5, None, MonteCarloELBO, ["pathwise"]], ids=repr)
def test_what_is_no_estimator(part):
    with pytest.raises(EstimatorError, match=type(part).__name__):
        MonteCarloELBO(estimator=part)


def test_unknown_site_names_the_nearest():
    with pytest.raises(EstimatorError, match=r"'swich'.*Did you mean 'switch'"):
        evaluate(MonteCarloELBO(estimator={"swich": "score"}))


def test_pathwise_on_a_site_that_cannot():
    with pytest.raises(
        EstimatorError, match=r"site 'switch': got Bernoulli\(batch_shape=\(\)\) with has_rsample=False"
    ):
        evaluate(MonteCarloELBO(estimator="pathwise"))
    with pytest.raises(EstimatorError, match=r"site 'switch': got Bernoulli"):
        evaluate(MonteCarloELBO(estimator={"switch": "sticking_the_landing"}))


@pytest.mark.parametrize("estimator", ["leave_one_out", "rloo", {"switch": "leave_one_out"}], ids=str)
def test_leave_one_out_with_one_particle(estimator):
    with pytest.raises(EstimatorError, match=r"site 'switch': got num_particles=1\."):
        evaluate(MonteCarloELBO(1, estimator=estimator))


def test_partial_pathwise_on_a_sampler_without_a_residual():
    """Refused, or the same as pathwise; no crash."""
    one, two = MonteCarloELBO(estimator={"z": "pathwise"}), MonteCarloELBO(estimator={"z": "partial_pathwise"})
    evaluate(one)
    pyro.set_rng_seed(0)
    value = evaluate(one)
    pyro.set_rng_seed(0)
    try:
        assert evaluate(two) == pytest.approx(value)
    except EstimatorError as error:
        assert "'z'" in str(error)


def test_an_annotation_on_a_model_site():
    def annotated(x: Tensor) -> None:
        k = pyro.sample("switch", dist.Bernoulli(0.4), infer={"estimator": "score"})
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + k, 0.8), obs=x)

    with pytest.raises(EstimatorError, match=r"annotation at site 'switch': got infer=.* in the model"):
        evaluate(MonteCarloELBO(), model=annotated)
    evaluate(MonteCarloELBO(annotations=False), model=annotated)


@pytest.mark.parametrize("number", [0, -1, 2.0, True, "3", None], ids=repr)
def test_number_of_particles(number):
    with pytest.raises(EmvaeError, match=rf"num_particles: got {number!r}\."):
        MonteCarloELBO(num_particles=number)


# Every kind of misfit: what was seen, and an alternative that works ---------------------------------------------------


def all_kinds() -> None:
    b = pyro.sample("b", dist.Bernoulli(0.4))
    pyro.sample("below", dist.Bernoulli(0.3 + 0.2 * b))
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    pyro.sample("many", dist.Categorical(torch.ones(120_000)))
    bits = pyro.sample("bits", dist.Bernoulli(torch.full((40,), 0.5)).to_event(1))
    n = pyro.sample("n", dist.Poisson(2.0))
    loc = torch.tensor([0.0, 1.0])[b.long()] + z + k + bits.sum(-1) + n
    pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(0.3))


def all_kinds_guide() -> None:
    logit = pyro.param("logit", lambda: torch.tensor(0.2))
    b = pyro.sample("b", dist.Bernoulli(logits=logit))
    pyro.sample("below", dist.Bernoulli(logits=logit * (1 + b)))
    pyro.sample("z", dist.Normal(logit, 1.0))
    pyro.sample("k", dist.Categorical(logits=torch.stack([logit, -logit, 0 * logit])))
    pyro.sample("many", dist.Categorical(logits=logit * torch.ones(120_000)))
    pyro.sample("bits", dist.Bernoulli(logits=logit * torch.ones(40)).to_event(1))
    pyro.sample("n", dist.Poisson(logit.exp()))


MISFITS = {  # the site, its estimator, options, and what was observed
    "support, binary": ("k", "disarm", {}, r"site 'k': got Categorical\(batch_shape=\(2,\)\)"),
    "support, categorical": ("b", "unordered_set", {}, r"site 'b': got Bernoulli"),
    "support, discrete": ("z", "enumerated", {}, r"site 'z': got Normal"),
    "rsample": ("k", "pathwise", {}, r"got Categorical.*with has_rsample=False"),
    "noise of a normal": ("n", "antithetic", {}, r"got Poisson.*has_rsample=False"),
    "upstream": ("below", "arms", {}, r"site 'below'.*depends on the draw of 'b'"),
    "odd pairs": ("b", "disarm", {"num_particles": 3}, "their number is odd"),
    "too few particles": ("b", "arms", {"num_particles": 1}, r"got num_particles=1\."),
    "too few for a baseline": ("b", "leave_one_out", {"num_particles": 1}, r"got num_particles=1\."),
    "too many outcomes": ("many", "enumerated", {}, "it has 120,000 outcomes"),
    "too many outcomes of an event": ("bits", "enumerated", {}, r"an event of several elements has 1\.1e\+12 outcomes"),
    "no finite support": ("n", "enumerated", {}, r"got Poisson"),
    "an objective of several particles": ("b", "arms", {"objective": "iwae"}, "objective='iwae'"),
    "an objective of terms": ("b", "vimco", {}, "objective='elbo'"),
    "paths of one for several": ("z", "sticking_the_landing", {"objective": "iwae"}, "objective='iwae'"),
    "dreg of terms": ("z", "dreg", {}, "objective='elbo'"),
    "an index": ("b", "straight_through", {}, r"site 'b'.*the model's site 'x'.*cannot be differentiated"),
    "an index in between": ("b", "gumbel_softmax", {}, r"site 'b'"),
    "a bit downstream of a control variate": ("b", "rebar", {}, "guide site 'below' downstream"),
    "relaxed integers": ("k", "reinmax", {}, r"site 'k'.*integers"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_misfit_says_what_was_seen_and_its_alternative_works(case):
    site, estimator, options, observed = MISFITS[case]
    options = {"num_particles": 2, "max_plate_nesting": 0, "vectorize_particles": True, **options}

    def gradient(**changed) -> None:
        rows = dict.fromkeys(("b", "below", "z", "k", "many", "bits", "n"), "score") | changed["estimator"]
        MonteCarloELBO(**{**options, **changed, "estimator": rows}).loss_and_grads(all_kinds, all_kinds_guide)

    with pytest.raises(EstimatorError, match=observed) as caught:
        gradient(estimator={site: estimator})
    assert pyro.param("logit").unconstrained().grad is None
    fix = str(caught.value).rsplit(". ", 1)[-1]
    names, count = re.findall(r'"(\w+)"', fix), re.search(r"num_particles=(\d+)", fix)
    assert names or count, fix
    for name in names:
        gradient(estimator={site: name})
    if count:
        gradient(estimator={site: estimator}, num_particles=int(count[1]))


# Sites --------------------------------------------------------------------------------------------------------------


def without_z(x: Tensor) -> None:
    pyro.sample("switch", dist.Bernoulli(0.3))


def with_another(x: Tensor) -> None:
    guide(x)
    pyro.sample("zz", dist.Normal(0.0, 1.0))


def draws_the_data(x: Tensor) -> None:
    guide(x)
    pyro.sample("x", dist.Normal(0.0, 1.0))


def event_in_place_of_a_plate(x: Tensor) -> None:
    pyro.sample("switch", dist.Bernoulli(0.3))
    pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))


def outside_the_plate(x: Tensor) -> None:
    pyro.sample("switch", dist.Bernoulli(0.3))
    pyro.sample("z", dist.Normal(0.0, 1.0))


def twice(x: Tensor) -> None:
    guide(x)
    guide(x)


MISMATCHES = [
    (without_z, "site 'z': got no such site in the guide"),
    (with_another, r"site 'zz': got a site that the model lacks.*Did you mean 'z'"),
    (draws_the_data, "site 'x': got observed in the model"),
    (event_in_place_of_a_plate, "site 'z': got event_dim 1 in the guide and 0 in the model"),
    (outside_the_plate, r"site 'z': got shape \(\) in the guide and \(3,\) in the model"),
    (twice, "site 'switch': got a second sample statement"),
]


@pytest.mark.parametrize("num_particles", [1, 2])
@pytest.mark.parametrize(("other", "observed"), MISMATCHES, ids=[other.__name__ for other, _ in MISMATCHES])
def test_sites_that_do_not_match(other, observed, num_particles):
    with pytest.raises(ModelError, match=observed):
        evaluate(MonteCarloELBO(num_particles), guide=other)


def sized(size: int) -> tuple[Callable, Callable]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", size, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", size, dim=-1):
            pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.tensor(0.3)), 0.7))

    return model, guide


@pytest.mark.parametrize("num_particles", [1, 2])
def test_data_that_do_not_fit_the_plate(num_particles):
    with pytest.raises(ModelError, match=r"site 'x': got a value of shape \(3,\) under Normal with shape \(5,\)"):
        evaluate(MonteCarloELBO(num_particles), *sized(5))


def test_data_outside_the_support():
    def counts(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("rate", dist.LogNormal(pyro.param("loc", lambda: torch.tensor(0.3)), 0.7))

    with pytest.raises(ModelError, match=r"site 'x': got a value of shape \(3,\) under Poisson"):
        evaluate(MonteCarloELBO(), counts, guide)


# Not finite ---------------------------------------------------------------------------------------------------------


def infinite_factor(x: Tensor) -> None:
    model(x)
    pyro.factor("wall", torch.tensor(-math.inf))


def nan_datum(x: Tensor) -> None:
    with pyro.validation_enabled(False):
        model(x.where(x < 1.0, math.nan))


def zero_scale(x: Tensor) -> None:
    with pyro.validation_enabled(False):
        pyro.sample("switch", dist.Bernoulli(0.4))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(pyro.param("mean", lambda: torch.tensor(0.5)), 0.0))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)


def nan_draw(x: Tensor) -> None:
    with pyro.validation_enabled(False):
        pyro.sample("switch", dist.Bernoulli(logits=pyro.param("loc", lambda: torch.tensor(0.3))))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(math.nan * pyro.param("loc") * x, 0.7))


MODEL, GUIDE = model, guide
BAD = [
    (infinite_factor, guide, r"loss inf with a non-finite log density at the model's site 'wall'"),
    (nan_datum, guide, r"loss nan with a non-finite value at the model's site 'x'"),
    (zero_scale, guide, r"non-finite log density at the model's site 'z'"),
    (model, nan_draw, r"loss nan with a non-finite value at the guide's site 'z'"),
]


@pytest.mark.parametrize("estimator", ["auto", "pyro"])
@pytest.mark.parametrize(("model", "guide", "observed"), BAD, ids=["factor", "datum", "scale", "draw"])
def test_what_is_not_finite_names_the_first_site_and_moves_nothing(model, guide, observed, estimator):
    good, bad = MonteCarloELBO(estimator=estimator), MonteCarloELBO(estimator=estimator)
    optimizer = pyro.optim.Adam({"lr": 0.1})
    SVI(MODEL, GUIDE, optimizer, good).step(X)
    before = {name: pyro.param(name).detach().clone() for name in ("loc", "mean")}
    moments = {name: state["state"] for name, state in optimizer.get_state().items()}
    bad.state = good.state
    for method in (bad.loss, bad.differentiable_loss, bad.loss_and_grads, SVI(model, guide, optimizer, bad).step):
        arguments = (X,) if method.__name__ == "step" else (model, guide, X)
        with pytest.raises(NonFiniteError, match=observed), pyro.validation_enabled(guide is GUIDE):
            method(*arguments)
    assert bad.state == good.state
    for name, value in before.items():
        assert torch.equal(pyro.param(name), value)
        assert pyro.param(name).unconstrained().grad is None or not pyro.param(name).unconstrained().grad.any()
        after = optimizer.get_state()[name]["state"]
        assert all(torch.equal(after[0][k], moments[name][0][k]) for k in after[0])


def test_a_masked_nan_is_no_defect():
    """What a mask hides may be anything."""

    def masked(x: Tensor) -> None:
        keep = torch.isfinite(x)
        k = pyro.sample("switch", dist.Bernoulli(0.4))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.poutine.mask(mask=keep):
                pyro.sample("x", dist.Normal(z + k, 0.8), obs=x.where(keep, 0.0))

    value = evaluate(MonteCarloELBO(), model=masked, guide=lambda x: guide(X), x=torch.tensor([0.3, math.nan, 2.0]))
    assert math.isfinite(value)


@pytest.mark.parametrize("kl", ["exact", "", None])
def test_an_objective_without_that_kl(kl):
    from pyro_emvae.objectives import ELBO

    with pytest.raises(EmvaeError, match=f"kl={kl!r}"):
        ELBO(kl=kl)


def test_analytic_kl_needs_one_order():
    def reversed_guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 0.7))
        pyro.sample("switch", dist.Bernoulli(0.3))

    with pytest.raises(EmvaeError, match=r"\['z', 'switch'\] in the guide and \['switch', 'z'\] in the model"):
        evaluate(MonteCarloELBO(objective="elbo_analytic_kl"), guide=reversed_guide)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"estimator": "sticking_the_landing"}, "StickTheLanding"),
        ({"estimator": "adaptive_sticking"}, "AdaptiveSticking"),
        ({"estimator": "dreg", "objective": "iwae", "num_particles": 2}, "DReG"),
    ],
)
def test_a_flow_without_inverse(options, name):
    flow = dist.transforms.Planar(2)

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow]))

    with pytest.raises(EstimatorError, match=rf"{name}.*TransformedDistribution without an inverse"):
        MonteCarloELBO(**options, vectorize_particles=False).loss_and_grads(model, guide)
    MonteCarloELBO(estimator="pathwise").loss_and_grads(model, guide)
