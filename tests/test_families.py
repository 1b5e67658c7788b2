r"""Families: a context becomes a distribution. Every registered family goes through the same cases."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_emvae._checks import EmvaeError
from pyro_emvae._registry import create, entries
from pyro_emvae.families import Family, Normal

FAMILIES = [entry.name for entry in entries("family")]
EVENTS = [(), (1,), (3,), (2, 3)]


@pytest.fixture(params=[torch.float32, torch.float64])
def dtype(request):
    return request.param


@pytest.mark.parametrize("event", EVENTS, ids=str)
@pytest.mark.parametrize("batch", [(), (5,), (4, 1, 5)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_dtype_and_gradients(name, batch, event, dtype, device):
    family, event = create("family", name), torch.Size(event)
    context = torch.randn(*batch, family.num_features(event), dtype=dtype, device=device).requires_grad_()
    fn = family.distribution(context, event)
    value = fn.rsample() if fn.has_rsample else fn.sample()
    log_prob = fn.log_prob(value)
    (gradient,) = torch.autograd.grad(log_prob.sum(), context)
    assert (fn.batch_shape, fn.event_shape, value.dtype, value.device) == (batch, event, dtype, context.device)
    assert log_prob.shape == batch and log_prob.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_the_context_are_independent(name, dtype):
    family, event = create("family", name), torch.Size([2])
    context = torch.randn(6, family.num_features(event), dtype=dtype)
    value = family.distribution(context, event).sample()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    one, two = family.distribution(context, event), family.distribution(context[order], event)
    assert torch.equal(one.log_prob(value)[order], two.log_prob(value[order]))


@pytest.mark.parametrize("name", FAMILIES)
def test_log_prob_integrates_to_one(name):
    family, event = create("family", name), torch.Size([])
    context = torch.linspace(-0.9, 1.1, family.num_features(event), dtype=torch.float64)
    grid = torch.linspace(-30, 30, 20_001, dtype=torch.float64)
    density = family.distribution(context, event).log_prob(grid).exp()
    assert abs(torch.trapezoid(density, grid) - 1) < 1e-6


def test_normal_equals_its_formula(dtype):
    context = torch.tensor([[0.3, -1.2, 0.5, -2.0]], dtype=dtype)
    value = torch.tensor([[1.0, -0.7]], dtype=dtype)
    loc = torch.tensor([[0.3, -1.2]], dtype=dtype)
    scale = torch.log1p(torch.exp(context[:, 2:]) * math.expm1(0.4))
    expected = (-0.5 * ((value - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    fn = Normal(init_scale=0.4).distribution(context, torch.Size([2]))
    assert torch.allclose(fn.log_prob(value), expected, rtol=1e-10 if dtype == torch.float64 else 1e-5)
    assert torch.equal(fn.mean, loc)


@pytest.mark.parametrize("init_scale", [1e-6, 0.1, 1.0, 30.0])
def test_normal_starts_at_its_initial_scale(init_scale):
    fn = Normal(init_scale).distribution(torch.zeros(1, 2, dtype=torch.float64), torch.Size([]))
    assert abs(fn.stddev / init_scale - 1) < 1e-12


def test_normal_stands_extreme_contexts():
    context = torch.tensor([[0.0, -80.0], [0.0, 1e6]], requires_grad=True)
    fn = Normal().distribution(context, torch.Size([]))
    fn.entropy().sum().backward()
    assert abs(fn.scale[0] / (math.expm1(1.0) * math.exp(-80)) - 1) < 1e-4 and abs(fn.scale[1] - 1e6) < 1
    assert context.grad.isfinite().all() and abs(context.grad[0, 1] - 1) < 1e-5


def test_normal_quantiles():
    fn = Normal().distribution(torch.tensor([[2.0, -1.0, 0.0, 0.0]]), torch.Size([2]))
    levels = torch.tensor([0.5, 0.841344746]).reshape(2, 1, 1)
    expected = torch.tensor([[[2.0, -1.0]], [[3.0, 0.0]]])
    assert torch.allclose(Normal().quantile(fn, levels), expected, atol=1e-5)


@pytest.mark.parametrize("alias", ["normal", "gaussian", "diagonal_normal", "mean_field_normal"])
def test_names(alias):
    assert create("family", alias) == Normal()


@pytest.mark.parametrize("init_scale", [0.0, -1.0, math.inf, math.nan])
def test_bad_initial_scale(init_scale):
    with pytest.raises(EmvaeError, match=f"got init_scale={init_scale}"):
        Normal(init_scale)


def test_unknown_family():
    with pytest.raises(EmvaeError, match=r"'normall'.*Did you mean 'normal'"):
        create("family", "normall")


def test_family_without_quantiles():
    class Odd(Family):
        def num_features(self, event_shape):
            return 1

        def distribution(self, context, event_shape):
            return None

    with pytest.raises(EmvaeError, match="`Odd` cannot give medians"):
        Odd().quantile(None, torch.tensor(0.5))
