"""More than two phases: conditional maximisations, blocks of their own, what a phase may touch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyro_emvae import EM, problems, standard_errors, steps
from pyro_emvae._checks import BlockError, EmvaeError, OptimizerError, StepError
from pyro_emvae.steps import Phase

X = torch.tensor([-2.1, -1.8, -1.2, -2.5, -0.9, 0.4, 1.9, 2.3, 1.1, 2.6], dtype=torch.float64)
ADAM = pyro.optim.Adam({"lr": 0.05})


def mixture(x: Tensor) -> None:
    weights = pyro.param("weights", torch.tensor([0.8, 0.2], dtype=x.dtype), constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([0.0, 0.5], dtype=x.dtype))
    scale = pyro.param("scale", torch.tensor(1.5, dtype=x.dtype), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale), obs=x)


def statistics(values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    r = one_hot(values["z"], 2).to(x)
    return {"n": r, "x": r * x[:, None], "xx": r * x[:, None].square()}


def location(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"weights": s["n"] / s["n"].sum(), "loc": s["x"] / s["n"]}


def spread(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
    loc = params["loc"]
    total = (s["xx"] - 2 * loc * s["x"] + loc.square() * s["n"]).sum()
    return {"scale": (total / s["n"].sum()).sqrt()}


def both(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
    new = location(s, params)
    return new | spread(s, params | new)


def two() -> EM:
    return EM(mixture, e_step="enumerated", m_step=steps.ClosedForm(statistics, both))


def three(*between: Any, second: Any = None) -> EM:
    second = steps.ClosedForm(statistics, spread) if second is None else second
    first = ("model", steps.ClosedForm(statistics, location))
    return EM(
        mixture,
        optim=ADAM,
        steps=[("guide", "enumerated"), first, *between, ("spread", second)],
        blocks={"scale": "spread"},
    )


def test_conditional_maximisations_are_the_joint_one_where_they_have_to_be():
    """The locations' maximum does not depend on the scale, and the scale's is taken at the new locations."""
    fits = []
    for make in (two, three):
        pyro.clear_param_store()
        fits.append(make().run(X, max_iter=200))
    assert [fit.status for fit in fits] == ["CONVERGED"] * 2
    assert fits[0].num_iterations == fits[1].num_iterations
    for name, value in fits[0].params.items():
        torch.testing.assert_close(fits[1].params[name], value, rtol=1e-12, atol=1e-12)
    assert fits[1].blocks == {"weights": "model", "loc": "model", "scale": "spread"}
    assert "spread" in str(fits[1].inference.blocks)


def test_gains_are_recorded_per_phase():
    fit = three().run(X, max_iter=8, stop=None, history="full")
    gain = fit.history["gain"]
    assert gain.shape == (8, 3) and gain["half_step"].values.tolist() == ["E", "M", "M2"]
    known = gain.values[1:]
    assert np.isfinite(known).all() and (known > 0).all()
    assert fit.history["m_gain"].values == pytest.approx(gain.values[:, 1:].sum(1))
    assert fit.history["e_gain"].values[1:] == pytest.approx(known[:, 0])
    total = np.diff(fit.history["objective"].values)
    assert gain.values[:-1, 1:].sum(1) + gain.values[1:, 0] == pytest.approx(total, rel=1e-6)


def test_two_phases_are_the_special_case():
    problem = problems.linear_gaussian()
    runs = []
    for given in ({}, {"steps": [("guide", "gradient"), ("model", steps.Gradient())]}):
        pyro.clear_param_store()
        runs.append(EM(problem.model, problem.guide, ADAM, **given).run(*problem.args, max_iter=5, seed=0))
    assert all(torch.equal(value, runs[1].params[name]) for name, value in runs[0].params.items())
    for name in ("objective", "elbo", "phase", "gain"):
        np.testing.assert_array_equal(runs[0].history[name].values, runs[1].history[name].values)


@pytest.mark.parametrize("second", [steps.Gradient(3), steps.Gradient(3, optim=pyro.optim.SGD({"lr": 1e-3}))])
def test_a_generalised_phase_climbs(second):
    best = two().run(X, max_iter=300).objective
    pyro.clear_param_store()
    em = three(second=second)
    losses = [em.step(X) for _ in range(150)]
    assert -losses[-1] == pytest.approx(best, abs=0.02) and -losses[0] < best - 0.5
    assert {block for block, optimizer in em.engine.optimizers.items() if optimizer.params} == {"spread"}


def test_a_block_may_have_two_phases_and_an_e_step_may_come_again():
    pyro.clear_param_store()
    em = three(("guide", "enumerated"))
    assert [phase.key for phase in em.phases] == ["E", "M", "E2", "M2"]
    trace = [-em.step(X) for _ in range(30)]
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(trace))
    pyro.clear_param_store()
    em = EM(
        mixture,
        steps=[
            ("guide", "enumerated"),
            ("model", steps.ClosedForm(statistics, location)),
            ("model", steps.ClosedForm(statistics, spread)),
        ],
    )
    fit = em.run(X, max_iter=200)
    pyro.clear_param_store()
    assert fit.objective == pytest.approx(two().run(X, max_iter=200).objective, rel=1e-12)


# What a phase may touch ---------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> None:
        pyro.module("encoder", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), 0.5).to_event(1))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prior = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> None:
        pyro.module("decoder", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.prior(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


def networks() -> tuple[EM, Encoder, Decoder, Tensor]:
    pyro.set_rng_seed(0)
    encoder, decoder, x = Encoder(), Decoder(), torch.randn(8, 3)
    em = EM(
        decoder,
        encoder,
        {"guide": ADAM, "model": ADAM, "decoder": pyro.optim.Adagrad({"lr": 0.1})},
        steps=[("guide", steps.Gradient(2)), ("model", steps.Gradient()), ("decoder", steps.Gradient(2))],
        blocks={r".*encoder\$\$\$.*": "guide", r".*prior.*": "model", r".*net.*": "decoder"},
    )
    return em, encoder, decoder, x


def test_a_phase_leaves_all_other_blocks_alone():
    """Parameters and buffers, bit for bit, after both optimizers have momentum; and it moves all of its own."""
    em, encoder, decoder, x = networks()
    for _ in range(2):
        em.step(x)
    owners = {"guide": [encoder], "model": [decoder.prior], "decoder": [decoder.net]}
    posterior = None
    for phase in em.phases:
        before = {b: [t.clone() for m in ms for t in m.state_dict().values()] for b, ms in owners.items()}
        _, posterior, _ = phase.run(em.engine, em.engine.state, posterior, (x,), {})
        for block, modules in owners.items():
            after = [t for m in modules for t in m.state_dict().values()]
            same = [torch.equal(a, b) for a, b in zip(before[block], after, strict=True)]
            assert (not any(same)) if block == phase.block else all(same), (phase, block)
    assert {str(k) for k in em.engine.optimizers} == {"guide", "model", "decoder"}


def test_both_sides_may_have_several_blocks_and_steps_are_recorded():
    """The head of the encoder in an E-step of its own; by graph, bit for bit as eagerly."""
    runs = []
    for backend in ("eager", "graph"):
        pyro.clear_param_store()
        _, encoder, decoder, x = networks()
        em = EM(
            decoder,
            encoder,
            ADAM,
            steps=[("guide", "gradient"), Phase("gradient", "head", "E"), ("model", "gradient")],
            blocks={r"encoder\$\$\$net\.2.*": "head", r"encoder\$\$\$.*": "guide", r"decoder.*": "model"},
            backend=backend,
        )
        fit = em.run(x, max_iter=4, seed=0)
        runs.append(fit)
    assert all(torch.equal(value, runs[1].params[name]) for name, value in runs[0].params.items())
    assert runs[0].history["gain"]["half_step"].values.tolist() == ["E", "E2", "M"]
    assert set(runs[0].blocks.values()) == {"guide", "head", "model"}
    assert em.blocks.theta == ("model",)


def test_one_step_in_two_slots_is_exchanged_where_it_was_meant():
    step, problem = steps.Gradient(), problems.linear_gaussian()
    em = EM(problem.model, problem.guide, ADAM, e_step=step, m_step=step)
    em.m_step = steps.Gradient(3)
    assert em.e_step is step and em.m_step.num_steps == 3 and em.engine.half_steps["M"] is em.m_step
    em.step(*problem.args)


def test_each_phase_has_its_own_state():
    averaged = steps.Averaged(steps.ClosedForm(statistics, spread))
    em = EM(
        mixture,
        steps=[
            ("guide", "enumerated"),
            ("model", steps.Averaged(steps.ClosedForm(statistics, location))),
            ("spread", averaged),
        ],
        blocks={"scale": "spread"},
    )
    for _ in range(3):
        em.step(X)
    assert {key: int(own["count"]) for key, own in em.engine.steps.items() if own} == {"M": 3, "M2": 3}


def test_an_update_gets_all_of_theta_and_may_write_its_block_only():
    em = three(second=steps.ClosedForm(statistics, lambda s, params: {"loc": params["loc"]}))
    with pytest.raises(StepError, match="'loc'"):
        em.step(X)


def test_acceleration_and_standard_errors_take_theta_as_a_whole():
    fits = []
    for make, options in ((two, {}), (three, {"accelerate": "squarem"})):
        pyro.clear_param_store()
        fits.append(make().run(X, max_iter=500, **options))
    assert fits[1].objective == pytest.approx(fits[0].objective, abs=1e-5)
    tables = [fit.summary(standard_errors(fit, X, method="louis")) for fit in fits]
    errors = [table.set_index(["parameter", "index"])["standard_error"].sort_index().values for table in tables]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


# Bad input ----------------------------------------------------------------------------------------------------------

CLOSED = steps.ClosedForm(statistics, both)
WRONG = {
    "no block": ([("guide", "enumerated"), CLOSED], BlockError, "ClosedForm"),
    "empty": ([], StepError, r"\[\]"),
    "no e": ([("model", CLOSED)], StepError, "M over 'model'"),
    "no m": ([("guide", "enumerated")], StepError, "E over 'guide'"),
    "m first": ([("model", CLOSED), ("guide", "enumerated")], StepError, "M over 'model'"),
    "wrong slot": ([("guide", CLOSED), ("model", CLOSED)], StepError, "ClosedForm"),
    "reserved": ([("guide", "enumerated"), ("unused", CLOSED)], BlockError, "'unused'"),
    "none": ([("guide", "enumerated"), (3, CLOSED)], BlockError, "block 3"),
    "name": ([("guide", "enumerated"), ("model", "closed")], EmvaeError, "'closed'"),
}


@pytest.mark.parametrize("key", WRONG)
def test_phases_that_make_no_iteration_are_refused(key):
    phases, error, observed = WRONG[key]
    with pytest.raises(error, match=observed):
        EM(mixture, optim=ADAM, steps=phases)


def test_a_phase_fits_its_block():
    with pytest.raises(BlockError, match="'guide'"):
        Phase(CLOSED, "guide", "M")
    assert repr(Phase("gradient", "decoder")) == "M over 'decoder' by Gradient(num_steps=1)"
    assert Phase(steps.Gradient(), "local", "E").side == "guide" and Phase("enumerated").block == "guide"


def test_phases_are_given_one_way():
    with pytest.raises(StepError, match="beside e_step="):
        EM(mixture, e_step="enumerated", steps=[("guide", "enumerated"), ("model", CLOSED)])
    with pytest.raises(StepError, match="joint"):
        EM(mixture, optim=ADAM, steps=[("guide", "enumerated"), ("model", CLOSED)], schedule="joint")


def phases(*extra: Any, blocks: Any = None, optim: Any = ADAM, first: str = "model") -> EM:
    return EM(mixture, optim=optim, steps=[("guide", "enumerated"), (first, CLOSED), *extra], blocks=blocks)


def test_a_phase_needs_a_block_and_a_block_a_phase():
    with pytest.raises(BlockError, match="block 'spread' without parameters"):
        phases(("spread", "gradient")).step(X)
    pyro.clear_param_store()
    with pytest.raises(BlockError, match="'skale'"):
        phases(("spread", "gradient"), blocks={"skale": "spread"}).step(X)
    pyro.clear_param_store()
    with pytest.raises(BlockError, match="'spread'"):
        phases(blocks={"scale": "spread"}).step(X)
    pyro.clear_param_store()
    with pytest.raises(BlockError, match="block 'model' of 2 parameters"):
        phases(first="spread", blocks={"scale": "spread"}).step(X)


def test_what_stays_as_it_is_is_unused():
    closed = steps.ClosedForm(statistics, location)
    em = EM(mixture, e_step="enumerated", m_step=closed, blocks={"scale": "unused"})
    fit = em.run(X, max_iter=50)
    assert float(fit.params["scale"]) == 1.5 and fit.blocks["scale"] == "unused"


@pytest.mark.parametrize(
    ("optim", "observed"), [({"model": ADAM}, "'spread'"), ({"spread": ADAM, "loc": ADAM}, "key 'loc'")]
)
def test_optimizers_are_those_of_the_blocks(optim, observed):
    with pytest.raises(OptimizerError, match=observed):
        phases(("spread", "gradient"), blocks={"scale": "spread"}, optim=optim)
