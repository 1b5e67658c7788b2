r"""The E-step by natural gradients: closed forms, coordinate ascent, minibatches, refusals."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_emvae import EM, annealing, families, guides, steps
from pyro_emvae._checks import EmvaeError
from pyro_emvae._registry import create, entries
from pyro_emvae.posterior import MeanFieldPosterior
from pyro_emvae.testing import assert_mean, check_step

X = torch.tensor([3.0, 4.0, 2.0, 0.0, 7.0], dtype=torch.float64)
ROOT = torch.tensor([[1.0, 0.0], [0.7, 0.4]], dtype=torch.float64)


def plated(prior, likelihood):
    """Return a model with a latent and a datum per row."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(x))
            pyro.sample("x", likelihood(z), obs=x)

    return model


def correlated(x: Tensor) -> None:
    """A vector whose posterior precision is I + A^T A."""
    z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z @ ROOT, 0.5).to_event(1), obs=x[:2])


def shares(x: Tensor) -> None:
    p = pyro.sample("z", dist.Dirichlet(x.new_tensor([1.0, 2.0, 0.5])))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Categorical(p), obs=x.long() % 3)


def normal(x: Tensor) -> dict[str, Tensor]:
    return {"mean": (x / 0.25 + 1.0) / 5.0, "variance": torch.full_like(x, 0.2)}


def correlated_moments(x: Tensor) -> dict[str, Tensor]:
    covariance = torch.linalg.inv(torch.eye(2).double() + 4 * ROOT @ ROOT.T)
    return {"mean": covariance @ ROOT @ (4 * x[:2]), "covariance_matrix": covariance}


def given_three(x: Tensor) -> Tensor:
    """The posterior of three classes at -1, 2 and 5."""
    logits = dist.Normal(x.new_tensor([-1.0, 2.0, 5.0]), 1.5).log_prob(x[:, None]) + x.new_tensor([0.2, 0.5, 0.3]).log()
    return logits.softmax(-1)


PLACES = torch.tensor([-1.0, 2.0, 5.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
NORMAL = plated(lambda x: dist.Normal(x.new_ones(()), 1.0), lambda z: dist.Normal(z, 0.5))
CLOSED = {
    "normal": (NORMAL, "normal", normal),
    "full_rank_normal of numbers": (NORMAL, "full_rank_normal", normal),
    "full_rank_normal": (correlated, "full_rank_normal", correlated_moments),
    "log_normal": (
        plated(lambda x: dist.LogNormal(x.new_ones(()), 1.0), lambda z: dist.Normal(z.log(), 0.5)),
        "log_normal",
        lambda x: {"loc": normal(x)["mean"], "scale": normal(x)["variance"].sqrt()},
    ),
    "gamma": (
        plated(lambda x: dist.Gamma(x.new_tensor(2.0), 3.0), dist.Poisson),
        "gamma",
        lambda x: {"concentration": x + 2, "rate": torch.full_like(x, 4.0)},
    ),
    "beta": (
        plated(lambda x: dist.Beta(x.new_tensor(2.0), 3.0), lambda z: dist.Binomial(8, z)),
        "beta",
        lambda x: {"concentration1": x + 2, "concentration0": 8 - x + 3},
    ),
    "dirichlet": (
        shares,
        "dirichlet",
        lambda x: {"concentration": x.new_tensor([1.0, 2.0, 0.5]) + torch.bincount(x.long() % 3, minlength=3)},
    ),
    "bernoulli": (
        plated(lambda x: dist.Bernoulli(x.new_tensor(0.3)), lambda z: dist.Normal(4 * z, 2.0)),
        "bernoulli",
        lambda x: {"logits": x.new_tensor(0.3 / 0.7).log() + (8 * x - 16) / 8},
    ),
    "categorical": (
        plated(lambda x: dist.Categorical(WEIGHTS), lambda z: dist.Normal(PLACES[z], 1.5)),
        "categorical",
        lambda x: {"probs": given_three(x)},
    ),
    "one_hot": (
        plated(lambda x: dist.OneHotCategorical(WEIGHTS), lambda z: dist.Normal(z @ PLACES, 1.5)),
        "one_hot",
        lambda x: {"probs": given_three(x)},
    ),
}


def moved(model, family, x, **options):
    """Return a guide of free parameters after one E-step."""
    guide = guides.AutoMeanField(model, family)
    em = EM(model, guide, e_step=steps.NaturalGradient(**options), m_step=steps.Fixed())
    em.step(x)
    return guide


def q_of(guide, x):
    """Return the guide's distribution at its only latent."""
    fn = poutine.trace(guide).get_trace(x).nodes["z"]["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


@pytest.mark.parametrize("num_particles", [1, 7])
@pytest.mark.parametrize("name", CLOSED)
def test_one_step_of_rate_1_is_the_exact_posterior(name, num_particles):
    """Whatever the draws: the log joint is affine in the statistics."""
    model, family, expected = CLOSED[name]
    fn = q_of(moved(model, family, X, rate=1.0, num_particles=num_particles), X)
    for key, value in expected(X).items():
        found = getattr(fn, key).detach().reshape(value.shape)
        assert torch.allclose(found, value, rtol=1e-10, atol=1e-10), key


@pytest.mark.parametrize("name", CLOSED)
def test_a_part_of_a_step_is_linear_in_natural_parameters(name):
    """The log density of the result is a mixture of those before and after a whole step, but for a constant."""
    model, family, _ = CLOSED[name]
    whole, part = (moved(model, family, X, rate=rate) for rate in (1.0, 0.3))
    start = guides.AutoMeanField(model, family)
    start(X)
    fns = [q_of(guide, X) for guide in (start, whole, part)]
    with torch.no_grad():
        values = torch.stack([fns[0].sample() for _ in range(6)])
        before, after, found = (fn.log_prob(values) for fn in fns)
    rest = found - 0.7 * before - 0.3 * after
    assert torch.allclose(rest, rest[:1].expand_as(rest), atol=1e-7)


def test_every_registered_family_has_a_chart_or_none():
    """A chart begins at its member: its context is the one that it was made of, and t has a density of that form."""
    found = [entry.name for entry in entries("family") if chart_of(entry.name) is not None]
    assert sorted(found) == sorted({name.split(" ")[0] for name in CLOSED})


def chart_of(name):
    sites = {"categorical": dist.Categorical(WEIGHTS), "one_hot": dist.OneHotCategorical(WEIGHTS)}
    family, shape = create("family", name), torch.Size([3] if name in ("dirichlet", "one_hot") else [])
    if name in sites:
        family = family.for_site("z", sites[name])
    if name in ("flow", "mixture", "von_mises"):
        return family.chart(torch.zeros(2), shape)
    context = 0.3 * torch.randn(4, family.num_features(shape), dtype=torch.float64)
    chart = family.chart(context, shape)
    if chart is not None:
        pair = [family.distribution(c, shape) for c in (context, chart.context(chart.eta))]
        value = pair[0].sample()
        assert torch.allclose(pair[0].log_prob(value), pair[1].log_prob(value), rtol=1e-9)
    return chart


@pytest.mark.parametrize("family", ["normal", "full_rank_normal"])
def test_an_unconstrained_value_is_moved_as_the_log_normal_is(family):
    model, _, expected = CLOSED["log_normal"]
    trace = poutine.trace(moved(model, family, X, rate=1.0)).get_trace(X)
    fn = trace.nodes["z_unconstrained"]["fn"]
    fn = getattr(fn, "base_dist", fn)
    for key, value in {"mean": expected(X)["loc"], "variance": expected(X)["scale"].square()}.items():
        assert torch.allclose(getattr(fn, key).detach().reshape(value.shape), value, rtol=1e-10)


# Several latents ------------------------------------------------------------------------------------------------


def coupled(x: Tensor) -> None:
    tau = pyro.sample("tau", dist.Gamma(x.new_tensor(3.0), 2.0))
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 3.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.4)))
        pyro.sample("x", dist.Normal(mu + 3 * k, tau.rsqrt()), obs=x)


def test_natural_parameters_are_right_in_the_mean_over_the_draws_of_others():
    r"""Of mu: $\sum_n(x_n-3p_n)$ and $1/9+N$, with the factor of k as it starts."""

    def model(x: Tensor) -> None:
        mu = pyro.sample("z", dist.Normal(x.new_zeros(()), 3.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.4)))
            pyro.sample("x", dist.Normal(mu + 3 * k, 1.0), obs=x)

    pyro.set_rng_seed(0)
    guide = guides.AutoMeanField(model, families.Normal(init_scale=1.0))
    em = EM(model, guide, e_step=steps.NaturalGradient(1.0, num_particles=500), m_step=steps.Fixed())
    guide(X)
    start = {name: p.detach().clone() for name, p in guide.state_dict().items()}
    p, found = guide_distributions(guide)["k"].probs, []
    for _ in range(80):
        guide.load_state_dict(start)
        em.step(X)
        fn = guide_distributions(guide)["z"]
        found.append(torch.stack([fn.mean / fn.variance, 1 / fn.variance]))
    expected = torch.stack([(X - 3 * p).sum(), torch.tensor(1 / 9 + len(X)).double()])
    assert_mean(torch.stack(found), expected, detect=0.15 * expected)


def counted(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Poisson(z.exp()), obs=x)


def best(model, x, **options) -> MeanFieldPosterior:
    return steps.MeanField(tol=1e-10, **options).infer(model, (x,), {})


@pytest.mark.parametrize("subsample", [False, True])
def test_coupled_latents_go_where_coordinate_ascent_does(subsample):
    """With rates that fall; the same with minibatches, whose rows take steps of the same length."""

    def model(x: Tensor) -> None:
        tau = pyro.sample("tau", dist.Gamma(x.new_tensor(3.0), 2.0))
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 3.0))
        with pyro.plate("data", len(x), subsample_size=4 if subsample else None) as rows:
            k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.4)))
            pyro.sample("x", dist.Normal(mu + 3 * k, tau.rsqrt()), obs=x[rows])

    pyro.set_rng_seed(0)
    start = {"mu": dist.Normal(torch.tensor(0.5).double(), 0.5)}
    expected = best(coupled, X, init=start)
    guide = guides.AutoMeanField(model, {"tau": "gamma"})
    e_step = steps.NaturalGradient(0.7, num_particles=20, delay=10.0, forgetting=1.0)
    em = EM(model, guide, e_step=e_step, m_step=steps.Fixed())
    for _ in range(200 if subsample else 100):
        em.step(X)
    q = guide_distributions(guide)
    tau, mu = expected.marginal("tau"), expected.marginal("mu")
    assert float(dist.kl.kl_divergence(q["tau"], tau)) < 1e-2
    assert float(dist.kl.kl_divergence(q["mu"], mu)) < 1e-2
    assert torch.allclose(q["k"].probs, expected.marginal("k").probs, atol=0.04 if subsample else 0.02)


def guide_distributions(guide):
    """Return the distributions of all data, by site."""
    found = {}
    for site in guide.sites:
        context = site.table.whole(getattr(guide.contexts, site.key)).detach()
        fn = site.family.distribution(context, site.event_shape)
        found[site.name] = fn.base_dist if hasattr(fn, "base_dist") else fn
    return found


def test_a_model_that_is_not_conjugate():
    """Poisson counts of a log rate: the best normal, as quadrature finds it."""
    pyro.set_rng_seed(0)
    expected = best(counted, X, update="natural_gradient").marginal("z")
    guide = guides.AutoMeanField(counted)
    e_step = steps.NaturalGradient(0.5, num_particles=50, delay=5.0, forgetting=0.9)
    em = EM(counted, guide, e_step=e_step, m_step=steps.Fixed())
    for _ in range(100):
        em.step(X)
    with torch.no_grad():
        assert float(dist.kl.kl_divergence(q_of(guide, X), expected).max()) < 1e-3


def test_it_raises_the_objective_and_moves_the_guide_alone():
    def model(x: Tensor) -> None:
        theta = pyro.param("theta", torch.tensor(0.3, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = guides.AutoMeanField(model)
    guide(X)
    check_step(steps.NaturalGradient(), "E", problem=(model, guide, X), num_steps=5)


# Minibatches ----------------------------------------------------------------------------------------------------


def in_rows(x: Tensor, rows: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 3.0))
    with pyro.plate("genes", 3, dim=-2), pyro.plate("data", len(x), subsample=rows, dim=-1) as index:
        z = pyro.sample("z", dist.Normal(x.new_ones(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[index].expand(3, -1))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=x[index].expand(3, -1))


def test_rows_outside_a_minibatch_stay_bit_for_bit_and_others_move_as_on_their_own():
    guide = guides.AutoMeanField(in_rows)
    em = EM(in_rows, guide, e_step=steps.NaturalGradient(rate=1.0), m_step=steps.Fixed())
    rows = torch.tensor([3, 1])
    guide(X, rows)
    before = guide.contexts.z.detach().clone()
    em.step(X, rows)
    after = guide.contexts.z.detach()
    rest = [0, 2, 4]
    assert torch.equal(after[rest], before[rest]) and not bool((after[rows] == before[rows]).any())
    q = guide_distributions(guide)
    assert torch.allclose(q["z"].variance[:, rows], torch.tensor(0.2, dtype=torch.float64))
    assert torch.allclose(q["mu"].variance.reciprocal(), 1 / torch.tensor(9.0).double() + 3 * 5)


def test_both_plates_in_minibatches():
    def model(x: Tensor) -> None:
        genes = pyro.plate("genes", 4, subsample=torch.tensor([2, 0]), dim=-2)
        with genes as g, pyro.plate("data", len(x), subsample=torch.tensor([4, 1]), dim=-1) as i:
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[i] + g[:, None])

    guide = moved(model, None, X, rate=1.0)
    q = guide_distributions(guide)["z"]
    inside = torch.zeros(4, 5, dtype=torch.bool)
    inside[torch.tensor([[2], [0]]), torch.tensor([4, 1])] = True
    expected = 0.8 * (X + torch.arange(4)[:, None])
    assert torch.allclose(q.mean[inside], expected[inside])
    assert not bool(torch.isclose(q.variance[~inside], torch.tensor(0.2).double()).any())


def test_masked_rows_stay():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=x < 5):
            z = pyro.sample("z", dist.Normal(x.new_ones(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    start = guides.AutoMeanField(model)
    start(X)
    guide = moved(model, None, X, rate=1.0)
    assert torch.equal(guide.contexts.z[4], start.contexts.z[4])
    assert torch.allclose(q_of(guide, X).mean[:4], normal(X)["mean"][:4])


# Refusals -------------------------------------------------------------------------------------------------------


def meeting(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.4)))
    pyro.sample("x", dist.Normal(k.sum(-1, keepdim=True), 1.0), obs=x[0])


def neighbours(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.4)))
        pyro.sample("x", dist.Normal(k + k.roll(1, -1), 1.0), obs=x)


def by_hand(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, pyro.param("s", x.new_ones(()))))


REFUSED = {
    "another guide": (counted, lambda model: by_hand, "by_hand"),
    "no exponential family": (counted, lambda model: guides.AutoMeanField(model, families.StudentT()), "StudentT"),
    "elements that meet": (meeting, guides.AutoMeanField, "'x'"),
    "neighbours": (neighbours, guides.AutoMeanField, "'x'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_move_is_refused_and_nothing_moves(name):
    model, make, observed = REFUSED[name]
    pyro.set_rng_seed(1)
    guide = make(model)
    em = EM(model, guide, e_step=steps.NaturalGradient(), m_step=steps.Fixed())
    em.engine.setup((X,), {})
    before = [row.leaf.detach().clone() for row in em.blocks.rows]
    with pytest.raises(steps.base.StepError, match=observed):
        em.step(X)
    assert all(torch.equal(row.leaf, old) for row, old in zip(em.blocks.rows, before, strict=True))


def test_steps_are_shorter_where_they_lead_to_no_density():
    """A log joint that is convex where the guide starts: the rows there move by less, and all stay densities."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(1.0, x.new_zeros(()), 0.1))
            pyro.sample("x", dist.Normal(z, 3.0), obs=x)

    pyro.set_rng_seed(0)
    guide = moved(model, families.Normal(init_scale=0.5), X, rate=1.0, num_particles=100)
    q = q_of(guide, X)
    assert bool(torch.isfinite(q.mean).all()) and bool((q.stddev > 0).all())


# Scales and errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 3000])
def test_a_bit_goes_as_far_in_a_minibatch(size):
    """The plate's scale says nothing of its rows, however large it is."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", size, subsample=torch.arange(3)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("x", dist.Normal(2 * z - 1, 1.0), obs=x)

    pyro.clear_param_store()
    x = torch.tensor([3.0, -3.0, 0.5], dtype=torch.float64)
    em = EM(
        model, guides.AutoMeanField(model, "bernoulli"), e_step=steps.NaturalGradient(rate=1.0), m_step=steps.Fixed()
    )
    em.step(x)
    assert torch.allclose(em.posterior(x).marginal("z").logits.double(), 2 * x, atol=1e-5)


def test_the_entropy_counts_with_the_guides_scale():
    """Under a prior that counts a tenth, the optimum of the ELBO has the precision 0.1 + 3."""

    def model(x: Tensor) -> None:
        with poutine.scale(scale=0.1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    pyro.clear_param_store()
    x = torch.tensor([0.3, -1.2, 0.9], dtype=torch.float64)
    em = EM(model, guides.AutoMeanField(model, "normal"), e_step=steps.NaturalGradient(rate=1.0), m_step=steps.Fixed())
    em.step(x)
    q = em.posterior(x).marginal("z")
    assert float(q.variance.detach()) == pytest.approx(1 / 3.1, rel=1e-6)
    assert float(q.mean.detach()) == pytest.approx(0.0, abs=1e-6)


def test_after_an_error_the_guide_is_as_before():
    fails = [False]

    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        late = fails[0] and b.requires_grad
        pyro.sample("x", dist.Normal(b * (torch.nan if late else 1.0), 1.0), obs=x[0])

    pyro.clear_param_store()
    guide = guides.AutoMeanField(model, "normal")
    em = EM(model, guide, e_step=steps.NaturalGradient(num_steps=2), m_step=steps.Fixed())
    em.step(X)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    fails[0] = True
    with pytest.raises(ValueError, match="invalid values"):
        em.step(X)
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    fails[0] = False
    with pytest.raises(EmvaeError, match=r"anneal= with \[NaturalGradient"):
        em.run(X, max_iter=20, anneal=annealing.Geometric(10))
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
