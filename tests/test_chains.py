"""Hidden Markov models: the E-step, its cliques and draws, and the Baum-Welch M-step.

The reference is a forward-backward algorithm in log space written here, and figures that hmmlearn 0.3.3 gave for the
same sequences; the package itself is no dependency.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Predictive, Trace_ELBO
from torch import Tensor

from pyro_emvae import EM, EmvaeError, steps
from pyro_emvae.posterior import EnumeratedPosterior

K, D = 5, 2


def leaf(name: str, value: Tensor, constraint: Any = constraints.real) -> Tensor:
    return pyro.param(name, value.clone(), constraint=constraint)


def start(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(K, K, generator=generator, dtype=torch.float64)
    transition = 4 * torch.eye(K, dtype=torch.float64) + noise
    values = {
        "initial": torch.tensor([0.4, 0.2, 0.2, 0.1, 0.1]),
        "transition": transition / transition.sum(-1, keepdim=True),
        "means": torch.randn(K, D, generator=generator, dtype=torch.float64) * 2,
        "scales": 0.6 + torch.rand(K, D, generator=generator, dtype=torch.float64),
    }
    return {name: value.to(dtype) for name, value in values.items()}


def params(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    simplex = {"initial": constraints.simplex, "transition": constraints.simplex, "scales": constraints.positive}
    return {name: leaf(name, value, simplex.get(name, constraints.real)) for name, value in start(dtype).items()}


def chain(y: Tensor, mask: Tensor, size: int | None = None, index: Tensor | None = None, seen: Any = True) -> None:
    p = params(y.dtype)
    seen = torch.as_tensor(seen).expand(mask.shape)
    with pyro.plate("sequences", size or y.shape[1], subsample=index, dim=-1):
        z: Any = None
        for t in pyro.markov(range(len(y))):
            with poutine.mask(mask=mask[t]):
                z = pyro.sample(f"z_{t}", dist.Categorical(p["initial"] if z is None else p["transition"][z]))
                emission = dist.Normal(p["means"][z], p["scales"][z]).to_event(1)
                with poutine.mask(mask=seen[t]):
                    pyro.sample(f"y_{t}", emission, obs=torch.nan_to_num(y[t]))


def sequences(length: int, number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences from the start's model of all lengths: among them whole, 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    p = start()
    z = torch.multinomial(p["initial"], number, replacement=True, generator=generator)
    rows = []
    for _ in range(length):
        rows.append(1.3 * p["means"][z] + torch.randn(number, D, generator=generator, dtype=torch.float64))
        z = torch.multinomial(p["transition"][z], 1, generator=generator).squeeze(-1)
    lengths = torch.randint(2, length, (number,), generator=generator)
    lengths[:3] = torch.tensor([length, 1, 0])
    mask = torch.arange(length)[:, None] < lengths
    return torch.where(mask[..., None], torch.stack(rows), math.nan), mask


def forward_backward(emission: Tensor, initial: Tensor, transition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p(y) per sequence, p(z_t | y): (T, N, K), and p(z_{t-1}, z_t | y): (T - 1, N, K, K), in log space."""
    log_a = transition.log()
    alphas = [initial.log() + emission[0]]
    for e in emission[1:]:
        alphas.append((alphas[-1][:, :, None] + log_a).logsumexp(1) + e)
    betas = [torch.zeros_like(alphas[0])]
    for e in emission.flip(0)[:-1]:
        betas.append((log_a + (betas[-1] + e)[:, None]).logsumexp(-1))
    alpha, beta, log_p = torch.stack(alphas), torch.stack(betas[::-1]), alphas[-1].logsumexp(-1)
    gamma = (alpha + beta - log_p[:, None]).exp()
    xi = (alpha[:-1, ..., None] + log_a + (beta + emission)[1:, :, None] - log_p[:, None, None]).exp()
    return log_p, gamma, xi


def reference(y: Tensor, mask: Tensor, seen: Any = True) -> tuple[Tensor, Tensor, Tensor]:
    p = params(y.dtype)
    emission = dist.Normal(p["means"], p["scales"]).to_event(1).log_prob(torch.nan_to_num(y)[:, :, None])
    return forward_backward(emission * (mask & seen)[..., None], p["initial"], p["transition"])


def baum_welch(y: Tensor, mask: Tensor, seen: Any = True) -> dict[str, Tensor]:
    _, gamma, xi = (x.detach() for x in reference(y, mask, seen))
    counts = (xi * mask[1:, :, None, None]).sum((0, 1))
    weights = (gamma * (mask & seen)[..., None])[..., None]  # T, N, K, 1
    y = torch.nan_to_num(y)[:, :, None]
    means = (weights * y).sum((0, 1)) / weights.sum((0, 1))
    variances = (weights * (y - means).square()).sum((0, 1)) / weights.sum((0, 1))
    first = gamma[0][mask[0]].sum(0)
    shares = {"initial": first / first.sum(), "transition": counts / counts.sum(-1, keepdim=True)}
    return {**shares, "means": means, "scales": variances.sqrt()}


def m_step(**kwargs: Any) -> steps.ClosedForm:
    return steps.hidden_markov(steps.gaussian_mixture(K, "diagonal"), **kwargs)


def fitted(expected: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {name: pyro.param(name).detach() for name in expected}, expected


# The posterior --------------------------------------------------------------------------------------------------


def assert_equals_forward_backward(y: Tensor, mask: Tensor) -> tuple[float, float]:
    """Compare the evidence and the cliques; return the greatest relative and absolute error."""
    posterior = EnumeratedPosterior(chain, (y, mask), {}, 1)
    log_p, gamma, xi = (x.detach() for x in reference(y, mask))
    names = list(posterior.latents)
    found = torch.stack([posterior.clique(name.replace("z", "y")) for name in names])
    pairs = torch.stack([posterior.clique(name) for name in names[1:]])
    torch.testing.assert_close(found, gamma, rtol=0, atol=1e-8)
    torch.testing.assert_close(pairs, xi, rtol=0, atol=1e-8)
    assert posterior.log_evidence == pytest.approx(float(log_p.sum()), rel=1e-8)
    return abs(posterior.log_evidence / float(log_p.sum()) - 1), float((found - gamma).abs().max())


HMMLEARN = {  # of `score_samples`: log p(y), and the responsibilities of each state, summed over times and sequences
    30: (
        -1306.056191941605,
        [76.58715895220597, 74.02024076532823, 59.32894694469577, 46.94564972972875, 90.11800360804126],
    ),
    1000: (
        -39693.13950317392,
        [2247.4771999985605, 1675.2150739169397, 1903.3734554797343, 2116.3745493393917, 2795.5597212653465],
    ),
}
SQUARES = {30: 258.15598615900217, 1000: 8164.009199037044}  # of all those responsibilities


def assert_equals_hmmlearn(length: int) -> None:
    """On 20 ragged sequences, the parameters as in `start`."""
    y, mask = sequences(length, 20)
    posterior = EnumeratedPosterior(chain, (y, mask), {}, 1)
    found = torch.stack([posterior.clique(name.replace("z", "y")) for name in posterior.latents])[mask]
    log_p, sums = HMMLEARN[length]
    assert abs(posterior.log_evidence - log_p) / 20 < 1e-8
    assert found.sum(0).tolist() == pytest.approx(sums, abs=1e-8)
    assert float(found.square().sum()) == pytest.approx(SQUARES[length], abs=1e-8)


def test_evidence_and_responsibilities_equal_hmmlearns():
    assert_equals_hmmlearn(30)


def test_evidence_and_responsibilities_equal_forward_backward():
    assert_equals_forward_backward(*sequences(300, 20))


def test_marginals_are_sums_of_cliques():
    y, mask = sequences(12, 3)
    posterior = EnumeratedPosterior(chain, (y, mask), {}, 1)
    for t in (0, 1, 11):
        gamma = reference(y, mask)[1][t].detach()
        torch.testing.assert_close(posterior.marginal(f"z_{t}").probs, gamma, rtol=0, atol=1e-10)
    assert posterior.depends("z_0") == ("z_0",) and posterior.depends("z_5") == ("z_4", "z_5")
    assert posterior.depends("y_5") == ("z_5",)


def test_counts_have_scale_and_mask():
    y, mask = sequences(12, 4)
    index = torch.tensor([0, 3])
    posterior = EnumeratedPosterior(chain, (y[:, index], mask[:, index], 4, index), {}, 1)
    _, _, xi = (x.detach() for x in reference(y, mask))
    for t in (1, 11):
        expected = 2 * xi[t - 1, index] * mask[t, index, None, None]
        torch.testing.assert_close(posterior.expected_counts(f"z_{t}"), expected, rtol=0, atol=1e-10)


def test_draws_and_their_density_are_those_of_the_posterior():
    """`Trace_ELBO` of the guide is log p(y) for every draw, on a chain of far too many joint outcomes to list."""
    y, _ = sequences(60, 3)
    y, mask = torch.nan_to_num(y), torch.ones(60, 3, dtype=torch.bool)
    em = EM(chain, e_step="enumerated", m_step=m_step())
    exact = float(reference(y, mask)[0].detach().sum())
    losses = [Trace_ELBO().loss(chain, em.guide, y, mask) for _ in range(3)]
    assert losses == pytest.approx([-exact] * 3, rel=1e-10)
    assert Predictive(chain, guide=em.guide, num_samples=2)(y, mask)["z_59"].shape[0] == 2


def coupled(x: Tensor) -> None:
    """Two latents that are independent a priori, and not a posteriori; a third that depends on neither's clique."""
    a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.3, dtype=x.dtype)))
    b = pyro.sample("b", dist.Categorical(torch.tensor([0.2, 0.3, 0.5], dtype=x.dtype)))
    c = pyro.sample("c", dist.Bernoulli(0.2 + 0.5 * a))
    pyro.sample("x", dist.Normal(a + b, 0.5), obs=x)
    pyro.sample("y", dist.Normal(2 * b + c, 0.5), obs=x)


def test_draws_of_latents_that_only_the_data_couple():
    x = torch.tensor(1.2, dtype=torch.float64)
    em = EM(coupled, e_step="enumerated", m_step=steps.ClosedForm(dict, lambda s, p: {}))
    exact = em.posterior(x).log_evidence
    losses = [Trace_ELBO().loss(coupled, em.guide, x) for _ in range(20)]
    assert losses == pytest.approx([-exact] * 20, rel=1e-10)
    assert em.posterior(x).clique("y").shape == (3, 2)


# EM -------------------------------------------------------------------------------------------------------------


def test_one_step_is_that_of_baum_and_welch():
    y, mask = sequences(100, 20)
    expected = baum_welch(y, mask)
    EM(chain, e_step="enumerated", m_step=m_step()).step(y, mask)
    torch.testing.assert_close(*fitted(expected), rtol=1e-8, atol=1e-8)


def test_counting_masked_states_would_be_seen(monkeypatch):
    y, mask = sequences(30, 6)
    expected = baum_welch(y, mask)
    monkeypatch.setattr(EnumeratedPosterior, "expected_counts", EnumeratedPosterior.clique)
    EM(chain, e_step="enumerated", m_step=m_step()).step(y, mask)
    for name in ("initial", "transition"):
        assert (pyro.param(name) - expected[name]).abs().max() > 1e-2


def test_a_missing_value_inside_a_sequence():
    y, mask = sequences(40, 5)
    seen = torch.rand(40, 5, generator=torch.Generator().manual_seed(0)) < 0.8
    y = torch.where(seen[..., None], y, math.nan)
    expected = baum_welch(y, mask, seen)
    EM(chain, e_step="enumerated", m_step=m_step()).step(y, mask, seen=seen)
    torch.testing.assert_close(*fitted(expected), rtol=1e-8, atol=1e-8)


def test_the_evidence_never_decreases():
    y, mask = sequences(60, 10)
    em = EM(chain, e_step="enumerated", m_step=m_step())
    losses = []
    for _ in range(12):
        before = float(reference(y, mask)[0].detach().sum())
        losses.append(em.step(y, mask))
        assert losses[-1] == pytest.approx(-before, rel=1e-12)
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(losses))
    assert losses[0] - losses[-1] > 10


def test_the_gradient_m_step_climbs_the_evidence():
    y, mask = sequences(40, 6)
    leaves = [p.unconstrained() for p in params().values()]
    before = [p.detach().clone() for p in leaves]
    gradient = torch.autograd.grad(reference(y, mask)[0].sum(), leaves)
    EM(chain, optim=lambda params: torch.optim.SGD(params, lr=1e-3), e_step="enumerated").step(y, mask)
    for old, new, g in zip(before, leaves, gradient, strict=True):
        torch.testing.assert_close((new.detach() - old) / 1e-3, g, rtol=1e-7, atol=1e-8)


def test_a_minibatch_of_sequences_counts_scaled():
    """Its maximum is that of the batch alone: the scale of all sums cancels."""
    y, mask = sequences(30, 6)
    index = torch.tensor([0, 2, 4, 5])
    expected = baum_welch(y[:, index], mask[:, index])
    EM(chain, e_step="enumerated", m_step=m_step()).step(y[:, index], mask[:, index], 6, index)
    torch.testing.assert_close(*fitted(expected), rtol=1e-8, atol=1e-8)


def test_float32():
    y, mask = sequences(30, 6)
    expected = {name: value.float() for name, value in baum_welch(y, mask).items()}
    pyro.clear_param_store()
    EM(chain, e_step="enumerated", m_step=m_step()).step(y.float(), mask)
    torch.testing.assert_close(*fitted(expected), rtol=1e-3, atol=1e-4)


def counts_chain(y: Tensor) -> None:
    """One sequence in no plate: of vectors of counts."""
    initial = pyro.param("first", torch.tensor([0.5, 0.5]).to(y), constraint=constraints.simplex)
    transition = pyro.param("then", torch.tensor([[0.8, 0.2], [0.4, 0.6]]).to(y), constraint=constraints.simplex)
    rates = pyro.param("rates", torch.tensor([[1.0, 2.0], [3.0, 5.0]]).to(y), constraint=constraints.positive)
    state: Any = None
    for t in pyro.markov(range(len(y))):
        state = pyro.sample(f"state{t}", dist.Categorical(initial if state is None else transition[state]))
        pyro.sample(f"count{t}", dist.Poisson(rates[state]).to_event(1), obs=y[t])


def test_other_names_emissions_and_no_plate():
    y = torch.poisson(torch.full((20, 2), 3.0, dtype=torch.float64), torch.Generator().manual_seed(1))
    initial, then = torch.tensor([0.5, 0.5]).to(y), torch.tensor([[0.8, 0.2], [0.4, 0.6]]).to(y)
    emission = dist.Poisson(torch.tensor([[1.0, 2.0], [3.0, 5.0]]).to(y)).to_event(1).log_prob(y[:, None])
    _, gamma, xi = forward_backward(emission[:, None], initial, then)
    step = steps.hidden_markov(
        steps.poisson_mixture(2), latent="state{}", observed="count{}", initial=None, transition="then"
    )
    EM(counts_chain, e_step="enumerated", m_step=step).step(y)
    counts, gamma = xi.sum((0, 1)), gamma.squeeze(1)
    expected = {
        "first": initial,
        "then": counts / counts.sum(-1, keepdim=True),
        "rates": gamma.T @ y / gamma.sum(0)[:, None],
    }
    torch.testing.assert_close(*fitted(expected), rtol=1e-6, atol=1e-8)


LEFT_TO_RIGHT = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.6, 0.4], [0.0, 0.0, 1.0]], dtype=torch.float64)
ONWARDS = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)


def left_to_right(y: Tensor) -> None:
    then = leaf("then", LEFT_TO_RIGHT, constraints.simplex)
    rates = leaf("rates", torch.tensor([[2.0], [5.0], [9.0]]).to(y), constraints.positive)
    z: Any = None
    with pyro.plate("sequences", y.shape[1], dim=-1):
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(ONWARDS if z is None else then[z]))
            pyro.sample(f"y_{t}", dist.Poisson(rates[z]).to_event(1), obs=y[t, :, None])


def test_a_transition_that_is_impossible_stays_so_up_to_rounding():
    """Baum and Welch's iterates with exact zeros; a kept zero is where a Categorical of probability 0 puts it."""
    generator = torch.Generator().manual_seed(2)
    y = torch.poisson(torch.linspace(1.0, 12.0, 10, dtype=torch.float64)[:, None].expand(10, 8), generator=generator)
    step = steps.hidden_markov(steps.poisson_mixture(3), initial=None, transition="then")
    fit = EM(left_to_right, e_step="enumerated", m_step=step).run(y, max_iter=20, stop=None)
    then, rates, evidence = LEFT_TO_RIGHT, torch.tensor([2.0, 5.0, 9.0]).to(y), []
    for _ in range(20):
        log_p, gamma, xi = forward_backward(dist.Poisson(rates).log_prob(y[..., None]), ONWARDS, then)
        evidence.append(float(log_p.sum()))
        counts = xi.nan_to_num().sum((0, 1))
        then = torch.where(counts.sum(-1, keepdim=True) > 0, counts / counts.sum(-1, keepdim=True), then)
        rates = (gamma * y[..., None]).sum((0, 1)) / gamma.sum((0, 1))
    assert (counts == 0).sum() == 4 and evidence[-1] > evidence[0] + 1.0
    np.testing.assert_allclose(fit.history["objective"].values, evidence, rtol=1e-9)
    torch.testing.assert_close(fit.params["then"], then, rtol=1e-7, atol=1e-14)
    torch.testing.assert_close(fit.params["rates"].squeeze(-1), rates, rtol=1e-7, atol=0)
    assert 0 < fit.params["then"][then == 0].max() <= 2 * torch.finfo(torch.float64).eps


def test_a_state_that_is_never_left_keeps_its_row():
    update = m_step().update
    counts = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    old = torch.tensor([[0.5, 0.5], [0.3, 0.7]])
    sums = {"initial": torch.tensor([2.0, 0.0]), "transition": counts}
    ones = {"emission.count": torch.ones(2), "emission.first": torch.eye(2), "emission.second": 2 * torch.eye(2) + 1}
    new = update({**sums, **ones}, {"transition": old})
    torch.testing.assert_close(new["transition"], torch.tensor([[0.25, 0.75], [0.3, 0.7]]))
    torch.testing.assert_close(new["initial"], torch.tensor([1.0, 0.0]))
    assert bool((new["initial"] > 0).all()) and "weights" not in new


# Cost -----------------------------------------------------------------------------------------------------------


def ratio_of_seconds(short: int, long: int) -> float:
    """Seconds of an EM step at one length over those at another: the median of pairs, taken in turn, so that load on
    the machine falls on both.
    """
    runs = []
    for length in (short, long):
        data = sequences(length, 20)
        em = EM(chain, e_step="enumerated", m_step=m_step())
        em.step(*data)  # finds the parameters
        runs.append((em, data))
    ratios = []
    for _ in range(7):
        spent = []
        for em, data in runs:
            begin = time.process_time()
            em.step(*data)
            spent.append(time.process_time() - begin)
        ratios.append(spent[1] / spent[0])
    return sorted(ratios)[3]


def test_the_cost_is_linear_in_the_length():
    """Four times the length costs about four times as much, not sixteen."""
    assert ratio_of_seconds(50, 200) < 6


@pytest.mark.slow
def test_twenty_ragged_sequences_of_a_thousand(record_result):
    assert_equals_hmmlearn(1000)
    y, mask = sequences(1000, 20)
    relative, absolute = assert_equals_forward_backward(y, mask)
    expected = baum_welch(y, mask)
    em = EM(chain, e_step="enumerated", m_step=m_step())
    em.step(y, mask)
    torch.testing.assert_close(*fitted(expected), rtol=1e-8, atol=1e-8)
    worst = max(float((pyro.param(name).detach() - value).abs().max()) for name, value in expected.items())
    record_result(
        "HMM, 5 states, T = 1,000, 20 ragged sequences, against forward-backward by hand",
        f"log p {relative:.1e} (relative), responsibilities {absolute:.1e}, Baum-Welch step {worst:.1e}",
    )
    ratio = ratio_of_seconds(250, 1000)
    record_result("HMM, seconds of an EM step at T = 1,000 over those at T = 250", f"{ratio:.2f}")
    assert ratio < 6


# Bad input ------------------------------------------------------------------------------------------------------


def second_order(y: Tensor, mask: Tensor) -> None:
    p = params()
    z = [pyro.sample("z_0", dist.Categorical(p["initial"])), pyro.sample("z_1", dist.Categorical(p["initial"]))]
    z.append(pyro.sample("z_2", dist.Categorical((p["transition"][z[0]] + p["transition"][z[1]]) / 2)))
    for t in range(3):
        pyro.sample(f"y_{t}", dist.Normal(p["means"][z[t]], 1.0).to_event(1), obs=y[t, 0])


ALL = torch.ones(3, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("model", "kwargs", "observed"),
    [
        (chain, {"latent": "s_{}"}, "'s_0'.*no such latent"),
        (chain, {"observed": "x_{}"}, "'x_0'.*no such site"),
        (chain, {"transition": "transitoin"}, "'transitoin'.*'transition'"),
        (second_order, {}, "'z_1'.*depends on z_1"),
    ],
)
def test_models_that_are_no_such_chain(model, kwargs, observed):
    y = torch.randn(3, 2, D, dtype=torch.float64)
    em = EM(model, e_step="enumerated", m_step=m_step(**kwargs))
    em.engine.setup((y, ALL), {})
    before = em.blocks.constrained()
    with pytest.raises(EmvaeError, match=observed):
        em.step(y, ALL)
    assert all(torch.equal(value, before[name]) for name, value in em.blocks.constrained().items())


def test_a_state_masked_inside_a_sequence():
    """Its transitions would be left out of the M-step, which then climbs something else than the evidence."""
    mask = ALL.clone()
    mask[1, 0] = False
    em = EM(chain, e_step="enumerated", m_step=m_step())
    with pytest.raises(EmvaeError, match=r"'z_1' where it is masked.*'z_2'"):
        em.step(torch.randn(3, 2, D, dtype=torch.float64), mask)


def test_draws_are_not_enough():
    em = EM(chain, e_step=steps.MonteCarlo("prior"), m_step=m_step())
    with pytest.raises(EmvaeError, match="kind"):
        em.step(torch.randn(3, 2, D, dtype=torch.float64), ALL)


def test_a_clique_of_nothing():
    posterior = EnumeratedPosterior(chain, (torch.randn(3, 2, D, dtype=torch.float64), ALL), {}, 1)
    for name in ("z_3", "sequences"):
        with pytest.raises(EmvaeError, match=f"'{name}'.*no site"):
            posterior.clique(name)
