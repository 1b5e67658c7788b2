"""Mutual information and active units: closed forms, enumeration, what batches would hide, and errors."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_emvae as emvae
from pyro_emvae import problems
from pyro_emvae._checks import EmvaeError, ModelError, NonFiniteError
from pyro_emvae.evidence.encoder import Encoder
from pyro_emvae.information import information, log_mean_exp
from pyro_emvae.particles import quiet
from pyro_emvae.testing import assert_mean


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Pure functions -----------------------------------------------------------------------------------------------------


def test_information_is_the_mean_log_ratio_with_a_stratified_error():
    own, aggregate = t(-1.0, -2.0, -0.5, -3.0).reshape(2, 2), t(-1.5, -2.0, -1.5, -4.0).reshape(2, 2)
    found = information(own, aggregate, 2)
    assert found.value == pytest.approx((0.5 + 0.0 + 1.0 + 1.0) / 4, rel=1e-12)
    variances = [((0.5 - 0.75) ** 2 + (1.0 - 0.75) ** 2), ((0.0 - 0.5) ** 2 + (1.0 - 0.5) ** 2)]  # of each datum's two
    assert found.standard_error == pytest.approx(math.sqrt(sum(variances) / (2 * 2**2)), rel=1e-12)
    assert found.cap == math.log(2) and float(found) == found.value


def test_one_draw_has_the_error_of_draws_and_data():
    terms = t(0.5, 0.0, 1.0)
    found = information(terms[None], torch.zeros(1, 3), 3)
    assert found.standard_error == pytest.approx(float(terms.std()) / math.sqrt(3), rel=1e-12)
    assert math.isnan(information(terms[None, :1], torch.zeros(1, 1), 1).standard_error)


def test_log_mean_exp_by_hand():
    rows = t(0.0, 1.0, -2.0).reshape(1, 3)
    assert float(log_mean_exp(rows)) == pytest.approx(
        math.log(sum(math.exp(x) for x in (0.0, 1.0, -2.0)) / 3), rel=1e-12
    )


# Guides of one site -------------------------------------------------------------------------------------------------


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def guide_of(slope: float, scale: float):
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * torch.stack([x, 0 * x], -1), scale).to_event(1))

    return guide


def test_a_guide_that_ignores_the_data_tells_nothing():
    found = emvae.mutual_information(model, guide_of(0.0, 1.0), torch.randn(50).double(), num_particles=3)
    assert found.value == pytest.approx(0.0, abs=1e-12) and found.standard_error == pytest.approx(0.0, abs=1e-12)


def test_data_told_apart_have_the_information_of_their_number():
    """Far above log 32, which averages over batches of 32 cannot exceed."""
    x = torch.arange(500.0).double()
    found = emvae.mutual_information(model, guide_of(100.0, 1.0), x)
    assert found.value == pytest.approx(math.log(500), rel=1e-12) and "near its cap" in repr(found)
    means = [float(emvae.mutual_information(model, guide_of(100.0, 1.0), batch)) for batch in x.split(32)]
    assert max(means) <= math.log(32) + 1e-12


def test_a_certain_assignment_has_the_entropy_of_its_clusters():
    """A discrete latent, each datum in one of three clusters of 5, 3 and 2: exactly the entropy."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(torch.full((3,), 1 / 3).double()))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(torch.nn.functional.one_hot(x, 3).double()))

    x = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    expected = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2))
    assert float(emvae.mutual_information(model, guide, x, num_particles=2)) == pytest.approx(expected, rel=1e-6)


def test_a_linear_gaussian_channel():
    r"""q(z|x) = N(ax, s^2) on the quantiles of N(0, 1): near $\frac12\log(1+a^2/s^2)$; exactly by quadrature."""
    x = torch.special.ndtri((torch.arange(100).double() + 0.5) / 100)
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    log_q = dist.Normal(1.5 * x, 0.5).log_prob(grid[:, None])
    q, mixture = log_q.exp(), log_mean_exp(log_q)
    exact = float(((q * (log_q - mixture[:, None])).sum(0) * (grid[1] - grid[0])).mean())
    assert exact == pytest.approx(0.5 * math.log(1 + 9.0), abs=0.03)

    def guide(x: Tensor) -> None:
        scale = torch.stack([torch.full_like(x, 0.5), torch.full_like(x, 2.0)], -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(1.5 * torch.stack([x, 0 * x], -1), scale).to_event(1))

    runs = t(*(float(emvae.mutual_information(model, guide, x, num_particles=20, seed=s)) for s in range(40)))
    assert_mean(runs, exact, detect=0.05)
    one = emvae.mutual_information(model, guide, x, num_particles=20, seed=0)
    assert one.standard_error == pytest.approx(float(runs.std()), rel=0.5)


@pytest.mark.parametrize("chunk_size", [1, 7, None])
def test_chunks_give_the_same(chunk_size):
    x = torch.randn(20).double()
    one, other = (
        emvae.mutual_information(model, guide_of(1.0, 0.7), x, num_particles=3, seed=5, chunk_size=size)
        for size in (chunk_size, 60)
    )
    assert one.value == pytest.approx(other.value, rel=1e-12)


# Guides of several sites --------------------------------------------------------------------------------------------


def chained_model(x: Tensor) -> None:
    shared = pyro.sample("g", dist.Normal(t(0.0)[0], 1.0))
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(shared, 1.0))
        with pyro.plate("pair", 2, dim=-2):
            b = pyro.sample("b", dist.Normal(a, 1.0).expand([2, len(x)]))
        pyro.sample("x", dist.Normal(b.sum(-2) if b.dim() == 2 else b.sum(-2).squeeze(-2), 1.0), obs=x)


def chained_guide(x: Tensor) -> None:
    pyro.sample("g", dist.Normal(t(0.3)[0], 1.0))
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.8 * x, 0.9))
        with pyro.plate("pair", 2, dim=-2):
            pyro.sample("b", dist.Normal(0.5 * a + torch.stack([x, -x]), 0.7))


def row_by_row_guide(x: Tensor) -> None:
    """The same, written so that it runs on single draws only."""
    pyro.sample("g", dist.Normal(t(0.3)[0], 1.0))
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.8 * x, 0.9))
        if a.dim() > 1:
            raise RuntimeError("one at a time")
        with pyro.plate("pair", 2, dim=-2):
            pyro.sample("b", dist.Normal(0.5 * a + torch.stack([x, -x]), 0.7))


@pytest.mark.parametrize("guide", [chained_guide, row_by_row_guide])
def test_dependent_sites_are_scored_together(guide):
    """Each draw under each datum's joint density, the other plate summed, against the densities by hand."""
    x = torch.randn(6).double()
    with quiet(), torch.no_grad():
        encoder = Encoder.of("test", chained_model, guide, (x,), {}, "data")
        values = encoder.draw(2)
        own, aggregate = (torch.cat(rows) for rows in zip(*encoder.densities(values, 4), strict=True))
    a, b = values["a"].reshape(12), values["b"].movedim(-1, 1).reshape(12, 2)
    scores = dist.Normal(0.8 * x, 0.9).log_prob(a[:, None])
    for side, sign in ((0, 1.0), (1, -1.0)):
        scores = scores + dist.Normal(0.5 * a[:, None] + sign * x, 0.7).log_prob(b[:, side, None])
    assert torch.allclose(aggregate, log_mean_exp(scores), rtol=1e-10)
    assert torch.allclose(own, scores[torch.arange(12), torch.arange(12) % 6], rtol=1e-10)


def test_one_site_and_two_have_the_same_information():
    weight = t(0.8, 0.4)

    def joint(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x[:, None] * weight, torch.eye(2).double() * 0.49))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("u", dist.Normal(0 * x, 1.0))
            pyro.sample("v", dist.Normal(0 * x, 1.0))

    def apart(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("u", dist.Normal(0.8 * x, 0.7))
            pyro.sample("v", dist.Normal(0.4 * x, 0.7))

    def whole(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    x = torch.linspace(-2, 2, 30).double()
    one = emvae.mutual_information(whole, joint, x, num_particles=200, seed=0)
    two = emvae.mutual_information(model, apart, x, num_particles=200, seed=1)
    assert abs(one.value - two.value) < 5 * math.hypot(one.standard_error, two.standard_error) < 0.1


# Active units -------------------------------------------------------------------------------------------------------


def test_active_units_are_the_variances_of_means():
    x = t(-1.0, 0.0, 1.0, 2.0)
    found = emvae.active_units(model, guide_of(0.6, 0.5), x)
    assert torch.allclose(found.variance["z"], torch.stack([0.36 * x.var(correction=0), t(0.0)[0]]), rtol=1e-12)
    assert int(found) == found.count == 1 and repr(found) == "ActiveUnits(1 of 2 above 0.01)"
    kl = 0.5 * (0.25 + (0.6 * x) ** 2 - 1 - math.log(0.25)).mean(), 0.5 * (0.25 - 1 - math.log(0.25))
    assert torch.allclose(found.kl["z"], torch.stack([kl[0], t(kl[1])[0]]), rtol=1e-12)
    assert int(emvae.active_units(model, guide_of(0.6, 0.5), x, threshold=0.5)) == 0


def test_active_units_from_draws_are_corrected_for_their_noise():
    """Where means have to be drawn: variance 0 stays 0 within its error, though the mean over draws moves."""
    x = torch.randn(200).double()
    found = emvae.active_units(chained_model, chained_guide, x, plate="data", num_particles=50, seed=0)
    spread = float((0.8 * x).var(correction=0))
    assert float(found.variance["a"]) == pytest.approx(spread, rel=0.1)
    expected = [float((1.4 * x).var(correction=0)), float((-0.6 * x).var(correction=0))]
    assert found.variance["b"].flatten().tolist() == pytest.approx(expected, rel=0.15)
    still = emvae.active_units(still_model, still_guide, x, num_particles=400, seed=0)
    assert int(still) == 0 and float(still.variance["b"]) < 0.002  # uncorrected: 0.005 +- 0.0005


def still_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("b", dist.Normal(pyro.sample("a", dist.Normal(0 * x, 1.0)), 1.0))


still_guide = still_model


# What it cannot do --------------------------------------------------------------------------------------------------


def no_plate(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(t(0.0)[0], 1.0))


def point(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(torch.stack([x, x], -1), event_dim=1))


def masked(x: Tensor) -> None:
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=x > 0):
        pyro.sample("z", dist.Normal(x, 1.0))


def two_plates(x: Tensor) -> None:
    with pyro.plate("data", len(x)), pyro.plate("pair", 2, dim=-2):
        pyro.sample("z", dist.Normal(x, 1.0).expand([2, len(x)]))


@pytest.mark.parametrize(
    ("program", "got"),
    [
        (no_plate, r"latents \['z'\] outside of plates"),
        (masked, "a mask at 'z'"),
        (two_plates, r"plates \['data', 'pair'\]"),
    ],
)
def test_what_has_no_information(program, got):
    x = torch.randn(5).double()
    for function in (emvae.mutual_information, emvae.active_units):
        with pytest.raises(ModelError, match=f"`{function.__name__}` cannot tell the data's latents: got {got}"):
            function(program, program, x)


def test_point_masses_have_no_density():
    with pytest.raises(ModelError, match=r"got latents \[\] outside of plates"):
        emvae.mutual_information(model, point, torch.randn(5).double())


def test_discrete_latents_have_no_mean():
    problem = problems.categorical()
    with pytest.raises(ModelError, match="discrete"):
        emvae.active_units(problem.model, problem.guide, *problem.args)


def test_a_density_that_is_not_finite():
    with pyro.validation_enabled(False), pytest.raises(NonFiniteError, match="log q = nan"):
        emvae.mutual_information(model, guide_of(math.nan, 1.0), torch.randn(4).double())


@pytest.mark.parametrize("options", [{"num_particles": 0}, {"chunk_size": -1}])
def test_numbers_out_of_range(options):
    with pytest.raises(EmvaeError, match=f"got {next(iter(options.values()))}"):
        emvae.mutual_information(model, guide_of(1.0, 1.0), torch.randn(4).double(), **options)


def test_measuring_changes_nothing():
    net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.BatchNorm1d(2), torch.nn.Dropout(0.5)).double()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x[:, None]), 1.0).to_event(1))

    x, before = torch.randn(8).double(), {n: b.clone() for n, b in net.state_dict().items()}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = emvae.mutual_information(model, guide, x, seed=2)
    emvae.active_units(model, guide, x)
    assert torch.equal(state, torch.get_rng_state()) and net.training
    assert all(torch.equal(b, before[n]) for n, b in net.state_dict().items())
    assert emvae.mutual_information(model, guide, x, seed=2) == first
