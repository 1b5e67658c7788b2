r"""Each loss with every guide and family: docs/guides_matrix.md says what is measured."""

from __future__ import annotations

import math

import guides_table
import pyro
import pyro.distributions as dist
import torch

from pyro_emvae._registry import entries
from pyro_emvae.families import Normal
from pyro_emvae.guides import AutoMeanField
from pyro_emvae.testing import assert_mean


def test_the_table_is_what_is_measured():
    cells = guides_table.table()
    written, measured = guides_table.PATH.read_text(encoding="utf-8"), guides_table.render(cells)
    changed = "\n".join(guides_table.changes(written, measured))
    assert not changed, f"cells changed; if they are right, run `python tests/guides_table.py`:\n{changed}"
    assert {family for _, family in cells} >= {entry.name for entry in entries("family")}


class Planted:
    """A loss with a defect: of its value, of the gradient's size for the guide, or for the model."""

    def __init__(self, shift=0.0, guide=1.0, model=1.0, error=None, backward=True):
        self.shift, self.guide, self.model, self.error, self.backward = shift, guide, model, error, backward
        self.num_particles = guides_table.PARTICLES

    def loss_and_grads(self, model, guide, x):
        if self.error:
            raise self.error
        loss = guides_table.LOSSES["Trace_ELBO"](self.num_particles)
        value = loss.loss_and_grads(model, guide, x) if self.backward else loss.loss(model, guide, x)
        if self.backward:
            for p in guide.parameters():
                p.grad *= self.guide
            pyro.param("shift").unconstrained().grad *= self.model
        return value + self.shift * len(x)


DEFECTS = [
    (Planted(), "pass"),
    (Planted(backward=False), "no gradient for any parameter"),
    (Planted(shift=0.1), "the value is not the ELBO's"),
    (Planted(shift=-0.1), "the value is not the ELBO's"),
    (Planted(guide=-1.0), "the gradient is biased"),
    (Planted(guide=0.8), "the gradient is biased"),
    (Planted(guide=0.0), "the gradient is zero"),
    (Planted(guide=math.nan), "a gradient is not finite"),
    (Planted(model=0.8), "the gradient is biased"),
    (Planted(error=ValueError("got 3 of\nmore")), "ValueError: got … of"),
]


def test_the_value_and_the_gradients_are_judged():
    """Planted defects: a loss that leaves a term out, gradients of the wrong sign or size, none, one that raises."""
    model = guides_table.model_of(guides_table.PRIORS["continuous"])
    guide = AutoMeanField(model)
    guide(guides_table.X)
    guide.leaves = guides_table.spread_contexts(guide)
    answer = guides_table.right(model, guide, False)
    for planted, expected in DEFECTS:
        guide.zero_grad()
        pyro.param("shift", torch.zeros(len(guides_table.X))).unconstrained().grad = None
        assert guides_table.measure(planted, model, guide, answer) == expected


def test_quadrature_equals_a_closed_form():
    """A normal family, prior and likelihood: ELBO and gradients by hand; and two draws against many of them."""
    x, loc, scale = torch.tensor([0.4, -0.8], dtype=torch.float64), 0.3, 0.6
    family, theta = Normal(init_scale=scale), torch.tensor([0.2, 0.1], dtype=torch.float64)
    context = torch.tensor([[loc, 0.0]] * 2, dtype=torch.float64)
    part = guides_table.Part(family, torch.Size([]), context)
    prior = dist.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    args = (prior, lambda z, shift: dist.Normal(z + shift, 1.0).log_prob(x))
    one = guides_table.exact(*args, theta, [part], torch.zeros(1, dtype=torch.float64))
    value = dist.Normal(loc + theta, 1.0).log_prob(x) - scale**2 - loc**2 / 2 - 0.5 * math.log(2 * math.pi)
    value = value + 0.5 + math.log(scale) + 0.5 * math.log(2 * math.pi)
    assert torch.allclose(one.value, value, rtol=1e-8) and torch.allclose(one.model, x - loc - theta, rtol=1e-6)
    assert torch.allclose(one.guide[0][:, 0], x - loc - theta - loc, rtol=1e-6)
    two = guides_table.exact(*args, theta, [part], torch.zeros(1, dtype=torch.float64), two_draws=True)
    q = dist.Normal(torch.full((2,), loc, dtype=torch.float64), scale)
    z = q.sample((2, 500_000))
    weights = args[0].log_prob(z) + args[1](z, theta) - q.log_prob(z)
    assert_mean(weights.logsumexp(0) - math.log(2), two.value, detect=0.01)
