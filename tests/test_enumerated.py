"""The exact E-step of discrete latents, and the M-steps on top of it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor
from torch.nn.functional import one_hot

import pyro_emvae as emvae
from pyro_emvae import EM, EmvaeError, steps
from pyro_emvae.parameters import assign
from pyro_emvae.posterior import EnumeratedPosterior
from pyro_emvae.testing import check_step

K = 3
X = torch.tensor([-2.1, -1.8, 0.2, 0.4, 1.9, 2.3, 2.2], dtype=torch.float64)


def leaf(name: str, value: Any, constraint: Any = constraints.real, dtype: torch.dtype = torch.float64) -> Tensor:
    return pyro.param(name, torch.as_tensor(value, dtype=dtype), constraint=constraint)


def mixture(x: Tensor, size: int | None = None, index: Tensor | None = None, mask: Tensor | None = None) -> None:
    dtype = x.dtype
    weights = leaf("weights", [0.2, 0.5, 0.3], constraints.simplex, dtype)
    loc = leaf("loc", [-1.0, 0.1, 1.5], dtype=dtype)
    scale = leaf("scale", [0.7, 1.1, 0.9], constraints.positive, dtype)
    with pyro.plate("data", size or len(x), subsample=index), poutine.mask(mask=True if mask is None else mask):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def responsibilities(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p(x_n), and p(z_n = k | x_n): (N, K)."""
    mixture(x)
    joint = pyro.param("weights").log() + dist.Normal(pyro.param("loc"), pyro.param("scale")).log_prob(x[:, None])
    return joint.logsumexp(-1), joint.softmax(-1)


def statistics(values: dict[str, Tensor], x: Tensor, *rest: Any) -> dict[str, Tensor]:
    r = one_hot(values["z"], K).to(x)
    return {"n": r, "x": r * x[:, None], "xx": r * x[:, None] ** 2}


def update(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
    loc = s["x"] / s["n"]
    return {"weights": s["n"] / s["n"].sum(), "loc": loc, "scale": (s["xx"] / s["n"] - loc**2).sqrt()}


def unconstrained(*names: str) -> list[Tensor]:
    return [pyro.param(name).unconstrained() for name in names]


# The posterior --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_posterior_of_a_mixture(dtype):
    x = X.to(dtype)
    log_p, r = responsibilities(x)
    posterior = EnumeratedPosterior(mixture, (x,), {}, 1)
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 1e-12, "atol": 0}
    torch.testing.assert_close(torch.tensor(posterior.log_evidence, dtype=dtype), log_p.sum().detach(), **tolerance)
    torch.testing.assert_close(posterior.marginal("z").probs, r.detach(), **tolerance)
    torch.testing.assert_close(posterior.expect(lambda v: one_hot(v["z"], K).to(x)), r.detach(), **tolerance)
    entropy = -(r * r.log()).sum().detach()
    torch.testing.assert_close(torch.tensor(posterior.entropy, dtype=dtype), entropy, rtol=1e-4, atol=1e-6)


def test_the_derivative_of_the_expected_log_joint_is_that_of_the_evidence():
    """Fisher's identity, at the theta of the E-step."""
    log_p, _ = responsibilities(X)
    leaves = unconstrained("weights", "loc", "scale")
    expected = torch.autograd.grad(log_p.sum(), leaves)
    posterior = EnumeratedPosterior(mixture, (X,), {}, 1)
    found = torch.autograd.grad(posterior.expected_log_joint(1), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_subsample_scale_and_mask():
    index, mask = torch.tensor([0, 2, 5]), torch.tensor([True, False, True])
    log_p, r = responsibilities(X[index])
    posterior = EnumeratedPosterior(mixture, (X[index], len(X), index, mask), {}, 1)
    assert posterior.log_evidence == pytest.approx(float(log_p[mask].detach().sum()) * 7 / 3, rel=1e-12)
    totals = posterior.support(1).total(lambda values: statistics(values, X[index]))
    torch.testing.assert_close(totals["x"], (r * X[index, None])[mask].sum(0).detach() * 7 / 3, rtol=1e-12, atol=0)


def test_the_latents_of_masked_data_do_not_count():
    """The maximum of the expected log joint is the update in closed form, which leaves them out."""
    mask = torch.arange(7) < 4
    em = EM(mixture, e_step="enumerated", m_step=steps.ClosedForm(statistics, update))
    em.engine.setup((X,), {"mask": mask})
    _, posterior, _ = em.e_step.expect(em.engine, em.engine.state, X, mask=mask)
    totals = posterior.support(1).total(lambda values: statistics(values, X))
    assign(em.blocks, update(totals, {}))
    leaves = unconstrained("weights", "loc", "scale")
    for g in torch.autograd.grad(posterior.expected_log_joint(1), leaves):
        torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-10)


def test_statistics_of_masked_data_may_be_nan():
    x, mask = torch.cat([X, torch.tensor([math.nan], dtype=X.dtype)]), torch.arange(8) < 7

    def model(x: Tensor) -> None:
        mixture(torch.nan_to_num(x), mask=mask)

    totals = EnumeratedPosterior(model, (x,), {}, 1).support(1).total(lambda values: statistics(values, x))
    plain = EnumeratedPosterior(mixture, (X,), {}, 1).support(1).total(lambda values: statistics(values, X))
    torch.testing.assert_close(totals, plain, rtol=1e-12, atol=0)


def two_levels(x: Tensor) -> None:
    """A group label per row, a switch per element that depends on it, and an observation of neither."""
    loc = leaf("loc", [-1.0, 1.5])
    prior = leaf("prior", [0.3, 0.8], constraints.unit_interval)
    with pyro.plate("rows", x.shape[0], dim=-2):
        g = pyro.sample("g", dist.Bernoulli(torch.tensor(0.4, dtype=x.dtype)))
        with pyro.plate("columns", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Bernoulli(prior[g.long()]))
            pyro.sample("x", dist.Normal(loc[z.long()], 1.0), obs=x)
    pyro.sample("a", dist.Normal(loc.sum(), 1.0), obs=torch.tensor(0.2))


def test_nested_plates_against_sums_by_hand():
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    posterior = EnumeratedPosterior(two_levels, (x,), {}, 2)
    loc, prior = pyro.param("loc"), pyro.param("prior")
    like = dist.Normal(loc, 1.0).log_prob(x[..., None])  # rows, columns, z
    given = torch.stack([(1 - prior).log(), prior.log()], -1)  # g, z
    column = (like[:, :, None] + given).logsumexp(-1)  # rows, columns, g
    row = column.sum(1) + torch.tensor([0.6, 0.4]).log()
    expected = row.logsumexp(-1).sum() + dist.Normal(loc.sum(), 1.0).log_prob(torch.tensor(0.2))
    assert posterior.log_evidence == pytest.approx(float(expected.detach()), rel=1e-6)
    g = row.softmax(-1)[:, 1]
    torch.testing.assert_close(posterior.marginal("g").probs.squeeze(-1), g.detach(), rtol=1e-6, atol=0)
    theirs = TraceEnum_ELBO(max_plate_nesting=2).loss(config_enumerate(two_levels, "parallel"), lambda x: None, x)
    assert posterior.log_evidence == pytest.approx(-theirs, rel=1e-10)
    with pytest.raises(EmvaeError, match="joint outcomes"):
        posterior.support(1)


def dependent(x: Tensor) -> None:
    """Two latents in one plate, the second given the first, one of them one-hot."""
    loc = leaf("loc", [[-1.0, 0.5], [0.3, 1.7], [2.0, -0.4]])
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3], dtype=x.dtype)))
        z = pyro.sample("z", dist.Bernoulli((k * torch.tensor([0.1, 0.6, 0.9], dtype=x.dtype)).sum(-1)))
        means = (k[..., None] * loc).sum(-2)
        pyro.sample("x", dist.Normal(torch.where(z.bool(), means[..., 1], means[..., 0]), 1.0), obs=x)


def test_draws_and_their_density_are_those_of_the_posterior():
    """`Trace_ELBO` of the guide is log p(x) for every draw, so draws and density are both right."""
    em = EM(dependent, e_step=steps.Enumerated(), m_step=steps.ClosedForm(dict, lambda s, p: {}))
    exact = em.posterior(X).log_evidence
    losses = [Trace_ELBO().loss(dependent, em.guide, X) for _ in range(20)]
    assert losses == pytest.approx([-exact] * 20, rel=1e-10)
    support = em.posterior(X).support(1)
    torch.testing.assert_close(support.log_weights.exp().sum(0), torch.ones(7, dtype=X.dtype))
    draws = Predictive(dependent, guide=em.guide, num_samples=3)(X)
    assert draws["k"].shape == (3, 7, 3) and draws["z"].shape == (3, 7)


# Chains ---------------------------------------------------------------------------------------------------------


def chain(y: Tensor, mask: Tensor) -> None:
    initial = leaf("initial", [0.5, 0.3, 0.2], constraints.simplex)
    transition = leaf("transition", [[0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6]], constraints.simplex)
    loc = leaf("loc", [-1.0, 0.5, 2.0])
    with pyro.plate("sequences", y.shape[1], dim=-1):
        z: Any = None
        for t in pyro.markov(range(len(y))):
            with poutine.mask(mask=mask[t]):
                z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
                pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


def forward_backward(y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p(y) per sequence, and the responsibilities: (T, N, K)."""
    emission = dist.Normal(pyro.param("loc"), 1.0).log_prob(y[..., None]) * mask[..., None]
    log_a = pyro.param("transition").log()
    alphas = [pyro.param("initial").log() + emission[0]]
    for e in emission[1:]:
        alphas.append((alphas[-1][:, :, None] + log_a).logsumexp(1) + e)
    beta = torch.zeros_like(alphas[0])
    gammas = [alphas[-1].softmax(-1)]
    for alpha, e in zip(reversed(alphas[:-1]), reversed(emission[1:]), strict=True):
        beta = (log_a + (beta + e)[:, None]).logsumexp(-1)
        gammas.append((alpha + beta).softmax(-1))
    return alphas[-1].logsumexp(-1), torch.stack(gammas[::-1])


def test_chains_of_ragged_length_equal_forward_backward():
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    mask = torch.arange(60)[:, None] < torch.tensor([60, 31, 5, 44])
    posterior = EnumeratedPosterior(chain, (y, mask), {}, 1)
    log_p, gamma = forward_backward(y, mask)
    assert posterior.log_evidence == pytest.approx(float(log_p.detach().sum()), rel=1e-10)
    for t in (0, 4, 30):
        found = posterior.marginal(f"z_{t}").probs
        torch.testing.assert_close(found[mask[t]], gamma[t][mask[t]].detach(), rtol=1e-8, atol=1e-12)
    leaves = unconstrained("initial", "transition", "loc")
    expected = torch.autograd.grad(log_p.sum(), leaves)
    found = torch.autograd.grad(posterior.expected_log_joint(1), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


# EM -------------------------------------------------------------------------------------------------------------


def test_textbook_em_climbs_the_evidence_every_iteration():
    em = EM(mixture, e_step="enumerated", m_step=steps.ClosedForm(statistics, update))
    losses = []
    for _ in range(30):
        before = float(responsibilities(X)[0].detach().sum())
        losses.append(em.step(X))
        assert losses[-1] == pytest.approx(-before, rel=1e-12)  # the ELBO after E is the evidence at the old theta
    assert all(b <= a + 1e-10 for a, b in itertools.pairwise(losses))
    assert losses[0] - losses[-1] > 0.5
    assert {row.name: row.block for row in em.blocks.rows} == dict.fromkeys(["weights", "loc", "scale"], "model")


def test_the_closed_form_is_the_one_by_hand():
    _, r = responsibilities(X)
    EM(mixture, e_step="enumerated", m_step=steps.ClosedForm(statistics, update)).step(X)
    n = r.sum(0)
    loc = (r * X[:, None]).sum(0) / n
    expected = {"weights": n / n.sum(), "loc": loc, "scale": ((r * (X[:, None] - loc) ** 2).sum(0) / n).sqrt()}
    for name, value in expected.items():
        torch.testing.assert_close(pyro.param(name).detach(), value.detach(), rtol=1e-10, atol=0)


def test_gradient_m_step_after_an_exact_e_step_is_the_gradient_of_the_evidence():
    log_p, _ = responsibilities(X)
    before = [p.detach().clone() for p in unconstrained("weights", "loc", "scale")]
    gradient = torch.autograd.grad(log_p.sum(), unconstrained("weights", "loc", "scale"))
    em = EM(mixture, optim=lambda params: torch.optim.SGD(params, lr=0.01), e_step="enumerated")
    assert em.step(X) == pytest.approx(-float(log_p.sum().detach()), rel=1e-12)
    for old, new, g in zip(before, unconstrained("weights", "loc", "scale"), gradient, strict=True):
        torch.testing.assert_close(new.detach(), old + 0.01 * g, rtol=1e-10, atol=1e-12)


def test_both_m_steps_land_on_the_same_maximum():
    closed = EM(mixture, e_step="enumerated", m_step=steps.ClosedForm(statistics, update))
    for _ in range(500):
        best = closed.step(X)
    values = closed.blocks.constrained()
    pyro.clear_param_store()
    climb = EM(mixture, optim=pyro.optim.Adam({"lr": 0.05}), e_step="enumerated", m_step=steps.Gradient(5))
    for _ in range(300):
        loss = climb.step(X)
    assert loss == pytest.approx(best, abs=1e-2)
    for name, value in climb.blocks.constrained().items():
        torch.testing.assert_close(value, values[name], rtol=0.05, atol=0.05)


def test_evidence_of_the_guide_is_exact():
    em = EM(mixture, e_step="enumerated", m_step=steps.ClosedForm(statistics, update))
    em.step(X)
    new = torch.tensor([0.0, 3.0], dtype=X.dtype)
    for x in (X, new):
        exact = float(responsibilities(x)[0].detach().sum())
        estimate = emvae.log_evidence(mixture, em.guide, x, num_particles=5)
        assert estimate.value == pytest.approx(exact, rel=1e-10) and estimate.standard_error < 1e-8
        assert em.posterior(x).log_evidence == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("slot", ["enumerated"])
def test_nothing_else_moves(slot):
    """An E-step leaves parameters, buffers and the generator's stream alone."""
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Linear(1, K)).double()

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=net(x[:, None])))
            pyro.sample("x", dist.Normal(leaf("loc", [-1.0, 0.1, 1.5])[z], 1.0), obs=x)

    em = EM(model, optim=pyro.optim.Adam({"lr": 0.01}), e_step=slot)
    em.step(X)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    generator = torch.get_rng_state()
    em.e_step.expect(em.engine, em.engine.state, X)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


# Bad input ------------------------------------------------------------------------------------------------------


def continuous(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(leaf("loc", 0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def no_latent(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(leaf("loc", 0.0), 1.0), obs=x)


def two_scales(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(leaf("weights", [0.2, 0.5, 0.3], constraints.simplex)))
        with poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(z.to(x), 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "observed"),
    [(continuous, "'z'.*Normal"), (no_latent, "without latents"), (two_scales, r"scales \[0.5, 1.0\]")],
)
def test_models_that_cannot_be_enumerated(model, observed):
    em = EM(model, optim=pyro.optim.Adam({"lr": 0.1}), e_step="enumerated")
    with pytest.raises(EmvaeError, match=observed):
        em.step(X)


UPDATES = {
    "name": (lambda s, p: {"wieghts": p["weights"]}, "'wieghts'.*'weights'"),
    "shape": (lambda s, p: {"loc": p["loc"][:2]}, r"shape \(2,\)"),
    "constraint": (lambda s, p: {"loc": p["loc"] + 1, "scale": -p["scale"]}, "'scale'.*outside"),
    "finite": (lambda s, p: {"scale": p["scale"] / 0}, "'scale'.*inf"),
    "no number": (lambda s, p: {"scale": "one"}, "'scale': got 'one'"),
    "complex": (lambda s, p: {"loc": p["loc"] + 1j}, r"'loc': got torch\.complex"),
    "simplex": (lambda s, p: {"weights": 2 * p["weights"]}, r"'weights'.*outside Simplex"),
}


@pytest.mark.parametrize("key", UPDATES)
def test_an_update_that_returns_nonsense_changes_nothing(key):
    wrong, observed = UPDATES[key]
    em = EM(mixture, e_step="enumerated", m_step=steps.ClosedForm(statistics, wrong))
    em.engine.setup((X,), {})
    before = em.blocks.constrained()
    with pytest.raises(EmvaeError, match=observed):
        em.step(X)
    assert all(torch.equal(value, before[name]) for name, value in em.blocks.constrained().items())


def test_statistics_of_a_batch_that_the_model_draws_are_refused():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=3) as index:
            z = pyro.sample("z", dist.Categorical(leaf("weights", [0.2, 0.5, 0.3], constraints.simplex)))
            pyro.sample("x", dist.Normal(z.to(x), 1.0), obs=x[index])

    em = EM(model, e_step="enumerated", m_step=steps.ClosedForm(statistics, update))
    with pytest.raises(EmvaeError, match="subsample_size"):
        em.step(X)
    em = EM(model, optim=pyro.optim.Adam({"lr": 0.1}), e_step="enumerated")
    assert len({em.step(X) for _ in range(5)}) > 1  # batches differ


def test_a_guide_is_needed_by_e_steps_that_move_one():
    with pytest.raises(EmvaeError, match="no guide"):
        EM(mixture, optim=pyro.optim.Adam({"lr": 0.1}))


@pytest.mark.parametrize("slot", ["M"])
def test_gradient_still_fits(slot):
    check_step("gradient", slot)
