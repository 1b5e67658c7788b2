r"""Values and densities per site, in one layout, against Pyro's own traces; what may be vectorized; `quiet`."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalMessenger
from torch import Tensor, nn

from pyro_emvae import MonteCarloELBO
from pyro_emvae._checks import ModelError
from pyro_emvae._registry import create, entries
from pyro_emvae.particles import (
    Particles,
    config_estimators,
    draw,
    hold_batch,
    quiet,
    reduce_to,
    replay,
    vectorizable,
)

X = torch.tensor([0.3, 1.7, -0.5, 0.9, 0.1, -1.0], dtype=torch.float64)
ZERO, ONE = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
KEEP = torch.tensor([True, False, True, True, False, True])


class Pair(NamedTuple):
    model: Callable[..., Any]
    guide: Callable[..., Any]


def normal(name: str, loc: Any = ZERO, scale: Any = ONE, **options: Any) -> Tensor:
    return pyro.sample(name, dist.Normal(loc, scale), **options)


# The zoo: one feature each --------------------------------------------------------------------------------------


def plain() -> Pair:
    return Pair(lambda: normal("x", normal("z"), obs=X[0]), lambda: normal("z", 0.3 * ONE, 0.7 * ONE))


def plated() -> Pair:
    def model():
        with pyro.plate("data", 6):
            normal("x", normal("z"), obs=X)

    def guide():
        with pyro.plate("data", 6):
            normal("z", 0.5 * X, 0.7 * ONE)

    return Pair(model, guide)


def local_and_global() -> Pair:
    def model():
        mu = normal("mu")
        with pyro.plate("data", 6):
            normal("x", normal("z", mu), obs=X)

    def guide():
        mu = normal("mu", 0.2 * ONE)
        with pyro.plate("data", 6):
            normal("z", 0.5 * (X + mu), 0.7 * ONE)

    return Pair(model, guide)


def nested() -> Pair:
    data = X.reshape(3, 2)

    def model():
        with pyro.plate("outer", 3, dim=-2):
            a = normal("a")
            with pyro.plate("inner", 2, dim=-1):
                normal("x", a + normal("b"), obs=data)

    def guide():
        with pyro.plate("outer", 3, dim=-2):
            a = normal("a", data.mean(-1, keepdim=True))
            with pyro.plate("inner", 2, dim=-1):
                normal("b", data - a, 0.5 * ONE)

    return Pair(model, guide)


def sequential() -> Pair:
    """A plate that is a Python loop."""

    def model():
        for i in pyro.plate("data", 3):
            normal(f"x{i}", normal(f"z{i}"), obs=X[i])

    def guide():
        for i in pyro.plate("data", 3):
            normal(f"z{i}", 0.5 * X[i])

    return Pair(model, guide)


def subsampled() -> Pair:
    def model():
        with pyro.plate("data", 6, subsample_size=2) as rows:
            normal("x", normal("z"), obs=X[rows])

    def guide():
        with pyro.plate("data", 6, subsample_size=2) as rows:
            normal("z", 0.5 * X[rows], 0.7 * ONE)

    return Pair(model, guide)


def scaled() -> Pair:
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 0.25], dtype=torch.float64)

    def model():
        with pyro.plate("data", 6):
            with poutine.scale(scale=0.3):
                z = normal("z")
            with poutine.scale(scale=weights):
                normal("x", z, obs=X)

    def guide():
        with pyro.plate("data", 6), poutine.scale(scale=0.3):
            normal("z", 0.5 * X)

    return Pair(model, guide)


def masked() -> Pair:
    def model():
        with pyro.plate("data", 6), poutine.mask(mask=KEEP):
            z = normal("z")
            pyro.sample("x", dist.Normal(z, 1.0).mask(KEEP.flip(0)), obs=X)

    def guide():
        with pyro.plate("data", 6), poutine.mask(mask=KEEP):
            normal("z", 0.5 * X)

    return Pair(model, guide)


def switched_off() -> Pair:
    def model():
        z = normal("z")
        with poutine.mask(mask=False):
            normal("off", z, obs=X[1])
        normal("x", z, obs=X[0])

    return Pair(model, plain().guide)


def partly_observed() -> Pair:
    def model():
        with pyro.plate("data", 6):
            normal("x", normal("z"), obs=X, obs_mask=KEEP)

    def guide():
        with pyro.plate("data", 6):
            normal("z", 0.5 * X)
            normal("x_unobserved", 0.1 * X)

    return Pair(model, guide)


def events() -> Pair:
    rows = X.reshape(2, 3)

    def model():
        eye = torch.eye(3, dtype=torch.float64)
        w = pyro.sample("w", dist.MultivariateNormal(eye.sum(0), eye))
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + w, 1.0).to_event(1), obs=rows)

    def guide():
        pyro.sample("w", dist.Normal(rows.mean(0), 1.0).to_event(1))
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(0.5 * rows, 0.8).to_event(1))

    return Pair(model, guide)


def auxiliary() -> Pair:
    def guide():
        u = normal("u", 0.1 * ONE, infer={"is_auxiliary": True})
        normal("z", u, 0.5 * ONE)

    return Pair(plain().model, guide)


def with_factor() -> Pair:
    def model():
        z = normal("z")
        pyro.deterministic("square", z**2)
        pyro.factor("penalty", -0.3 * z**2)
        with pyro.plate("data", 6):
            pyro.factor("each", -0.1 * (X - z) ** 2)
        normal("x", z, obs=X[0])

    return Pair(model, plain().guide)


def discrete() -> Pair:
    def model():
        with pyro.plate("data", 6):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)))
            normal("x", k.double(), obs=X)

    def guide():
        with pyro.plate("data", 6):
            pyro.sample("k", dist.Categorical(logits=torch.stack([X, -X, 0 * X], -1)))

    return Pair(model, guide)


def hierarchical() -> None:
    mu, tau = normal("mu"), pyro.sample("tau", dist.LogNormal(ZERO, ONE))
    with pyro.plate("data", 6):
        normal("x", normal("z", mu, tau), obs=X)


def auto_normal() -> Pair:
    return Pair(hierarchical, AutoNormal(hierarchical))


def auto_joint() -> Pair:
    return Pair(hierarchical, AutoMultivariateNormal(hierarchical))


def auto_messenger() -> Pair:
    return Pair(hierarchical, AutoNormalMessenger(hierarchical))


ZOO = {
    f.__name__: f
    for f in (
        plain,
        plated,
        local_and_global,
        nested,
        sequential,
        subsampled,
        scaled,
        masked,
        switched_off,
        partly_observed,
        events,
        auxiliary,
        with_factor,
        discrete,
        auto_normal,
        auto_joint,
        auto_messenger,
    )
}
every = pytest.mark.parametrize("name", ZOO)
each_vectorizable = pytest.mark.parametrize("name", [n for n in ZOO if n != "auto_messenger"])


def nesting(pair: Pair) -> int:
    with quiet(seed=0):
        return draw(*pair).max_plate_nesting


def indices(particles: Particles) -> dict[str, tuple[Tensor, None]]:
    return {name: (value, None) for name, value in particles.subsample.items()}


def given_values(particles: Particles, k: int) -> dict[str, Tensor]:
    """The values of one particle, as a single run has them."""
    return {n: one(particles, s, s.value, k, s.fn.event_dim) for n, s in particles.guide.items() if not s.is_observed}


def one(particles: Particles, site: Any, tensor: Tensor, k: int, event_dim: int = 0) -> Tensor:
    """Particle k of a value or a density: without the particle dim, and without dims left of the site's own plates."""
    if particles.num_particles == 1:
        return tensor
    full = particles.max_plate_nesting + 1 + event_dim
    spread = tensor.reshape((1,) * (full - tensor.dim()) + tensor.shape)
    single = spread[min(k, len(spread) - 1)]
    own = max([-f.dim for f in site.frames], default=0) + event_dim
    return single.reshape(single.shape[single.dim() - own :])


def log_densities(pair: Pair, values: dict[str, Tensor], batch: dict[str, Tensor]) -> tuple[float, float]:
    """log p and log q of given values by Pyro's own trace and condition."""
    with hold_batch(batch):
        guide = poutine.trace(poutine.condition(pair.guide, values)).get_trace()
        model = poutine.trace(poutine.condition(pair.model, values)).get_trace()
    guide.compute_log_prob()
    sites = [s for n, s in guide.nodes.items() if s["type"] == "sample" and n not in batch]
    log_q = sum(float(s["log_prob_sum"].detach()) for s in sites)
    return float(model.log_prob_sum().detach()), log_q


# Densities against Pyro -----------------------------------------------------------------------------------------


@each_vectorizable
def test_one_draw_has_pyros_densities(name):
    pair = ZOO[name]()
    particles = draw(*pair)
    log_p, log_q = log_densities(pair, given_values(particles, 0), particles.subsample)
    assert particles.log_p.shape == particles.log_q.shape == (1,)
    assert float(particles.log_p.detach()) == pytest.approx(log_p, rel=1e-12)
    assert float(particles.log_q.detach()) == pytest.approx(log_q, rel=1e-12)
    assert particles.first_non_finite() is None


def test_one_draw_of_a_messenger_guide_has_pyros_densities():
    pair = auto_messenger()
    draw(*pair)
    pyro.set_rng_seed(0)
    particles = draw(*pair)
    pyro.set_rng_seed(0)
    loss = infer.Trace_ELBO().loss(*pair)
    assert float((particles.log_q - particles.log_p).detach()) == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("vectorize", [True, False])
@each_vectorizable
def test_many_draws_are_many_single_runs(name, vectorize):
    """The densities of each particle are those of a run of its own, however it was drawn."""
    pair = ZOO[name]()
    particles = draw(*pair, num_particles=3, vectorize=vectorize, max_plate_nesting=nesting(pair))
    assert particles.log_p.shape == particles.log_q.shape == (3,)
    assert len(set(particles.log_q.tolist())) == 3
    if vectorize or not particles.subsample:
        for k in range(3):
            log_p, log_q = log_densities(pair, given_values(particles, k), particles.subsample)
            assert float(particles.log_p[k].detach()) == pytest.approx(log_p, rel=1e-12)
            assert float(particles.log_q[k].detach()) == pytest.approx(log_q, rel=1e-12)


@every
def test_a_loop_draws_what_single_runs_draw(name):
    pair = ZOO[name]()
    draw(*pair)
    pyro.set_rng_seed(1)
    singles = [draw(*pair) for _ in range(3)]
    pyro.set_rng_seed(1)
    together = draw(*pair, num_particles=3, vectorize=False)
    assert together.log_p.tolist() == [float(s.log_p.detach()) for s in singles]
    assert together.log_q.tolist() == [float(s.log_q.detach()) for s in singles]
    assert list(together.guide) == list(singles[0].guide) and list(together.model) == list(singles[0].model)


@each_vectorizable
def test_stacked_and_vectorized_runs_have_one_layout(name):
    pair = ZOO[name]()
    nest = nesting(pair)
    with quiet(seed=0):
        batch = draw(*pair).subsample
    with hold_batch(batch):
        looped = draw(*pair, num_particles=2, vectorize=False, max_plate_nesting=nest)
        values = {n: s.value for n, s in looped.guide.items() if not s.is_observed}
        together = replay(*pair, values, num_particles=2, max_plate_nesting=nest)
    for side in ("guide", "model"):
        assert list(getattr(looped, side)) == list(getattr(together, side))
        for site in getattr(looped, side).values():
            other = getattr(together, side)[site.name]
            one_, two = looped.rows(site.scaled), together.rows(other.scaled)
            assert one_.dim() == two.dim() == nest + 1
            torch.testing.assert_close(*torch.broadcast_tensors(one_, two), rtol=1e-12, atol=1e-12)
            assert {f.name for f in site.frames} == {f.name for f in other.frames}
    for name in looped.latents:
        assert torch.equal(looped.values(name), together.values(name))
    torch.testing.assert_close(looped.log_p, together.log_p, rtol=1e-12, atol=0)
    torch.testing.assert_close(looped.log_q, together.log_q, rtol=1e-12, atol=0)


SHAPES = {
    "plain": {"z": ()},
    "plated": {"z": (6,)},
    "local_and_global": {"mu": (), "z": (6,)},
    "nested": {"a": (3,), "b": (3, 2)},
    "subsampled": {"z": (2,)},
    "events": {"w": (3,), "z": (2, 3)},
    "discrete": {"k": (6,)},
}


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("count", [1, 4])
def test_values_are_handed_out_particles_first(name, count, vectorize):
    pair = ZOO[name]()
    particles = draw(*pair, num_particles=count, vectorize=vectorize, max_plate_nesting=nesting(pair))
    shapes = {n: tuple(particles.values(n).shape) for n in particles.latents}
    assert shapes == {n: (count, *shape) for n, shape in SHAPES[name].items()}


def test_scale_and_mask_stay_beside_the_density():
    particles = draw(*scaled())
    z, x = particles.model["z"], particles.model["x"]
    torch.testing.assert_close(z.log_prob, dist.Normal(ZERO, ONE).log_prob(z.value))
    torch.testing.assert_close(z.scaled, 0.3 * z.log_prob)
    torch.testing.assert_close(x.scaled[-1], 0.25 * x.log_prob[-1])
    site = draw(*masked()).model["z"]
    assert bool((site.log_prob != 0).all()) and ((site.scaled != 0) == KEEP).all()


def test_a_subsampled_plate_scales_and_tells_its_indices():
    particles = draw(*subsampled())
    site = particles.model["x"]
    assert site.scale == 3.0 and [(f.size, f.full_size) for f in site.frames] == [(2, 6)]
    assert set(particles.subsample) == {"data"} and len(particles.subsample["data"]) == 2
    torch.testing.assert_close(site.value, X[particles.subsample["data"]])
    assert draw(*plated()).subsample == {}


def test_a_held_batch_is_used_by_model_and_guide():
    rows = torch.tensor([4, 1])
    with hold_batch({"data": rows}):
        for _ in range(3):
            assert torch.equal(draw(*subsampled()).observed["x"].value, X[rows])


def test_sites_are_told_apart():
    particles = draw(*with_factor())
    assert list(particles.latents) == ["z"]
    assert list(particles.observed) == ["penalty", "each", "x"]
    assert particles.model["square"].is_deterministic and particles.model["square"].is_observed
    assert list(draw(*auxiliary()).guide) == ["u", "z"] and list(draw(*auxiliary()).latents) == ["z"]
    assert list(draw(*partly_observed()).latents) == ["z", "x_unobserved"]


def test_the_models_result_and_the_parameters_are_kept():
    def model():
        return normal("z", pyro.param("theta", ONE.clone())) + 1

    def guide():
        normal("z", pyro.param("phi", ONE.clone()))

    particles = draw(model, guide)
    assert torch.equal(particles.result, particles.values("z")[0] + 1)
    leaves = {side: set(named) for side, named in particles.params.items()}
    assert leaves == {"guide": {"phi"}, "model": {"theta"}}
    looped = draw(model, guide, num_particles=3)
    assert len(looped.result) == 3


@pytest.mark.parametrize("vectorize", [True, False])
def test_gradients_flow_through_the_layout(vectorize):
    pair = local_and_global()
    loc = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    def guide():
        mu = normal("mu", loc)
        with pyro.plate("data", 6):
            normal("z", 0.5 * (X + mu), 0.7 * ONE)

    particles = draw(pair.model, guide, num_particles=4, vectorize=vectorize, max_plate_nesting=1)
    (gradient,) = torch.autograd.grad((particles.log_p - particles.log_q).mean(), loc)
    mu, z = particles.values("mu").detach(), particles.values("z").detach()
    by_mu = -mu + (z - mu.unsqueeze(-1)).sum(-1)  # d log p / d mu at fixed z
    by_z = (X - z) - (z - mu.unsqueeze(-1))  # d log p / d z, and dz / d mu = 1/2
    torch.testing.assert_close(gradient, (by_mu + 0.5 * by_z.sum(-1)).mean(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", ["attach", "detach", "cut", "probe"])
def test_drawn_values_are_treated_as_asked(how):
    loc = torch.tensor(0.2, requires_grad=True)
    particles = draw(
        lambda: normal("x", normal("z").float(), obs=X[0].float()),
        lambda: (normal("z", loc), normal("y", 0 * loc.detach(), infer={"is_auxiliary": True})),
        treat=lambda msg: how,
    )
    site = particles.guide["z"]
    assert site.value.requires_grad == (how != "detach")
    assert site.value.is_leaf == (how != "attach")
    names = [leaf is s.value for _, leaf in particles.cuts[0] for s in particles.guide.values() if leaf is s.value]
    assert len(names) == {"attach": 0, "detach": 0, "cut": 1, "probe": 2}[how]
    for drawn, leaf in particles.cuts[0]:
        assert torch.equal(drawn, leaf) and leaf.is_leaf


# What does not fit ----------------------------------------------------------------------------------------------


def observes(make: Callable[[Tensor], Any], obs: Tensor) -> Callable[[], None]:
    def model():
        pyro.sample("x", make(normal("z")), obs=obs)

    return model


MISFITS = {
    "a name twice": (lambda: (normal("z"), normal("z")), "'z'.*second"),
    "a value outside the support": (observes(lambda z: dist.Poisson(z.exp()), -ONE), "'x'.*Poisson"),
    "a shape": (observes(lambda z: dist.Normal(z * torch.ones(4), 1.0).to_event(1), X), r"'x'.*\(6,\).*\(4,\)"),
}


@pytest.mark.parametrize("key", MISFITS)
def test_a_site_that_cannot_be_scored_is_named(key):
    model, observed = MISFITS[key]
    with pytest.raises(ModelError, match=observed):
        draw(model, plain().guide)


def test_runs_of_changing_structure_are_refused_where_they_are_stacked():
    calls = []

    def model():
        calls.append(1)
        normal("x" if len(calls) % 2 else "y", normal("z"), obs=X[0])

    assert draw(model, plain().guide).num_particles == 1
    with pytest.raises(ModelError, match="different sites"):
        draw(model, plain().guide, num_particles=2)


@pytest.mark.parametrize("where", ["guide", "model"])
def test_the_first_site_that_is_not_finite_is_named(where):
    bad = torch.tensor(float("nan"), dtype=torch.float64)

    def model():
        normal("x", normal("z") * (bad if where == "model" else 1.0), obs=X[0])

    def guide():
        normal("z", bad if where == "guide" else ZERO)

    with pyro.validation_enabled(False):
        found = draw(model, guide).first_non_finite()
    assert (
        found
        == {
            "guide": "a non-finite value at the guide's site 'z'",
            "model": "a non-finite log density at the model's site 'x'",
        }[where]
    )


def test_a_term_is_reduced_to_the_plates_of_a_target():
    particles = draw(*nested(), num_particles=3, vectorize=True, max_plate_nesting=2)
    x, a = particles.model["x"], particles.model["a"]
    reduced = reduce_to(x.log_prob, x.frames, a.frames)
    assert reduced.shape == (3, 3, 1)
    torch.testing.assert_close(reduced, x.log_prob.sum(-1, keepdim=True))
    assert reduce_to(x.log_prob, x.frames, ()).shape == (3, 1, 1)
    assert reduce_to(a.log_prob, a.frames, x.frames) is a.log_prob


# Vectorization --------------------------------------------------------------------------------------------------


@each_vectorizable
def test_what_indexes_from_the_right_is_vectorizable(name):
    pair = ZOO[name]()
    nest = nesting(pair)
    pyro.set_rng_seed(0)
    generator = torch.get_rng_state()
    assert vectorizable(*pair, (), {}) == (True, nest, "")
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("name", [entry.name for entry in entries("problem")])
def test_every_problem_is_vectorizable(name):
    problem = create("problem", name)
    agrees, nest, what = vectorizable(problem.model, problem.guide, problem.args, {})
    assert (agrees, nest, what) == (True, problem.max_plate_nesting, "")


@pytest.mark.parametrize(
    "prior",
    [
        dist.Categorical(torch.ones(2, 3)),
        dist.Bernoulli(torch.tensor([0.2, 0.5])),
        dist.OneHotCategorical(torch.ones(3)),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_the_second_particle_of_a_discrete_site_stays_in_its_support(prior):
    """Equal draws are moved to another value of the support, event dims or not."""
    fn, values = prior.to_event(len(prior.batch_shape)), []

    def model():
        with pyro.plate("data", 6):
            values.append(pyro.sample("z", fn))

    assert vectorizable(model, model, (), {}) == (True, 1, "")
    assert all(bool(fn.support.check(value).all()) for value in values) and len(values) > 3
    pairs = [value for value in values if len(value) == 2]
    assert pairs and all((one != two).any(-1).all() for one, two in pairs)


def reads(function: Callable[[Tensor], Tensor], *, obs: Tensor = X) -> Callable[[], None]:
    """A plated model that passes its latents through a function."""

    def model():
        with pyro.plate("data", 6):
            z = normal("z")
            normal("x", function(z), obs=obs)

    return model


def reads_the_first_row() -> None:
    with pyro.plate("data", 6):
        normal("x", normal("z")[0], obs=X)


UNVECTORIZABLE = {
    "mean": (reads(lambda z: z - z.mean()), "the model's site 'x'"),
    "sum": (reads(lambda z: z / (1 + z.abs().sum())), "the model's site 'x'"),
    "max": (reads(lambda z: z - z.max()), "the model's site 'x'"),
    "dim 0": (reads(lambda z: z.cumsum(0)), "the model's site 'x'"),
    "first": (reads_the_first_row, "the model's site 'x'"),
    "matrix": (reads(lambda z: torch.ones(6, 6, dtype=torch.float64) @ z), "in the vectorized run"),
    "length": (reads(lambda z: z * len(z)), "the model's site 'x'"),
    "reshape": (reads(lambda z: z.reshape(6)), "in the vectorized run"),
    "item": (reads(lambda z: z * z.sum().item()), "the model's site 'x'"),
}


@pytest.mark.parametrize("key", UNVECTORIZABLE)
def test_what_mixes_particles_is_found(key):
    model, what = UNVECTORIZABLE[key]
    agrees, _, found = vectorizable(model, plated().guide, (), {})
    assert not agrees and what in found


@pytest.mark.parametrize("seed", range(8))
def test_values_that_are_tried_lie_in_the_support(seed):
    """A second category beside 2 is 0 and not 3, inside an event too."""

    def model():
        c = pyro.sample("c", dist.Categorical(torch.ones(2, 3)).to_event(1))
        h = pyro.sample("h", dist.OneHotCategorical(torch.ones(3)))
        pyro.factor("f", torch.tensor([0.3, 1.0, -1.0])[c].sum(-1) + h @ torch.tensor([0.3, 1.0, -1.0]))

    def guide():
        pyro.sample("c", dist.Categorical(torch.ones(2, 3)).to_event(1))
        pyro.sample("h", dist.OneHotCategorical(torch.ones(3)))

    pyro.set_rng_seed(seed)
    assert vectorizable(model, guide, (), {})[0]


def test_a_guide_that_mixes_particles_is_found():
    def guide():
        mu = normal("mu", 0.2 * ONE)
        with pyro.plate("data", 6):
            normal("z", 0.5 * X + mu.mean(), 0.7 * ONE)

    agrees, _, found = vectorizable(local_and_global().model, guide, (), {})
    assert not agrees and "guide's site 'z'" in found


@pytest.mark.parametrize("key", ["mean", "reshape", "item"])
def test_the_loss_loops_with_one_warning_or_raises(key):
    model, _ = UNVECTORIZABLE[key]
    guide = plated().guide
    loss, looped = MonteCarloELBO(4), MonteCarloELBO(4, vectorize_particles=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = []
        for elbo in (loss, looped):
            pyro.set_rng_seed(0)
            results.append([elbo.loss(model, guide) for _ in range(3)])
    assert results[0] == results[1]
    assert len([w for w in caught if "one by one" in str(w.message)]) == 1
    with pytest.raises(ModelError, match="vectorize"):
        MonteCarloELBO(4, vectorize_particles=True).loss(model, guide)


def test_estimators_are_annotated_by_mapping_or_function():
    guide = local_and_global().guide
    for config in ({"z": "score"}, lambda msg: "score" if msg["name"] == "z" else None):
        sites = poutine.trace(config_estimators(guide, config)).get_trace().nodes
        assert sites["z"]["infer"] == {"estimator": "score"} and not sites["mu"]["infer"]


# Quiet ----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(2), nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return self.drop(self.norm(x))


def generators() -> tuple:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def consume(net: Net) -> list[float]:
    net(torch.arange(6.0).reshape(3, 2))
    return [torch.rand(1).item(), float(np.random.rand()), random.random()]


@pytest.mark.parametrize("train", [None, True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("error", [False, True])
def test_quiet_puts_everything_back(train, training, error):
    net = Net().train(training)
    inner, buffers = [], {n: (b, b.clone()) for n, b in net.named_buffers()}
    before = generators()
    try:
        with quiet(train=train):
            consume(net)
            inner += [net.training, net.norm.training]
            if error:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert inner == [training if train is None else train] * 2
    assert generators() == before
    assert {n: id(b) for n, b in net.named_buffers()} == {n: id(b) for n, (b, _) in buffers.items()}
    assert all(torch.equal(b, buffers[n][1]) for n, b in net.named_buffers())
    assert net.training == net.norm.training == net.drop.training == training


def test_quiet_goes_on_from_the_present_state_or_from_a_seed():
    pyro.set_rng_seed(3)
    net = Net()
    with quiet():
        here = consume(net)
    assert consume(Net()) == here
    with quiet(seed=5):
        seeded = consume(net)
    pyro.set_rng_seed(9)
    with quiet(seed=5):
        assert consume(net) == seeded


@pytest.mark.parametrize("validate", [None, True, False])
def test_quiet_sets_validation_meanwhile(validate):
    with quiet(validate=validate):
        assert infer.is_validation_enabled() == (validate if validate is not None else True)
    assert infer.is_validation_enabled()


def test_quiet_nests():
    net = Net().train()
    before = generators()
    with quiet(train=False):
        consume(net)
        with quiet(train=True):
            consume(net)
            assert net.training
        assert not net.training
    assert net.training and generators() == before and float(net.count) == 0.0


def test_quiet_leaves_modes_that_the_code_itself_has_set():
    net = Net().train()
    with quiet():
        net.eval()
        consume(net)
        net.train()
    assert net.training and net.norm.training
