"""The log density of normals by squares: that of Pyro, with its derivatives and its refusals."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_emvae.posterior import _squares
from pyro_emvae.posterior._curved import curved
from pyro_emvae.posterior._squares import squares

F64 = torch.float64
LOCS = {
    "one number": lambda: torch.tensor(0.3, dtype=F64),
    "per element": lambda: torch.linspace(-1, 1, 3, dtype=F64),
    "per datum": lambda: torch.linspace(-1, 1, 15, dtype=F64).reshape(5, 3),
}
SCALES = {
    "one number": lambda: torch.tensor(0.7, dtype=F64),
    "per element": lambda: torch.tensor([0.5, 1.0, 2.0], dtype=F64),
    "per datum": lambda: torch.linspace(0.5, 2, 15, dtype=F64).reshape(5, 3),
    "of a row": lambda: torch.linspace(0.5, 2, 5, dtype=F64)[:, None],
}


@pytest.mark.parametrize("events", [0, 1, 2])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("loc", LOCS)
def test_value_and_derivatives_are_those_of_pyro(loc, scale, events):
    loc, scale = LOCS[loc]().requires_grad_(), SCALES[scale]().requires_grad_()
    value = torch.linspace(-2, 1, 15, dtype=F64).reshape(5, 3).sin().requires_grad_()
    leaves = [loc, scale, value]
    fn = dist.Normal(loc, scale).expand((5, 3)).to_event(events)
    found, expected = squares(fn, value), fn.log_prob(value)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    first = [torch.autograd.grad(f.sin().sum(), leaves, create_graph=True) for f in (found, expected)]
    torch.testing.assert_close(first[0], first[1], rtol=1e-11, atol=1e-12)
    second = [torch.autograd.grad(sum(g.cos().sum() for g in gradients), leaves) for gradients in first]
    torch.testing.assert_close(second[0], second[1], rtol=1e-10, atol=1e-11)


CORRELATED = {
    "one datum's location per component": (lambda: torch.linspace(-1, 1, 6, dtype=F64).reshape(3, 1, 2), (3, 1, 2, 2)),
    "one location": (lambda: torch.linspace(-1, 1, 2, dtype=F64), (2, 2)),
    "a location per datum": (lambda: torch.linspace(-1, 1, 22, dtype=F64).reshape(11, 2), (2, 1, 2, 2)),
}


@pytest.mark.parametrize("events", [0, 1])
@pytest.mark.parametrize("chunk", [1, 2**18])
@pytest.mark.parametrize("case", CORRELATED)
def test_correlated_value_and_derivatives_are_those_of_pyro(monkeypatch, case, chunk, events):
    monkeypatch.setattr(_squares, "CHUNK", chunk)
    loc, shape = CORRELATED[case]
    loc, scale = loc().requires_grad_(), torch.linspace(-0.4, 0.9, math.prod(shape), dtype=F64).reshape(shape)
    scale = (scale.tril(-1) + torch.eye(2, dtype=F64) * scale.exp()).requires_grad_()
    value = torch.linspace(-2, 1, 22, dtype=F64).reshape(11, 2).sin().requires_grad_()
    leaves = [loc, scale, value]
    fn = dist.MultivariateNormal(loc, scale_tril=scale)
    fn = fn.expand(torch.broadcast_shapes(fn.batch_shape, (11,))).to_event(events)
    found, expected = squares(fn, value), fn.log_prob(value)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    first = [torch.autograd.grad(f.sin().sum(), leaves, create_graph=True) for f in (found, expected)]
    torch.testing.assert_close(first[0], first[1], rtol=1e-11, atol=1e-12)
    second = [torch.autograd.grad(sum(g.cos().sum() for g in gradients), leaves) for gradients in first]
    torch.testing.assert_close(second[0], second[1], rtol=1e-10, atol=1e-11)


def test_covariances_are_as_good_as_their_factors_and_nearly_singular_ones_too():
    x = torch.linspace(-2, 1, 22, dtype=F64).reshape(11, 2).sin()
    for small in (1.0, 1e-3, 1e-6):
        covariance = torch.tensor([[1.0, 1.0], [1.0, 1.0 + small**2]], dtype=F64)
        fn = dist.MultivariateNormal(torch.zeros(11, 2, dtype=F64), covariance_matrix=covariance)
        torch.testing.assert_close(squares(fn, x), fn.log_prob(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(11, 2, 2), (1, 2, 2)])
def test_correlations_of_each_datum_are_left_to_pyro(shape):
    fn = dist.MultivariateNormal(torch.zeros(shape[0], 2), scale_tril=torch.eye(2).repeat(shape[0], 1, 1))
    assert squares(fn, torch.zeros(shape[0], 2)) is None


def test_derivatives_of_a_plain_sum_are_those_of_pyro():
    """A slope that all data share is multiplied with the weights, and not with each datum."""
    loc = torch.linspace(-1, 1, 15, dtype=F64).reshape(5, 3).requires_grad_()
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=F64).requires_grad_()
    fn, value = dist.Normal(loc, scale).to_event(1), torch.linspace(-2, 1, 15, dtype=F64).reshape(5, 3).sin()
    found = [f(value).sum() for f in (lambda x: squares(fn, x), fn.log_prob)]
    first = [torch.autograd.grad(f, [loc, scale], create_graph=True) for f in found]
    torch.testing.assert_close(first[0], first[1], rtol=1e-12, atol=1e-12)
    second = [torch.autograd.grad(sum(g.cos().sum() for g in gradients), [loc, scale]) for gradients in first]
    torch.testing.assert_close(second[0], second[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,), (4, 1, 3)])
def test_values_of_fewer_and_of_more_dims_are_broadcast(shape):
    value = torch.zeros(shape, dtype=F64)
    for events in (0, 1):
        fn = dist.Normal(torch.zeros(2, 3, dtype=F64), torch.ones(3, dtype=F64)).to_event(events)
        if len(shape) < events:
            continue
        torch.testing.assert_close(squares(fn, value), fn.log_prob(value), rtol=1e-14, atol=1e-14)


def test_what_is_no_normal_is_left_alone():
    normal = dist.Normal(torch.zeros(3), 1.0)
    for fn in (dist.Cauchy(0.0, 1.0), dist.LogNormal(0.0, 1.0), normal.mask(torch.tensor([True, False, True]))):
        assert squares(fn, torch.ones(3)) is None


def test_values_are_validated_as_by_pyro():
    for fn in (dist.Normal(torch.zeros(3), 1.0), dist.MultivariateNormal(torch.zeros(3, 3), torch.eye(3))):
        for refusing in (fn.log_prob, lambda value, fn=fn: squares(fn, value)):
            with pytest.raises(ValueError, match="support"):
                refusing(torch.tensor([0.0, float("nan"), 1.0]))


def test_precisions_may_differ():
    fn = dist.Normal(torch.zeros(2, 3), torch.ones(3)).to_event(1)
    found = squares(fn, torch.ones(2, 3, dtype=F64))
    assert found.dtype == F64
    torch.testing.assert_close(found, fn.log_prob(torch.ones(2, 3, dtype=F64)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"logits": [[0.0, -30.0, 2.0]]}, {"probs": [[0.5, 0.1, 1.0]]}], ids=str)
@pytest.mark.parametrize("events", [0, 1])
def test_a_binomial_is_curved_at_a_logit_of_zero(options, events):
    """Value and slope are the distribution's own; so is the curvature off zero."""
    (name, given), k = next(iter(options.items())), torch.tensor([[4.0, 0.0, 10.0], [7.0, 1.0, 10.0]], dtype=F64)
    leaf = torch.tensor(given, dtype=F64, requires_grad=True)
    fn = dist.Binomial(torch.tensor(10.0, dtype=F64), **{name: leaf}).to_event(events)
    found, expected = curved(fn, k), fn.log_prob(k)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(x.sum(), leaf, create_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-10)
    if name == "logits":
        (curvature,) = torch.autograd.grad(slopes[0].sum(), leaf)
        p = leaf.detach().sigmoid()
        torch.testing.assert_close(curvature, -20 * p * (1 - p), rtol=1e-10, atol=1e-10)


def test_others_are_not_curved_and_bad_counts_are_refused():
    assert curved(dist.Poisson(2.0), torch.tensor(1.0)) is None
    with pytest.raises(ValueError, match="11"):
        curved(dist.Binomial(10, torch.tensor(0.5)), torch.tensor(11.0))
