r"""`estimator="probe"`: trials within a twentieth of the evaluations, the choice in the state."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_emvae import SVI, MonteCarloELBO
from pyro_emvae._checks import EmvaeError
from pyro_emvae.choosing import PROBE, SHARE, begin, best, due, learn

DATA = torch.tensor([0.2, -1.0, 0.7], dtype=torch.float64)


def model(x: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5, dtype=torch.float64)).to_event(1))
    pyro.sample("x", dist.Normal(20 + z, 1.0).to_event(1), obs=20 + x)


def guide(x: torch.Tensor) -> None:
    logits = pyro.param("logits", lambda: torch.tensor([0.1, -0.5, 0.3], dtype=torch.float64))
    pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))


def run(loss: MonteCarloELBO, steps: int) -> None:
    """Climb by plain gradient steps."""
    for _ in range(steps):
        loss.loss_and_grads(model, guide, DATA)
        leaf = pyro.param("logits").unconstrained()
        with torch.no_grad():
            leaf -= 0.001 * leaf.grad
        leaf.grad = None


def started() -> MonteCarloELBO:
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    return MonteCarloELBO(2, 0, estimator="probe", vectorize_particles=True)


STEPS = 2200


@pytest.fixture(scope="module")
def finished() -> tuple[MonteCarloELBO, torch.Tensor]:
    pyro.enable_validation(True)
    loss = started()
    run(loss, STEPS)
    return loss, pyro.param("logits").detach().clone()


def test_it_keeps_the_least_square_times_cost(finished):
    loss, _ = finished
    record, names = loss.state[PROBE], loss.resolver.tried["z"]
    scores = {n: float(record[f"z|{n}|mean"] * record[f"z|{n}|cost"]) for n in names}
    kept = min(scores, key=scores.__getitem__)
    assert best(record, "z", names) == kept != "score"
    assert scores["leave_one_out"] < scores["score"]
    (row,) = loss.table
    assert type(row.estimator) is type(MonteCarloELBO(estimator=kept).resolver.policy) and "least" in row.why


def test_trials_take_a_twentieth(finished):
    loss, _ = finished
    record = loss.state[PROBE]
    assert float(record["used"]) >= 2 * STEPS
    dearest = max(float(v) for k, v in record.items() if k.endswith("|cost"))
    assert 0 < float(record["spent"]) <= SHARE * float(record["used"]) + dearest


def test_a_resumed_run_goes_on_bitwise(finished):
    """Stopped anywhere, also before all trials are over."""
    whole, logits = finished
    for stop in (STEPS // 5, STEPS - 20):
        loss = started()
        run(loss, stop)
        kept, generator = loss.state_dict(), torch.get_rng_state()
        other = MonteCarloELBO(2, 0, estimator="probe", vectorize_particles=True)
        other.load_state_dict(kept)
        torch.set_rng_state(generator)
        run(other, STEPS - stop)
        assert torch.equal(pyro.param("logits"), logits)
        assert {k: v.item() for k, v in other.state[PROBE].items() if not v.dim()} == {
            k: v.item() for k, v in whole.state[PROBE].items() if not v.dim()
        }
        assert other.resolved == whole.resolved


def test_an_estimator_that_does_not_go_with_the_others_is_tried_no_more():
    sites = {"z": ("one", "two")}
    record = begin(sites) | {"used": torch.tensor(1e6, dtype=torch.float64)}
    for name, square in (("one", None), ("two", torch.tensor(3.0)), ("two", torch.tensor(5.0))):
        record = learn(record, "z", name, square, 2)
    assert due(record, sites, 1) == ("z", "two")
    assert best(record, "z", sites["z"]) is None
    for _ in range(2):
        record = learn(record, "z", "two", torch.tensor(4.0), 2)
    assert best(record, "z", sites["z"]) == "two"
    assert float(record["z|two|mean"]) == 4.0


def test_no_trial_before_the_share_allows_it():
    sites = {"z": ("one", "two")}
    record = begin(sites) | {"used": torch.tensor(39.0, dtype=torch.float64)}
    assert due(record, sites, 2) is None
    assert due(record | {"used": torch.tensor(40.0, dtype=torch.float64)}, sites, 2) == ("z", "one")


def test_an_annotation_asks_for_it_too():
    def annotated(x: torch.Tensor) -> None:
        logits = pyro.param("logits", lambda: torch.tensor([0.1, -0.5, 0.3], dtype=torch.float64))
        pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1), infer={"estimator": "probe"})

    loss = MonteCarloELBO(2, 0, vectorize_particles=True)
    for _ in range(60):
        loss.loss_and_grads(model, annotated, DATA)
    assert float(loss.state[PROBE]["spent"]) > 0


def test_a_recorded_step_refuses_it():
    svi = SVI(
        model,
        guide,
        pyro.optim.SGD({"lr": 0.01}),
        loss=MonteCarloELBO(2, 0, estimator="probe", vectorize_particles=True),
        backend="graph",
    )
    with pytest.raises(EmvaeError, match='got estimator="probe"'):
        for _ in range(3):  # the first steps are eager
            svi.step(DATA)


def test_a_checkpoint_resumes_the_trials(tmp_path):
    """Bitwise, through a file."""

    def made() -> tuple[SVI, MonteCarloELBO]:
        loss = MonteCarloELBO(2, 0, estimator="probe", vectorize_particles=True)
        return SVI(model, guide, pyro.optim.SGD({"lr": 0.001}), loss=loss), loss

    pyro.set_rng_seed(1)
    whole, loss = made()
    for _ in range(160):
        whole.step(DATA)
    logits, spent = pyro.param("logits").detach().clone(), float(loss.state[PROBE]["spent"])
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    first, _ = made()
    for _ in range(70):
        first.step(DATA)
    first.save(tmp_path / "run.pt")
    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    second, resumed = made()
    second.load(tmp_path / "run.pt")
    for _ in range(90):
        second.step(DATA)
    assert torch.equal(pyro.param("logits"), logits)
    assert float(resumed.state[PROBE]["spent"]) == spent > 0


def test_an_earlier_state_takes_the_choice_back(finished):
    loss, _ = finished
    late, early = loss.state_dict(), started()
    run(early, 50)
    early.load_state_dict(late)
    run(early, 1)
    assert early.resolved == loss.resolved
    (row,) = early.table
    early.state = {}
    run(early, 1)
    (again,) = early.table
    assert row.why == "the least E|g|^2 times cost of its trials" and again.why.startswith("until the trials")
