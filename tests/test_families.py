r"""Families: a context becomes a distribution. Every registered family goes through the same cases."""

from __future__ import annotations

import copy
import math
import pickle
import re
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from family_sites import DISCRETE, FAMILIES, SITES, SUPPORT, bound, draw, site
from pyro.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_emvae import Traits
from pyro_emvae._checks import EmvaeError, ModelError
from pyro_emvae._registry import create
from pyro_emvae.families import (
    Bernoulli,
    Beta,
    Categorical,
    Dirichlet,
    Family,
    Flow,
    FullRankNormal,
    Gamma,
    LogNormal,
    LowRankNormal,
    Mixture,
    Normal,
    OneHot,
    PointMass,
    StudentT,
    VonMises,
)
from pyro_emvae.families._supports import kind

SHAPES = [(), (1,), (3,), (2, 3)]
float64 = torch.float64


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


def gradient_of(family, context, event):
    """Return the draw, its log density, and the gradient of both by the context."""
    context = context.detach().requires_grad_()
    fn = family.distribution(context, event)
    value = draw(fn)
    log_prob = fn.log_prob(value)
    total = log_prob.sum() + (value.sum() if value.requires_grad else 0.0)
    return value.detach(), log_prob.detach(), torch.autograd.grad(total, context)[0]


# Conformance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [(), (5,), (4, 1, 5)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_dtype_and_gradients(name, batch, shape, dtype, device):
    family, event = bound(name, shape, dtype)
    for module in family.modules():
        module.to(device)
    context = torch.randn(*batch, family.num_features(event), dtype=dtype, device=device)
    fn = family.distribution(context, event)
    value, log_prob, gradient = gradient_of(family, context, event)
    assert (fn.batch_shape, fn.event_shape, value.device) == (batch, event, context.device)
    assert value.dtype == (torch.int64 if SUPPORT[name] == "categorical" else dtype)
    assert log_prob.shape == batch and log_prob.isfinite().all() and gradient.isfinite().all()
    assert bool(torch.as_tensor(site(SUPPORT[name], shape).support.check(value)).all())


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_the_context_are_independent(name, dtype):
    family, event = bound(name, (2,), dtype)
    context = torch.randn(6, family.num_features(event), dtype=dtype)
    value = family.distribution(context, event).sample()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    one, two = family.distribution(context, event), family.distribution(context[order], event)
    assert torch.allclose(one.log_prob(value)[order], two.log_prob(value[order]), rtol=1e-5)
    alone = [family.distribution(row, event).log_prob(v) for row, v in zip(context, value, strict=True)]
    assert torch.allclose(torch.stack(alone), one.log_prob(value), rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_expanded_and_broadcast(name):
    family, event = bound(name, (3,))
    fn = family.distribution(torch.randn(4, 1, family.num_features(event)), event)
    wide = fn.expand(torch.Size([6, 4, 5]))
    value = draw(wide, (7,))
    assert (wide.batch_shape, wide.event_shape, value.shape) == ((6, 4, 5), event, (7, 6, 4, 5, *event))
    assert torch.allclose(wide.log_prob(value), fn.log_prob(value)) and wide.has_rsample == fn.has_rsample
    assert fn.mask(torch.zeros(4, 1, dtype=torch.bool)).log_prob(value).abs().max() == 0


@pytest.mark.parametrize("sign", [-1, 0, 1], ids=["minus", "mixed", "plus"])
@pytest.mark.parametrize("size", [30.0, 1e3])
@pytest.mark.parametrize("name", FAMILIES)
def test_extreme_contexts(name, size, sign, dtype):
    """Whatever an encoder says, the distribution is valid, and draws, densities and gradients are finite."""
    family, event = bound(name, (2, 3), dtype)
    context = size * torch.randn(40, family.num_features(event), dtype=dtype)
    context = sign * context.abs() if sign else context
    value, log_prob, gradient = gradient_of(family, context, event)
    assert value.isfinite().all() and log_prob.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_and_vectorized(name):
    """A graph of draw, density and gradient gives the same numbers from the same generator: no branch on data."""
    family, event = bound(name, (2,))
    context = torch.randn(5, family.num_features(event))
    value = draw(family.distribution(context, event))
    with pyro.validation_enabled(False):
        graph = make_fx(lambda c: gradient_of(family, c, event))(context)
        torch.manual_seed(1)
        recorded = graph(context + 0.1)
        torch.manual_seed(1)
        eager = gradient_of(family, context + 0.1, event)
        rows = torch.vmap(lambda c, v: family.distribution(c, event).log_prob(v))(context, value)
    assert all(torch.equal(a, b) for a, b in zip(recorded, eager, strict=True))
    assert torch.allclose(rows, family.distribution(context, event).log_prob(value), atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_agrees_with_float64(name):
    family, event = bound(name, (2,), float64)
    context = torch.randn(20, family.num_features(event), dtype=float64).float()
    single = copy.deepcopy(family)
    for module in single.modules():
        module.float()
    fn = single.distribution(context, event)
    value = fn.sample()
    value = (
        value if SUPPORT[name] in DISCRETE else value.clamp(max=0.999) if SUPPORT[name] == "unit_interval" else value
    )
    expected = family.distribution(context.double(), event)
    wide = value if SUPPORT[name] == "categorical" else value.double()
    wide = wide / wide.sum(-1, keepdim=True) if SUPPORT[name] == "simplex" else wide
    if family.direct and SUPPORT[name] == "continuous":
        assert torch.allclose(expected.mean, wide, rtol=1e-5)
    else:
        assert torch.allclose(fn.log_prob(value).double(), expected.log_prob(wide), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_is_made_on_the_contexts_device(name):
    """A tensor on any other device would not go with one that has no data."""
    family, event = bound(name, (2, 3))
    for module in family.modules():
        module.to("meta")
    with pyro.validation_enabled(False):
        context = torch.empty(5, family.num_features(event), device="meta")
        fn = family.distribution(context, event)
        value = torch.empty(5, *event, device="meta").to(
            torch.int64 if SUPPORT[name] == "categorical" else torch.float32
        )
        assert fn.log_prob(value).device == family.start(value.float(), event).device == context.device


@pytest.mark.parametrize("name", FAMILIES)
def test_copies(name):
    family, event = bound(name, (2,))
    context = torch.randn(3, family.num_features(event))
    value = family.distribution(context, event).sample()
    expected = family.distribution(context, event).log_prob(value)
    for other in (copy.deepcopy(family), pickle.loads(pickle.dumps(family))):
        assert torch.equal(other.distribution(context, event).log_prob(value), expected)
    assert hash(family) == hash(copy.copy(family)) and len(repr(family)) < 200


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_quantiles_rise_or_are_refused(name, shape):
    """Quantiles have the shape of the values; they rise with the level, on the circle as arcs from the median."""
    family, event = bound(name, shape, float64)
    fn = family.distribution(torch.randn(4, family.num_features(event), dtype=float64), event)
    levels = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.95], dtype=float64).reshape(-1, *[1] * (1 + len(event)))
    try:
        values = family.quantile(fn, levels)
    except EmvaeError as error:
        assert "pyro.infer.Predictive" in str(error)
        return
    assert values.shape == (5, 4, *event)
    if SUPPORT[name] == "circle":
        values = torch.remainder(values - values[2] + math.pi, 2 * math.pi)
    assert (values.diff(dim=0) >= 0).all()


# Which site ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("support", SITES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_serves_a_site_or_names_those_that_do(name, support):
    family, fn = create("family", name), site(support, (2,))
    if family.fits(fn):
        assert family.for_site("z", fn).fits(fn)
        return
    with pytest.raises(ModelError, match=f"`{type(family).__name__}` cannot serve site 'z': got ") as caught:
        family.for_site("z", fn)
    named = re.findall(r'"(\w+)"', str(caught.value))
    assert named and all(create("family", other).fits(fn) for other in named)


def test_direct_is_what_draws_in_the_site():
    free = {"flow", "full_rank_normal", "low_rank_normal", "mixture", "normal", "student_t"}
    assert {name for name in FAMILIES if not bound(name)[0].direct} == free


def test_what_has_a_reparameterised_sampler_and_quantiles():
    made = {name: bound(name) for name in FAMILIES}
    fns = {name: one.distribution(torch.zeros(one.num_features(event)), event) for name, (one, event) in made.items()}
    drawn = {name for name, fn in fns.items() if not fn.has_rsample}
    assert drawn == {"bernoulli", "categorical", "mixture", "one_hot", "von_mises"}

    def lacks(name):
        try:
            return made[name][0].quantile(fns[name], torch.full(fns[name].shape(), 0.5)).shape != fns[name].shape()
        except EmvaeError:
            return True

    assert {name for name in FAMILIES if lacks(name)} == {"flow", "one_hot"}


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (dist.Normal(0.0, 1.0), "real"),
        (dist.HalfCauchy(torch.ones(3)).to_event(1), "positive"),
        (dist.LogNormal(0.0, 1.0), "positive"),
        (dist.Uniform(0.0, 1.0), "unit_interval"),
        (dist.Uniform(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 2.0])), "other"),
        (dist.Uniform(-math.pi, math.pi), "circle"),
        (dist.VonMises(0.0, 1.0).expand([3]).to_event(1), "circle"),
        (dist.Pareto(1.0, 2.0), "other"),
        (dist.LKJCholesky(3), "other"),
        (dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), "real"),
        (dist.Dirichlet(torch.ones(2, 3)).to_event(1), "simplex"),
        (dist.Bernoulli(0.5).expand([2]).mask(torch.tensor(True)), "binary"),
        (dist.Categorical(torch.ones(4)), "categorical"),
        (dist.Binomial(3, 0.5), "categorical"),
        (dist.Binomial(torch.tensor([3.0, 4.0]), 0.5), "count"),
        (dist.Poisson(1.0), "count"),
        (dist.OneHotCategorical(torch.ones(2)), "one_hot"),
        (
            dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)),
            "real",
        ),
        (
            dist.MixtureSameFamily(dist.Categorical(torch.ones(2, 3)), dist.Gamma(torch.ones(2, 3), 1.0)).to_event(1),
            "positive",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_kinds_of_sites(fn, expected):
    assert kind(fn) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_a_site_with_a_mixture_of_normals_is_a_real_one(name):
    components = dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)
    fn = dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), components)
    assert create("family", name).fits(fn) == (SUPPORT[name] == "continuous")
    if SUPPORT[name] == "continuous":
        family = create("family", name).for_site("z", fn)
        context = torch.randn(5, family.num_features(fn.event_shape))
        assert family.distribution(context, fn.event_shape).sample().shape == (5, 2)


def test_no_family_for_counts():
    with pytest.raises(ModelError, match=r"site 'n': got Poisson with support IntegerGreaterThan.*AutoGuideList"):
        Normal().for_site("n", dist.Poisson(torch.ones(3)))


def test_support_given_apart():
    support = constraints.interval(torch.tensor([0.0]), torch.tensor([1.0]))
    wide = dist.Uniform(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 3.0]))
    assert not Beta().fits(wide) and Beta().for_site("z", wide, support) == Beta()


def test_a_family_of_the_users():
    """Two methods and the trait are enough; it draws unconstrained values, as before there were others."""

    class Laplace(Family):
        traits = Traits(support="continuous")

        def num_features(self, event_shape):
            return 2 * math.prod(event_shape)

        def distribution(self, context, event_shape):
            return dist.Laplace(*context.chunk(2, -1)).to_event(len(event_shape))

    own = Laplace()
    assert create("family", own).for_site("z", site("positive")) is own and not own.direct and own.modules() == ()
    assert torch.equal(own.start(torch.ones(4, 2), torch.Size([2])), torch.zeros(4, 4))
    assert torch.equal(own.quantile(dist.Laplace(torch.ones(2), 3.0), torch.tensor(0.5)), torch.ones(2))
    with pytest.raises(EmvaeError, match="`Laplace` cannot give medians"):
        own.quantile(dist.VonMises(torch.zeros(2), 1.0), torch.tensor(0.5))
    with pytest.raises(EmvaeError, match="`Laplace` cannot give probabilities"):
        own.cdf(None, torch.tensor(0.5))
    with pytest.raises(ModelError, match="`Laplace` cannot serve site 'k': got Bernoulli"):
        own.for_site("k", site("binary"))
    fn = Mixture([own, "normal"]).distribution(torch.rand(5, 2 + 4), torch.Size([1]))
    assert fn.batch_shape == (5,)


# Where they begin, and their formulas -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_start_is_at_the_value(name):
    """A tenth of the draws or more lies on either side of it; families without a location start at zeros."""
    family, event = bound(name, (2,), float64)
    values = {
        "continuous": [[-9.0, 2.5]],
        "positive": [[0.5, 40.0]],
        "unit_interval": [[0.2, 0.7]],
        "circle": [[-3.0, 2.0]],
        "simplex": [[[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]],
        "one_hot": [[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]],
    }
    value = torch.tensor(values.get(SUPPORT[name], [[1.0, 0.0]]), dtype=float64)
    context = family.start(value, event)
    assert context.shape == (1, family.num_features(event)) and context.dtype == float64
    if not context.any():
        assert SUPPORT[name] in DISCRETE
        return
    off = family.distribution(context, event).sample((400,)) - value
    off = torch.remainder(off + math.pi, 2 * math.pi) - math.pi if SUPPORT[name] == "circle" else off
    assert ((off > -1e-12).double().mean(0) > 0.1).all() and ((off < 1e-12).double().mean(0) > 0.1).all()


def test_normal_equals_its_formula(dtype):
    context = torch.tensor([[0.3, -1.2, 0.5, -2.0]], dtype=dtype)
    value = torch.tensor([[1.0, -0.7]], dtype=dtype)
    loc = torch.tensor([[0.3, -1.2]], dtype=dtype)
    scale = torch.log1p(torch.exp(context[:, 2:]) * math.expm1(0.4))
    expected = (-0.5 * ((value - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    fn = Normal(init_scale=0.4).distribution(context, torch.Size([2]))
    assert torch.allclose(fn.log_prob(value), expected, rtol=1e-10 if dtype == float64 else 1e-5)
    assert torch.equal(fn.mean, loc)


@pytest.mark.parametrize("init_scale", [1e-6, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("cls", [Normal, LowRankNormal, FullRankNormal])
def test_normals_start_at_their_initial_scale(cls, init_scale):
    family, event = cls(init_scale=init_scale), torch.Size([4])
    fn = family.distribution(torch.zeros(family.num_features(event), dtype=float64), event)
    assert ((fn.variance.sqrt() / init_scale - 1).abs() < 1e-12).all()


def test_normal_stands_extreme_contexts():
    context = torch.tensor([[0.0, -10.0], [0.0, 1e6]], requires_grad=True)
    fn = Normal().distribution(context, torch.Size([]))
    fn.entropy().sum().backward()
    assert abs(fn.scale[0] / (math.expm1(1.0) * math.exp(-10)) - 1) < 1e-3 and abs(fn.scale[1] - 1e6) < 1
    assert context.grad.isfinite().all() and abs(context.grad[0, 1] - 1) < 1e-3


@pytest.mark.parametrize("cls", [LowRankNormal, FullRankNormal])
def test_scales_are_the_marginal_ones(cls):
    """Whatever the correlations: Normal's scales of the same context are the standard deviations."""
    family, event = cls(), torch.Size([4])
    context = torch.randn(3, family.num_features(event), dtype=float64)
    fn = family.distribution(context, event)
    expected = Normal().distribution(context[:, :8], event)
    assert torch.allclose(fn.variance, expected.variance, rtol=1e-12) and torch.equal(fn.mean, expected.mean)
    correlation = fn.covariance_matrix / (fn.variance.sqrt().unsqueeze(-1) * fn.variance.sqrt().unsqueeze(-2))
    assert (correlation - torch.eye(4, dtype=float64)).abs().amax() > 0.3


def test_full_rank_normal_holds_any_covariance():
    root = torch.randn(4, 4, dtype=float64)
    covariance = root @ root.T + 0.1 * torch.eye(4, dtype=float64)
    tril = torch.linalg.cholesky(covariance)
    w = tril / tril.diagonal().unsqueeze(-1)
    w = w / (1 - (w / torch.finfo(float64).eps ** -0.25) ** 2).sqrt()
    raw = torch.log(torch.expm1(covariance.diagonal().sqrt())) - math.log(math.expm1(1.0))
    below = torch.cat([w[i, :i] for i in range(4)])
    fn = FullRankNormal().distribution(torch.cat([torch.zeros(4, dtype=float64), raw, below]), torch.Size([4]))
    assert torch.allclose(fn.covariance_matrix, covariance, rtol=1e-10)


def test_low_rank_normal_starts_off_the_saddle():
    """At W = 0 the gradient of any expectation by W is zero: the family does not start there."""
    family, event = LowRankNormal(rank=2), torch.Size([5])
    context = torch.zeros(family.num_features(event), dtype=float64, requires_grad=True)
    fn = family.distribution(context, event)
    (slope,) = torch.autograd.grad(fn.covariance_matrix.sum(), context)
    assert slope[10:].abs().max() > 0.01
    assert (fn.covariance_matrix - torch.eye(5)).abs().max() < 0.03


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (Bernoulli(init_prob=0.2), dist.Bernoulli(0.2)),
        (Beta(init_concentration=1.5), dist.Beta(1.5, 1.5)),
        (Categorical(4), dist.Categorical(torch.ones(4))),
        (Gamma(3.0, 9.0), dist.Gamma(9.0, 3.0)),
        (LogNormal(0.5), dist.LogNormal(0.0, 0.5)),
        (StudentT(2.0, 7.0), dist.StudentT(7.0, 0.0, 2.0)),
        (VonMises(), dist.Uniform(-math.pi, math.pi)),
        (PointMass(), dist.Delta(torch.tensor(0.0))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_distribution_at_context_zero(family, expected):
    fn = family.distribution(torch.zeros(family.num_features(torch.Size([]))), torch.Size([]))
    value = expected.sample((50,))
    assert torch.allclose(fn.log_prob(value), expected.log_prob(value), atol=1e-5)


@pytest.mark.parametrize(("cls", "expected"), [(Dirichlet, dist.Dirichlet), (OneHot, dist.OneHotCategorical)])
def test_vectors_at_context_zero(cls, expected):
    value = expected(torch.ones(2, 3)).sample((20,))
    fn = cls().distribution(torch.zeros(6), torch.Size([2, 3]))
    assert torch.allclose(fn.log_prob(value), expected(torch.ones(2, 3)).log_prob(value).sum(-1), atol=1e-5)


def test_von_mises_equals_pyros():
    natural = torch.randn(2, 7, dtype=float64) * 3
    fn = VonMises().distribution(natural.flatten(), torch.Size([7]))
    value = torch.randn(7, dtype=float64)
    expected = dist.VonMises(torch.atan2(natural[1], natural[0]), torch.hypot(*natural))
    assert torch.allclose(fn.log_prob(value), expected.log_prob(value).sum(), rtol=1e-6)  # torch's Bessel polynomials
    context = torch.zeros(2, dtype=float64, requires_grad=True)
    fn = VonMises().distribution(context, torch.Size([]))
    (slope,) = torch.autograd.grad(fn.log_prob(torch.tensor(0.5, dtype=float64)), context)
    assert torch.allclose(slope, torch.tensor([math.cos(0.5), math.sin(0.5)], dtype=float64))


def test_point_mass_draws_in_the_site():
    family = PointMass().for_site("p", dist.Dirichlet(torch.ones(2, 3)).to_event(1))
    context = torch.randn(5, family.num_features(torch.Size([2, 3])))
    value = family.distribution(context, torch.Size([2, 3])).sample()
    assert torch.allclose(value.sum(-1), torch.ones(5, 2)) and context.shape == (5, 4)
    assert torch.allclose(family.start(value, torch.Size([2, 3])), context, atol=1e-3)


# Mixtures --------------------------------------------------------------------------------------------------------


def test_mixture_equals_its_formula():
    family, event = Mixture([Normal(), StudentT(), Mixture(["normal", "normal"])]), torch.Size([2])
    context = torch.randn(6, family.num_features(event), dtype=float64)
    context[:, :3] = torch.tensor([[0.2, 1.0, -1.0]], dtype=float64)
    value = torch.randn(6, 2, dtype=float64)
    logits, one, two, three = context.split([3, 4, 6, 10], -1)
    zeros = family.distribution(torch.zeros(23, dtype=float64), event)
    means = [zeros.parts[0].mean, zeros.parts[1].mean]
    fn = family.distribution(context, event)
    assert torch.allclose(fn.parts[0].mean, one[:, :2] + means[0])
    assert torch.allclose(fn.parts[1].mean, two[:, :2] + means[1]) and (means[0] - means[1]).abs().min() > 0.05
    densities = torch.stack([part.log_prob(value).exp() for part in fn.parts], -1)
    expected = (logits.softmax(-1) * densities).sum(-1).log()
    assert torch.allclose(fn.log_prob(value), expected, rtol=1e-12) and three.shape == (6, 10)


def test_mixture_of_discrete_families_learns_its_site():
    family = Mixture(["categorical"] * 3).for_site("k", dist.Categorical(torch.ones(4)))
    context = torch.randn(family.num_features(torch.Size([])), dtype=float64)
    fn = family.distribution(context, torch.Size([]))
    assert context.shape == (3 + 12,) and abs(fn.log_prob(torch.arange(4)).exp().sum() - 1) < 1e-12


@pytest.mark.parametrize(
    ("components", "observed"),
    [
        (["normal"], "got components"),
        ("normal", "got components"),
        (["normal", "gamma"], "'Normal': 'continuous', 'Gamma': 'positive'"),
        (["normal", "point_mass"], "'PointMass': 'continuous'"),
        (["normal", 3], "got components"),
    ],
)
def test_bad_mixtures(components, observed):
    with pytest.raises(EmvaeError, match="`Mixture` cannot mix its components: ") as caught:
        Mixture(components)
    assert observed in str(caught.value)


# Flows -----------------------------------------------------------------------------------------------------------


def zuko():
    Flow(context=0).for_site("z", site("continuous"))  # imports it with the switch put back
    import zuko

    return zuko


@pytest.mark.parametrize("which", ["MAF", "NSF", "GF", "RealNVP", "NICE", "BPF", "NAF", "GMM"])
@pytest.mark.parametrize("width", [0, 3])
def test_any_flow_as_it_is(which, width):
    flow = getattr(zuko().flows, which)(2, width).double()
    family = Flow(flow, context=width).for_site("z", site("continuous", (2,)))
    assert family.modules() == (flow,) and family.num_features(torch.Size([2])) == 4 + width
    given, value = torch.randn(5, width, dtype=float64), torch.randn(5, 2, dtype=float64)
    context = torch.cat([torch.zeros(5, 4, dtype=float64), given], -1).requires_grad_()
    fn = family.distribution(context, torch.Size([2]))
    law = flow(given) if width else flow()
    assert torch.allclose(fn.log_prob(value), law.log_prob(value), rtol=1e-9) and fn.has_rsample == law.has_rsample
    shifted = family.distribution(context + torch.tensor([2.0, -1.0, *[0.0] * (2 + width)]), torch.Size([2]))
    assert torch.allclose(shifted.log_prob(value + torch.tensor([2.0, -1.0])), fn.log_prob(value), rtol=1e-9)
    grads = torch.autograd.grad(fn.log_prob(value).sum(), [*flow.parameters()], allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in grads)


def test_a_function_makes_a_flow_for_each_site():
    made = []
    family = Flow(lambda *sizes: made.append(zuko().flows.MAF(*sizes, hidden_features=(8,))) or made[-1], context=2)
    one = family.for_site("a", site("continuous", (3,), float64))
    two = family.for_site("b", dist.Dirichlet(torch.ones(3)))
    assert [one.modules()[0], two.modules()[0]] == made and next(made[0].parameters()).dtype == float64
    assert two.distribution(torch.zeros(2 * 2 + 2), torch.Size([2])).event_shape == (2,)


def test_bad_flows():
    flows = zuko().flows
    with pytest.raises(EmvaeError, match=r"`Flow` cannot make a distribution: got a flow without weights"):
        Flow().distribution(torch.zeros(10), torch.Size([1]))
    with pytest.raises(ModelError, match=r"serve site 'z': got a flow .*the site has 3 unconstrained entries"):
        Flow(flows.MAF(2, 4), context=4).for_site("z", site("continuous", (3,)))
    with pytest.raises(ModelError, match=r"serve site 'z': got a flow that .*the flow's context is 5 wide"):
        Flow(flows.MAF(2, 4), context=5).for_site("z", site("continuous", (2,)))
    family, event = bound(Flow(context=2), (2,))
    with pytest.raises(EmvaeError, match=r"read its context: got torch.float64 .*weights are torch.float32"):
        family.distribution(torch.zeros(6, dtype=float64), event)
    with pytest.raises(EmvaeError, match=r"use context: got -1"):
        Flow(context=-1)


def test_no_zuko(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(EmvaeError, match=r"got no package zuko.*pip install 'pyro_emvae\[flows\]'"):
        Flow().for_site("z", site("continuous"))


def test_importing_zuko_leaves_validation_as_it_was():
    program = """
import sys, torch, pyro.distributions as dist
from torch.distributions import Distribution
from pyro_emvae.families import Flow
Distribution.set_default_validate_args(True)
assert "zuko" not in sys.modules
Flow().for_site("z", dist.Normal(0.0, 1.0))
assert "zuko" in sys.modules
print(Distribution._validate_args)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (run.stdout.strip(), run.stderr) == ("True", "")


# Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alias", ["normal", "gaussian", "diagonal_normal", "mean_field_normal"])
def test_names(alias):
    assert create("family", alias) == Normal()


@pytest.mark.parametrize("cls", [Normal, LowRankNormal, FullRankNormal, StudentT, LogNormal])
@pytest.mark.parametrize("init_scale", [0.0, -1.0, math.inf, math.nan, None, True])
def test_bad_initial_scale(cls, init_scale):
    with pytest.raises(EmvaeError, match=f"`{cls.__name__}` .*got init_scale={init_scale}"):
        cls(init_scale=init_scale)


@pytest.mark.parametrize(
    ("cls", "setting", "value"),
    [
        (StudentT, "init_df", 1.0),
        (StudentT, "init_df", 200.0),
        (Gamma, "init_mean", 0.0),
        (Gamma, "init_concentration", 0.01),
        (Beta, "init_concentration", 1e7),
        (Dirichlet, "init_concentration", -1.0),
        (Bernoulli, "init_prob", 1.0),
        (LowRankNormal, "rank", 0),
        (Categorical, "num_categories", 0),
    ],
)
def test_bad_settings(cls, setting, value):
    with pytest.raises(EmvaeError, match=f"`{cls.__name__}` .*{re.escape(str(value))}"):
        cls(**{setting: value})


def test_categorical_has_to_know_its_site():
    with pytest.raises(EmvaeError, match="got num_categories=None"):
        Categorical().num_features(torch.Size([]))
    with pytest.raises(EmvaeError, match=r"serve site 'k': got num_categories=3.*the site has 4 categories"):
        Categorical(3).for_site("k", dist.Categorical(torch.ones(4)))


def test_unknown_family():
    with pytest.raises(EmvaeError, match=r"'normall'.*Did you mean 'normal'"):
        create("family", "normall")
