r"""Exact answers against the Pyro model and guide themselves: enumeration, quadrature, Gaussian algebra."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from scipy import integrate, stats
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from pyro_emvae import problems
from pyro_emvae._checks import EmvaeError, ModelError
from pyro_emvae._registry import create, entries
from pyro_emvae.problems import exact_gradients

NAMES = [entry.name for entry in entries("problem")]
FACTORIES = {entry.name: entry.factory for entry in entries("problem")}
BY_NAME = {name: create("problem", name) for name in NAMES}


def having(condition):
    """Return the names of the problems for which `condition` holds."""
    return [name for name, problem in BY_NAME.items() if condition(problem)]


def is_gaussian(problem):
    marginals = problem.posterior().values() if problem.posterior else ()
    return bool(marginals) and all(isinstance(d, Normal | MultivariateNormal) for d in marginals)


EXACT_ELBO = having(lambda p: p.elbo)
GAUSSIAN = having(lambda p: is_gaussian(p) and not p.traits.subsampled)
DISCRETE = having(lambda p: p.traits.support == "discrete")
MIXED = having(lambda p: p.traits.support == "mixed")
POSITIVE = having(lambda p: p.posterior and isinstance(next(iter(p.posterior().values())), dist.Gamma))


def log_joint(program, problem, values):
    return poutine.trace(poutine.condition(program, values)).get_trace(*problem.args).log_prob_sum()


def latent_values(problem):
    """Return one draw of the guide's latent sites, in the order of the guide."""
    trace = poutine.trace(problem.guide).get_trace(*problem.args)
    return {name: trace.nodes[name]["value"].detach() for name in problem.sites}


def unflatten(flat, values):
    pieces = flat.split([value.numel() for value in values.values()])
    return {name: piece.reshape(value.shape) for (name, value), piece in zip(values.items(), pieces, strict=True)}


def gaussian(program, problem, fixed=None):
    """Return mean, covariance and log normaliser of a log joint that is quadratic in the (unmasked) latents."""
    fixed = fixed or {}
    values = {name: value for name, value in latent_values(problem).items() if name not in fixed}

    def f(flat):
        return log_joint(program, problem, {**unflatten(flat, values), **fixed})

    start = torch.cat([torch.zeros_like(value).flatten() for value in values.values()]).requires_grad_()
    (gradient,) = torch.autograd.grad(f(start), start)
    hessian = torch.autograd.functional.hessian(f, start)
    keep = hessian.abs().sum(0) > 0
    covariance = torch.linalg.inv(-hessian[keep][:, keep])
    mean = torch.zeros_like(start).masked_scatter(keep, covariance @ gradient[keep]).detach()
    constant = 0.5 * int(keep.sum()) * math.log(2 * math.pi) + 0.5 * torch.logdet(covariance)
    return mean, covariance, keep, (f(mean) + constant).detach()


def gaussian_kl(q, p):
    (q_mean, q_covariance, keep, _), (p_mean, p_covariance, _, _) = q, p
    return kl_divergence(MultivariateNormal(q_mean[keep], q_covariance), MultivariateNormal(p_mean[keep], p_covariance))


@pytest.mark.parametrize("name", GAUSSIAN)
def test_gaussian_evidence_posterior_and_gap_follow_from_the_log_joint(name):
    problem = BY_NAME[name]
    p, q = gaussian(problem.model, problem, None), gaussian(problem.guide, problem)
    mean, covariance, keep, log_evidence = p
    torch.testing.assert_close(q[3], torch.zeros_like(q[3]), rtol=0, atol=1e-9)
    torch.testing.assert_close(problem.log_evidence(), log_evidence, rtol=1e-10, atol=1e-10)
    gap = problem.log_evidence() - problem.elbo()
    torch.testing.assert_close(gap, gaussian_kl(q, p), rtol=1e-10, atol=1e-10)
    marginals = [problem.posterior()[site] for site in latent_values(problem)]
    means = torch.cat([d.mean.flatten() for d in marginals])
    variances = torch.cat([d.variance.flatten() for d in marginals])
    torch.testing.assert_close(means[keep], mean[keep], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(variances[keep], covariance.diag(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MIXED)
def test_mixed_evidence_posterior_and_gap_follow_from_the_log_joint(name):
    problem = BY_NAME[name]
    p = [gaussian(problem.model, problem, {"k": torch.tensor(k, dtype=torch.float64)}) for k in range(2)]
    q = [gaussian(problem.guide, problem, {"k": torch.tensor(k, dtype=torch.float64)}) for k in range(2)]
    log_p, log_q = torch.stack([part[3] for part in p]), torch.stack([part[3] for part in q])
    torch.testing.assert_close(problem.log_evidence(), log_p.logsumexp(0), rtol=1e-10, atol=1e-10)
    gap = sum(log_q[k].exp() * (log_q[k] - log_p.log_softmax(0)[k] + gaussian_kl(q[k], p[k])) for k in range(2))
    torch.testing.assert_close(problem.log_evidence() - problem.elbo(), gap, rtol=1e-10, atol=1e-10)
    weights, posterior = log_p.softmax(0), problem.posterior()
    torch.testing.assert_close(posterior["k"].mean, weights[1], rtol=1e-10, atol=0)
    mean = sum(weights[k] * p[k][0].squeeze() for k in range(2))
    second = sum(weights[k] * (p[k][0].squeeze() ** 2 + p[k][1].squeeze()) for k in range(2))
    torch.testing.assert_close(posterior["z"].mean, mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(posterior["z"].variance, second - mean**2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_evidence_posterior_and_gap_follow_by_brute_force(name):
    problem = BY_NAME[name]
    values = latent_values(problem)
    marginals = problem.posterior()
    categories = {site: getattr(marginals[site], "_num_events", 2) for site in values}
    cells = [range(categories[site]) for site, value in values.items() for _ in range(value.numel())]
    kinds = torch.cat([value.flatten() for value in values.values()]).dtype
    outcomes = torch.tensor(list(itertools.product(*cells)), dtype=kinds)
    rows = [unflatten(row, values) for row in outcomes]
    log_p = torch.stack([log_joint(problem.model, problem, row) for row in rows]).detach()
    log_q = torch.stack([log_joint(problem.guide, problem, row) for row in rows]).detach()
    torch.testing.assert_close(log_q.logsumexp(0), torch.zeros_like(log_q[0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(problem.log_evidence(), log_p.logsumexp(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(problem.elbo(), (log_q.exp() * (log_p - log_q)).sum(), rtol=1e-12, atol=0)
    weights = log_p.softmax(0)
    for site, d in marginals.items():
        drawn = torch.stack([row[site] for row in rows])
        frequencies = [torch.tensordot(weights, (drawn == c).double(), 1) for c in range(categories[site])]
        probs = d.probs if isinstance(d, dist.Categorical) else torch.stack([1 - d.mean, d.mean], dim=-1)
        torch.testing.assert_close(probs, torch.stack(frequencies, dim=-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", having(lambda p: p.traits.enumerable))
def test_elbo_and_gradients_equal_those_of_trace_enum(name):
    problem = BY_NAME[name]
    loss = TraceEnum_ELBO(max_plate_nesting=problem.max_plate_nesting)
    guide = config_enumerate(problem.guide)
    loss.loss(problem.model, guide, *problem.args)
    leaves = {key: value.unconstrained() for key, value in pyro.get_param_store().items()}
    value = loss.differentiable_loss(problem.model, guide, *problem.args)
    torch.testing.assert_close(-value, problem.elbo(), rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(-value, list(leaves.values()))
    expected = exact_gradients(problem)
    for key, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(gradient, expected[key], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", POSITIVE)
def test_skewed_evidence_posterior_and_elbo_by_quadrature(name):
    problem = BY_NAME[name]
    (site,) = problem.sites
    posterior = problem.posterior()[site]

    def log_p(z, program=problem.model):
        return log_joint(program, problem, {site: torch.tensor(z, dtype=torch.float64)}).item()

    def log_q(z):
        return log_p(z, problem.guide)

    def integral(f):
        return sum(integrate.quad(f, *ends, epsabs=1e-12, epsrel=1e-11)[0] for ends in ((0, 1), (1, 4), (4, 40)))

    evidence = integral(lambda z: math.exp(log_p(z)) if z > 0 else 0.0)
    mean = integral(lambda z: z * math.exp(log_p(z)) / evidence if z > 0 else 0.0)
    elbo = integral(lambda z: math.exp(log_q(z)) * (log_p(z) - log_q(z)) if z > 0 else 0.0)
    assert float(problem.log_evidence()) == pytest.approx(math.log(evidence), rel=1e-10)
    assert float(posterior.mean) == pytest.approx(mean, rel=1e-9)
    assert float(problem.elbo()) == pytest.approx(elbo, rel=1e-9)
    assert 2 / float(posterior.concentration) ** 0.5 > 0.8


def test_evidence_of_eight_schools_by_quadrature():
    problem = problems.eight_schools()
    y, errors = (a.numpy() for a in problem.args)

    def density(tau):
        covariance = 25.0 + torch.diag(torch.tensor(errors**2 + tau**2)).numpy()
        return stats.multivariate_normal.pdf(y, cov=covariance) * stats.halfcauchy.pdf(tau, scale=5)

    pieces = [
        integrate.quad(density, *ends, epsabs=0, epsrel=1e-11)[0] for ends in ((0, 10), (10, 200), (200, math.inf))
    ]
    assert float(problem.log_evidence()) == pytest.approx(math.log(sum(pieces)), abs=1e-9)


def test_evidence_of_linear_gaussian_by_scipy():
    problem = problems.linear_gaussian()
    p, x = problem.params, problem.args[0]
    covariance = p["weight"] @ p["weight"].T + p["sigma"] ** 2 * torch.eye(3, dtype=torch.float64)
    expected = stats.multivariate_normal.logpdf(x.numpy(), p["bias"].numpy(), covariance.numpy()).sum()
    assert float(problem.log_evidence()) == pytest.approx(expected, rel=1e-12)


def test_elbo_of_logistic_regression_by_adaptive_quadrature():
    problem = problems.logistic_regression()
    x, y = problem.args
    params = {"loc": 0.3 * torch.sin(torch.arange(31.0)).double(), "log_scale": -0.5 * torch.ones(31).double()}
    spread, margin = (x**2 @ (2 * params["log_scale"]).exp()).sqrt(), (2 * y - 1) * (x @ params["loc"])

    def expected(m, s):
        def f(t):
            return -math.log1p(math.exp(-(m + s * t))) if m + s * t > -30 else m + s * t

        return integrate.quad(lambda t: f(t) * stats.norm.pdf(t), -9, 9, points=[-m / s], epsabs=1e-11, limit=200)[0]

    rows = [0, 100, 461]
    exact = sum(expected(float(margin[n]), float(spread[n])) for n in rows)
    q, prior = Normal(params["loc"], params["log_scale"].exp()), Normal(torch.zeros(31).double(), 1.0)
    gaussian_expectation = problems._math.gaussian_expectation
    ours = gaussian_expectation(torch.nn.functional.logsigmoid, margin, spread)
    assert float(ours[rows].sum()) == pytest.approx(exact, abs=1e-8)
    assert float(problem.elbo(params)) == pytest.approx(float(ours.sum() - kl_divergence(q, prior).sum()), rel=1e-12)


@pytest.mark.parametrize("name", having(lambda p: p.elbo and not p.traits.subsampled))
def test_elbo_is_the_mean_of_trace_elbo(name):
    problem = BY_NAME[name]
    loss = Trace_ELBO(num_particles=250, vectorize_particles=True, max_plate_nesting=problem.max_plate_nesting)
    pyro.set_rng_seed(7)
    with torch.no_grad():
        draws = -torch.tensor([loss.loss(problem.model, problem.guide, *problem.args) for _ in range(200)])
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - problem.elbo()) < 5 * error
    assert 5 * error < 0.05 * abs(problem.elbo()), "the check is too weak to see a difference of 5 %"


@pytest.mark.parametrize("name", having(lambda p: p.elbo and p.traits.subsampled))
def test_expectation_over_all_minibatches_is_the_full_elbo(name):
    problem = BY_NAME[name]
    full, size = len(problem.args[0]), 2
    whole = FACTORIES[name](subsample_size=full)
    assert problem.elbo() == whole.elbo()
    values = latent_values(whole)
    p, q = [], []
    for rows in itertools.combinations(range(full), size):
        index = torch.tensor(rows)
        chosen = {site: value[index] if value.dim() else value for site, value in values.items()}
        p.append(log_joint(problem.model, problem, {**chosen, "data": index}))
        q.append(log_joint(problem.guide, problem, {**chosen, "data": index}))
    everything = {**values, "data": torch.arange(full)}
    torch.testing.assert_close(sum(p) / len(p), log_joint(whole.model, whole, everything), rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(q) / len(q), log_joint(whole.guide, whole, everything), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", having(lambda p: p.exact_guide))
def test_exact_guide_closes_the_gap(name):
    problem = BY_NAME[name]
    tight = problem.exact_guide()
    torch.testing.assert_close(problem.elbo(tight), problem.log_evidence(), rtol=1e-12, atol=1e-12)
    gradients = exact_gradients(problem, problem.unconstrained(tight))
    assert all(gradients[key].abs().max() < 1e-10 for key in problem.guide_params)
    assert problem.log_evidence() - problem.elbo() > 1e-3


@pytest.mark.parametrize("name", having(lambda p: p.elbo))
def test_traits_tell_what_is_exact(name):
    problem = BY_NAME[name]
    assert problem.traits.exact_posterior_in_family == (problem.exact_guide is not None)
    assert problem.log_evidence is None or problem.elbo() < problem.log_evidence()
    trace = poutine.trace(problem.guide).get_trace(*problem.args)
    assert problem.traits.reparameterised == all(trace.nodes[site]["fn"].has_rsample for site in problem.sites)
    plates = trace.nodes[problem.sites[0]]["cond_indep_stack"]
    assert problem.traits.local == (bool(plates) and len(problem.sites) == 1)


@pytest.mark.parametrize("objective", ["elbo", "log_evidence"])
@pytest.mark.parametrize("name", EXACT_ELBO)
def test_exact_gradients_equal_finite_differences(name, objective):
    problem = BY_NAME[name]
    function = getattr(problem, objective)
    if function is None:
        return
    leaves = {key: value.detach() for key, value in problem.unconstrained().items()}
    gradients = exact_gradients(problem, objective=objective)
    step = 1e-5
    for key, value in leaves.items():
        for i in range(value.numel()):
            shift = torch.zeros_like(value)
            shift.view(-1)[i] = step
            up, down = (function(problem.constrained({**leaves, key: value + s * shift})) for s in (1, -1))
            expected = (up - down) / (2 * step)
            torch.testing.assert_close(gradients[key].reshape(-1)[i], expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("name", having(lambda p: p.maximum))
def test_maximum_is_stationary_and_beats_its_neighbours(name):
    problem = BY_NAME[name]
    theta = problem.maximum()
    assert set(theta) == set(problem.model_params)
    best = problem.log_evidence(theta)
    assert best > problem.log_evidence()
    leaves = problem.unconstrained(theta)
    gradients = exact_gradients(problem, leaves, objective="log_evidence")
    assert all(gradient.abs().max() < 1e-9 for gradient in gradients.values())
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        moved = {
            key: leaf.detach() + 0.05 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
            for key, leaf in leaves.items()
            if key in theta
        }
        assert problem.log_evidence(problem.constrained(moved)) < best


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_every_site_has_the_dtype_asked_for(name, dtype):
    problem = FACTORIES[name](dtype=dtype)
    guide = poutine.trace(problem.guide).get_trace(*problem.args)
    model = poutine.trace(poutine.replay(problem.model, trace=guide)).get_trace(*problem.args)
    for trace in (guide, model):
        trace.compute_log_prob()
        for node in trace.nodes.values():
            if node["type"] == "param":
                assert node["value"].dtype == dtype
            if node["type"] == "sample" and not site_is_plate(node):
                assert node["value"].dtype in (dtype, torch.int64)
                assert node["log_prob"].dtype == dtype
    assert all(value.dtype == dtype for value in problem.params.values())
    if problem.elbo:
        torch.testing.assert_close(problem.elbo().double(), BY_NAME[name].elbo(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_particle_plate_gives_the_numbers_of_a_loop(name):
    problem = BY_NAME[name]
    pyro.set_rng_seed(11)
    single = poutine.trace(problem.guide).get_trace(*problem.args)
    plate = pyro.plate("particles", 3, dim=-1 - problem.max_plate_nesting)
    guide = poutine.trace(plate(problem.guide)).get_trace(*problem.args)
    model = poutine.trace(poutine.replay(plate(problem.model), trace=guide)).get_trace(*problem.args)
    guide.compute_log_prob()
    model.compute_log_prob()
    shared = {name: node["value"] for name, node in model.nodes.items() if name == "data"}
    for k in range(3):
        values = {
            site: guide.nodes[site]["value"][k].reshape(single.nodes[site]["value"].shape) for site in problem.sites
        }
        for program, vectorized in ((problem.guide, guide), (problem.model, model)):
            looped = poutine.trace(poutine.condition(program, {**values, **shared})).get_trace(*problem.args)
            looped.compute_log_prob()
            for site, node in looped.nodes.items():
                if node["type"] == "sample" and not site_is_plate(node):
                    together = vectorized.nodes[site]["log_prob"][k]
                    torch.testing.assert_close(together.reshape(node["log_prob"].shape), node["log_prob"])


def site_is_plate(node):
    return type(node["fn"]).__name__ == "_Subsample"


@pytest.mark.parametrize("name", NAMES)
def test_making_and_fitting_leave_the_problem_and_the_generator_alone(name):
    before = torch.random.get_rng_state()
    first, second = create("problem", name), create("problem", name)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.args, second.args, strict=True))
    assert all(torch.equal(first.params[key], second.params[key]) for key in first.params)
    Trace_ELBO().loss(first.model, first.guide, *first.args)
    store = pyro.get_param_store()
    assert set(store.keys()) == {*first.model_params, *first.guide_params} == set(first.params)
    with torch.no_grad():
        for key in list(store):
            torch.testing.assert_close(store[key], first.params[key])
            store[key].unconstrained().add_(1.0)
    assert all(torch.equal(first.params[key], second.params[key]) for key in first.params)


def test_seeds_change_the_data():
    assert not torch.equal(problems.normal_normal(seed=1).args[0], problems.normal_normal(seed=2).args[0])


def test_an_unknown_parameter_is_refused_with_the_nearest_name():
    problem = problems.normal_normal()
    with pytest.raises(ModelError, match=r"'prior_men'.*Did you mean 'prior_mean'"):
        problem.elbo({"prior_men": torch.tensor(0.0)})


def test_gradients_of_what_is_not_known_are_refused():
    with pytest.raises(ModelError, match="'log_evidence' of problem 'logistic_regression'"):
        exact_gradients(problems.logistic_regression(), objective="log_evidence")


@pytest.mark.parametrize("binarize", ["threshold", "stochastic"])
def test_digits_are_split_and_binary(binarize):
    digits = problems.load_digits_binary(900, binarize=binarize, seed=4)
    assert digits.train.shape == (900, 64) and digits.test.shape == (897, 64)
    assert digits.train.unique().tolist() == [0.0, 1.0]
    assert len(digits.train_labels) == 900 and digits.test_labels.unique().tolist() == list(range(10))
    assert 0.25 < float(digits.train.mean()) < 0.4


@pytest.mark.parametrize(
    ("arguments", "observed"), [({"binarize": "treshold"}, "'treshold'"), ({"num_train": 1797}, "num_train=1797")]
)
def test_digits_refuse_bad_arguments(arguments, observed):
    with pytest.raises(EmvaeError, match=observed):
        problems.load_digits_binary(**arguments)


def test_digits_vae_scales_a_batch_to_the_training_set():
    problem = problems.digits_vae(num_train=500)
    batch, index = problem.args[0][7:27], torch.arange(7, 27)
    trace = poutine.trace(problem.model).get_trace(batch, index)
    assert trace.nodes["x"]["scale"] == 25.0
    assert torch.equal(trace.nodes["data"]["value"], index)
    assert trace.nodes["z"]["fn"].event_shape == (3,)
    weights = problem.params["encoder$$$hidden.weight"]
    assert weights.shape == (100, 64) and 0.095 < float(weights.std()) < 0.105
