"""EM in slices of the data: the numbers of the whole, and models that cannot be sliced are refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_emvae import EM, annealing, slices, steps
from pyro_emvae._checks import DataError, EmvaeError, StepError
from pyro_emvae.parameters import assign
from pyro_emvae.posterior import solve_quadratic
from pyro_emvae.slices import Slices

F64 = torch.float64


def data(number: int = 101) -> Tensor:
    torch.manual_seed(0)
    return torch.cat([torch.randn(number - 40, 2), torch.randn(40, 2) * 0.6 + 2.5]).to(F64)[torch.randperm(number)]


def mixture(x: Tensor, keep: Tensor | None = None, whole: Tensor | None = None) -> None:
    assert whole is None or len(whole) == 3
    like = x.new_zeros(2)
    weights = pyro.param("weights", like + 0.5, constraint=constraints.simplex)
    means = pyro.param("means", x.new_tensor([[0.2, -0.1], [1.5, 1.0]]))
    scales = pyro.param("scales", torch.eye(2, dtype=x.dtype).expand(2, 2, 2), constraint=constraints.lower_cholesky)
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=True if keep is None else keep):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.MultivariateNormal(means[z], scale_tril=scales[z]), obs=x)


def factors(x: Tensor, keep: Tensor | None = None, whole: Tensor | None = None) -> None:
    assert whole is None or len(whole) == 3
    weight = pyro.param("weight", lambda: x.new_tensor([[1.0], [0.5]]))
    bias = pyro.param("bias", lambda: x.new_zeros(2))
    sigma = pyro.param("sigma", lambda: x.new_ones(2), constraint=constraints.positive)
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=True if keep is None else keep):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight.T + bias, sigma).to_event(1), obs=x)


CASES = {
    "mixture": (mixture, "enumerated", lambda: steps.gaussian_mixture(2)),
    "factors": (factors, "gaussian", lambda: steps.linear_gaussian(noise_form="diagonal")),
    "averaged": (mixture, "enumerated", lambda: steps.Averaged(steps.gaussian_mixture(2))),
    "damped": (mixture, "enumerated", lambda: steps.Damped(steps.gaussian_mixture(2), 0.8)),
}


def fitted(case: str, *args: Tensor, **options):
    model, e_step, m_step = CASES[case]
    pyro.clear_param_store()
    em = EM(model, e_step=e_step, m_step=m_step())
    fit = em.run(*args, max_iter=8, stop=None, **options)
    return fit, {name: value.detach().clone() for name, value in em.blocks.constrained().items()}


@pytest.mark.parametrize("batch_size", [9, 50, 1000])
@pytest.mark.parametrize("case", CASES)
def test_slices_give_the_numbers_of_the_whole(case, batch_size):
    x = data()
    whole, expected = fitted(case, x)
    sliced, found = fitted(case, x, batch_size=batch_size)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert float(sliced.objective) == pytest.approx(float(whole.objective), rel=1e-12)
    trace = [fit.history["objective"].values.tolist() for fit in (sliced, whole)]
    assert trace[0] == pytest.approx(trace[1], rel=1e-12)


@pytest.mark.parametrize("case", ["mixture", "factors"])
@pytest.mark.parametrize("options", [{"accelerate": "squarem"}, {"n_init": 3, "seed": 0}])
def test_acceleration_restarts_masks_and_other_arguments(case, options):
    """The mask has a row per datum and is sliced with the data; what has another length is passed whole."""
    x, keep = data(), torch.arange(101) % 7 > 0
    _, expected = fitted(case, x, keep, whole=torch.zeros(3), **options)
    _, found = fitted(case, x, keep, whole=torch.zeros(3), batch_size=30, **options)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_values_may_be_missing_in_some_slices_only():
    def with_gaps(x: Tensor) -> None:
        weight = pyro.param("weight", lambda: x.new_tensor([[1.0], [0.5]]))
        bias, sigma = pyro.param("bias", lambda: x.new_zeros(2)), pyro.param("sigma", lambda: x.new_ones(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            fn = dist.Normal(z @ weight.T + bias, sigma).mask(~x.isnan()).to_event(1)
            pyro.sample("x", fn, obs=x.nan_to_num())

    x, found = data(), []
    x[70, 0] = x[71] = math.nan
    for batch_size in (None, 30):
        pyro.clear_param_store()
        em = EM(with_gaps, e_step="gaussian", m_step=steps.linear_gaussian(noise_form="diagonal"))
        em.run(x, max_iter=8, stop=None, batch_size=batch_size)
        found.append({name: value.detach().clone() for name, value in em.blocks.constrained().items()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


def test_each_slice_is_at_most_as_large_and_seen_once():
    seen = []

    def model(x: Tensor) -> None:
        seen.append(x)
        mixture(x)

    x = data()
    em = EM(model, e_step="enumerated", m_step=steps.gaussian_mixture(2))
    em.run(x, max_iter=1, stop=None, batch_size=30)
    seen.clear()
    em.run(x, max_iter=1, stop=None, batch_size=30)
    sizes = [len(rows) for rows in seen]
    assert sizes == [60] + 4 * [30] + 2 * [25, 25, 25, 26]  # verified, one iteration, and the objective at its end
    assert torch.equal(torch.cat(seen[5:9]), x)


def test_a_run_that_stops_and_goes_on_is_the_run_that_did_not(tmp_path):
    x = data()
    _, expected = fitted("averaged", x, batch_size=30)
    model, e_step, m_step = CASES["averaged"]
    for total in (3, 8):
        pyro.clear_param_store()
        em = EM(model, e_step=e_step, m_step=m_step())
        em.run(x, max_iter=total, stop=None, batch_size=30, checkpoint=tmp_path / "run.pt", every=1)
    for name, value in em.blocks.constrained().items():
        assert torch.equal(value, expected[name])


def counted(runs: list[int]):
    def model(x: Tensor) -> None:
        runs.append(len(x))
        factors(x)

    return model


def test_a_quarter_of_the_slices_is_verified_in_turn():
    """A verified E-step runs the model twice: all slices at first and at the end, one of the four in between."""
    runs: list[int] = []
    em = EM(counted(runs), e_step="gaussian", m_step=steps.linear_gaussian(noise_form="diagonal"))
    em.run(data(), max_iter=1, stop=None, batch_size=30)
    runs.clear()
    em.run(data(), max_iter=5, stop=None, batch_size=30)
    assert len(runs) == 2 * 5 + 8 + 4 * 5 + 8
    runs.clear()
    em.run(data(), max_iter=5, stop=None, batch_size=1000)
    assert len(runs) == 2 * (5 + 1)


@pytest.mark.filterwarnings("ignore")  # the update is no M-step
@pytest.mark.parametrize("number", [2, 3, 7])
def test_a_model_that_bends_later_is_refused(number):
    """The log joint is quadratic at the initial theta only: found in the next iterations, whichever slice is due."""

    def model(x: Tensor) -> None:
        bend = pyro.param("bend", torch.tensor(0.0, dtype=F64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + bend * z**2, 1.0), obs=x[:, 0])

    bending = steps.ClosedForm(lambda values, x: {"z": values["z"]}, lambda s, p: {"bend": p["bend"] + 0.001})
    em = EM(model, e_step="gaussian", m_step=bending)
    with pytest.raises(StepError, match="misses a quadratic"):
        em.run(data(), max_iter=6, stop=None, on_decrease="warn", batch_size=math.ceil(101 / number))


def test_the_numbers_do_not_depend_on_whether_they_are_verified():
    x = data()
    found = [solve_quadratic("Gaussian", factors, (x,), {}, verify=verify) for verify in (True, False)]
    assert found[0].log_evidence == found[1].log_evidence
    assert torch.equal(found[0].mean.local, found[1].mean.local)
    far = x + 1e5
    found = [solve_quadratic("Gaussian", factors, (far,), {}, verify=verify) for verify in (True, False)]
    assert found[0].log_evidence == found[1].log_evidence


def test_a_spike_is_found_slice_by_slice():
    """A component on one datum: half of its scale would be better. Nothing is changed by the trial."""
    x = data()
    em = EM(mixture, e_step="enumerated", m_step=steps.gaussian_mixture(2))
    em.step(x)
    assert Slices(em.engine, em.phases, em._prepare, 30).screen((x,), {}) == em._screen((x,), {}) == ""
    narrow = torch.stack([0.01 * torch.eye(2, dtype=F64), torch.eye(2, dtype=F64)])
    assign(em.blocks, {"means": torch.stack([x[0], x.mean(0)]), "scales": narrow})
    before = {row.name: row.leaf.detach().clone() for row in em.blocks.rows}
    found = Slices(em.engine, em.phases, em._prepare, 30).screen((x,), {})
    assert found == em._screen((x,), {}) and "half of it is better" in found
    assert all(torch.equal(row.leaf, before[row.name]) for row in em.blocks.rows)


# Refusals -----------------------------------------------------------------------------------------------------------


def fixed_size(x: Tensor) -> None:
    theta = pyro.param("theta", torch.tensor(0.0, dtype=F64))
    with pyro.plate("data", 101):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def common_latent(x: Tensor) -> None:
    theta = pyro.param("theta", torch.tensor(0.0, dtype=F64))
    z = pyro.sample("z", dist.Normal(theta, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def outside_factor(x: Tensor) -> None:
    theta = pyro.param("theta", torch.tensor(0.0, dtype=F64))
    pyro.sample("prior", dist.Normal(0.0, 0.1), obs=theta)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


OFFSETS = torch.linspace(0, 1, 101, dtype=F64)


def first_rows_of_a_constant(x: Tensor) -> None:
    theta = pyro.param("theta", torch.tensor(0.0, dtype=F64))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z + OFFSETS[: len(x)], 1.0), obs=x[:, 0])


def centred(x: Tensor) -> None:
    theta = pyro.param("theta", torch.tensor(0.0, dtype=F64))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0] - x[:, 0].mean())


def m_step(key: str = "z") -> steps.ClosedForm:
    return steps.ClosedForm(
        lambda values, x: {"z": values[key].expand(1 if key == "g" else -1, -1)}, lambda s, p: {"theta": s["z"].mean()}
    )


@pytest.mark.parametrize("accelerate", [None, "squarem"])
@pytest.mark.parametrize("model", [fixed_size, common_latent, outside_factor, first_rows_of_a_constant, centred])
def test_models_whose_data_depend_on_each_other_are_refused(model, accelerate):
    em = EM(model, e_step="gaussian", m_step=m_step())
    with pytest.raises(StepError, match="batch_size=50"):
        em.run(data(), max_iter=3, batch_size=50, accelerate=accelerate)
    assert float(pyro.param("theta", torch.tensor(0.0, dtype=F64)).detach()) == 0.0


def test_groups_as_long_as_a_slice_are_refused():
    """Halves agree with the border of two groups; even and odd rows do not."""
    with pytest.raises(StepError, match="batch_size=25"):
        came_to(grouped, data(), torch.arange(101) // 25, step=of_groups(), batch_size=25)


def test_statistics_that_do_not_add_up_are_refused():
    averages = steps.ClosedForm(
        lambda values, x: {"z": values["z"].mean(1, keepdim=True)}, lambda s, p: {"means": p["means"]}
    )
    with pytest.raises(StepError, match="statistic 'z'"):
        EM(mixture, e_step="enumerated", m_step=steps.ClosedForm(_mean_of_data, averages.update)).run(
            data(), max_iter=2, batch_size=50
        )


def _mean_of_data(values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    return {"z": x.square().mean(0, keepdim=True)[None]}


def test_half_steps_that_do_not_add_up_are_refused():
    gradient = EM(mixture, None, pyro.optim.Adam({"lr": 0.1}), e_step="enumerated")
    with pytest.raises(StepError, match="Gradient"):
        gradient.run(data(), max_iter=2, batch_size=10)
    drawn = EM(mixture, e_step=steps.MonteCarlo("prior"), m_step=steps.gaussian_mixture(2))
    with pytest.raises(StepError, match="MonteCarlo"):
        drawn.run(data(), max_iter=2, batch_size=10)


@pytest.mark.parametrize("options", [{"history": "full"}, {"data": [data()]}, {"anneal": lambda t: 1.0}])
def test_options_that_need_the_whole_posterior_are_refused(options):
    em = EM(mixture, e_step="enumerated", m_step=steps.gaussian_mixture(2))
    args = () if "data" in options else (data(),)
    with pytest.raises(StepError, match="batch_size"):
        em.run(*args, max_iter=2, batch_size=10, **options)


def test_arguments_that_make_no_sense():
    em = EM(mixture, e_step="enumerated", m_step=steps.gaussian_mixture(2))
    for wrong in (0, -3, 2.5, True, "some"):
        with pytest.raises(EmvaeError, match="batch_size"):
            em.run(data(), max_iter=2, batch_size=wrong)
    with pytest.raises(DataError, match="1 positional"):
        em.run(math.pi, max_iter=2, batch_size=10)


def test_float32():
    x = data().float()
    _, expected = fitted("mixture", x)
    _, found = fitted("mixture", x, batch_size=20)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Slices by themselves -----------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """Slice 50 data or more, in slices of 30."""
    monkeypatch.setattr(slices, "LEAST", 50)
    monkeypatch.setattr(slices, "LENGTHS", (10, 30))


def went(fit) -> str:
    return fit.provenance["slices"]


@pytest.mark.parametrize("options", [{}, {"accelerate": "squarem"}])
@pytest.mark.parametrize("case", CASES)
def test_many_data_go_in_slices_by_default(few, case, options):
    if case in ("averaged", "damped") and options:
        return
    x, keep = data(), torch.arange(101) % 7 > 0
    whole, expected = fitted(case, x, keep, whole=torch.zeros(3), batch_size=None, **options)
    sliced, found = fitted(case, x, keep, whole=torch.zeros(3), **options)
    torch.testing.assert_close(found, expected, rtol=1e-7 if options else 1e-10, atol=1e-9)
    assert float(sliced.objective) == pytest.approx(float(whole.objective), rel=1e-12)
    assert (went(sliced), went(whole)) == ("slices of 30", "whole: batch_size=None")


@pytest.mark.parametrize("case", ["mixture", "factors"])
def test_the_slices_that_were_compared_with_the_whole_are_those_of_the_first_iteration(few, case):
    runs: list[int] = []
    model, e_step, m_step = CASES[case]

    def counting(x: Tensor) -> None:
        runs.append(len(x))
        model(x)

    pyro.clear_param_store()
    x, found = data(), []
    em = EM(counting, e_step=e_step, m_step=m_step())
    em.run(x, max_iter=1, stop=None)
    start = {name: value.detach().clone() for name, value in em.blocks.constrained().items()}
    for batch_size in ("auto", 30):
        assign(em.blocks, start)
        runs.clear()
        em.run(x, max_iter=1, stop=None, batch_size=batch_size)
        each, kept = 1 + (e_step == "gaussian"), [101] if batch_size == "auto" else []
        expected = [60] + 4 * [30] + kept + 2 * [25, 25, 25, 26]  # compared, one iteration, the objective at its end
        assert runs == [size for size in expected for _ in range(each)]
        found.append({name: value.detach().clone() for name, value in em.blocks.constrained().items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in start)


@pytest.mark.parametrize("case", CASES)
def test_few_data_are_taken_whole_bit_for_bit(case):
    fit, found = fitted(case, data())
    _, expected = fitted(case, data(), batch_size=None)
    assert went(fit) == "whole: fewer than 20000 data"
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_length_of_a_slice_is_that_of_two_mebibytes():
    lengths = [slices._best_length(((torch.zeros(30_000, width, dtype=F64),), {})) for width in (2, 64, 1000)]
    assert lengths == [16384, 2**21 // (64 * 8), 1024]
    assert slices._best_length(((torch.zeros(9, 32), torch.zeros(9, 96), torch.zeros(99)), {})) == 2**21 // (128 * 4)


def came_to(model, *args: Tensor, step: steps.ClosedForm, **options):
    pyro.clear_param_store()
    em = EM(model, e_step="gaussian", m_step=step)
    fit = em.run(*args, max_iter=3, stop=None, on_decrease="warn", **options)
    return fit, {name: value.detach().clone() for name, value in em.blocks.constrained().items()}


GROUPS = torch.arange(101) % 60


def grouped(x: Tensor, group: Tensor) -> None:
    """Rows share latents only 60 rows apart, so that the first two slices do not show it."""
    theta = pyro.param("theta", torch.tensor(0.0, dtype=F64))
    with pyro.plate("groups", 60):
        g = pyro.sample("g", dist.Normal(theta, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(g[group], 1.0), obs=x[:, 0])


def sound(x: Tensor) -> None:
    assert len(x) == 101, "all or nothing"
    common_latent(x)


def of_groups() -> steps.ClosedForm:
    return steps.ClosedForm(lambda values, x, group: {"z": values["g"]}, lambda s, p: {"theta": s["z"] / 60})


def mean_of_z() -> steps.ClosedForm:
    return steps.ClosedForm(
        lambda values, x: {"z": values["z"], "n": torch.ones_like(values["z"])}, lambda s, p: {"theta": s["z"] / s["n"]}
    )


@pytest.mark.filterwarnings("ignore:.*cannot raise the objective")  # where theta has a factor of its own
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("fixed_size", "on a slice"),
        ("common_latent", "log evidence"),
        ("outside_factor", "log evidence"),
        ("first_rows_of_a_constant", "log evidence"),
        ("centred", "log evidence"),
        ("sound", "on a slice AssertionError: all or nothing"),
    ],
)
def test_what_cannot_be_sliced_is_taken_whole_without_a_word(few, name, why):
    fit, found = came_to(globals()[name], data(), step=mean_of_z())
    _, expected = came_to(globals()[name], data(), step=mean_of_z(), batch_size=None)
    assert went(fit).startswith("whole: ") and why in went(fit)
    assert torch.equal(found["theta"], expected["theta"])


def test_data_that_meet_far_apart_are_found_by_the_sum_over_all_slices(few):
    fit, found = came_to(grouped, data(), GROUPS, step=of_groups())
    _, expected = came_to(grouped, data(), GROUPS, step=of_groups(), batch_size=None)
    assert "misses the sum" in went(fit)
    assert torch.equal(found["theta"], expected["theta"])


def test_parameters_start_from_all_data(few):
    def model(x: Tensor) -> None:
        pyro.param("bias", lambda: x.mean(0) + torch.randn(2, dtype=F64))
        factors(x)

    x = data()
    em = EM(model, e_step="gaussian", m_step=steps.linear_gaussian(noise_form="diagonal"))
    fit = em.run(x, max_iter=1, stop=None, track=["bias"], seed=3)
    assert went(fit) == "slices of 30"
    torch.manual_seed(3)
    first = fit.history["param_bias"].values[0]
    assert first.tolist() == pytest.approx((x.mean(0) + torch.randn(2, dtype=F64)).tolist(), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"history": "full"}, "history='full'"),
        ({"data": [data()], "max_iter": None, "num_epochs": 2}, "data="),
        ({"anneal": annealing.Linear(2, start=0.5)}, "anneal="),
        ({"device": "cpu"}, "device="),
        ({"n_init": 3, "seed": 0}, "starts side by side"),
    ],
)
def test_options_that_take_the_whole(few, options, why):
    options = {"max_iter": 4, "stop": None} | options
    args = () if "data" in options else (data(),)
    found = []
    for more in ({}, {"batch_size": None}):
        pyro.clear_param_store()
        em = EM(mixture, e_step="enumerated", m_step=steps.gaussian_mixture(2))
        fit = em.run(*args, **options, **more)
        found.append({name: value.detach().clone() for name, value in em.blocks.constrained().items()})
        assert went(fit) == f"whole: {'batch_size=None' if more else why}"
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_half_steps_that_do_not_add_up_are_taken_whole(few):
    em = EM(mixture, None, pyro.optim.Adam({"lr": 0.01}), e_step="enumerated")
    assert went(em.run(data(), max_iter=2)) == "whole: half-steps whose statistics do not add up"


def test_missing_data_are_refused_as_without_slices(few):
    x = data()
    x[70, 0] = math.nan
    said = []
    for options in ({}, {"batch_size": None}):
        with pytest.raises(EmvaeError) as error:
            fitted("mixture", x, **options)
        said.append((type(error.value), str(error.value)))
    assert said[0] == said[1]


def test_a_run_in_slices_by_default_goes_on_bit_for_bit(few, tmp_path):
    x = data()
    _, expected = fitted("averaged", x)
    model, e_step, m_step = CASES["averaged"]
    for total, done in ((3, "slices of 30"), (8, "slices of 30"), (8, "no iteration was made")):
        pyro.clear_param_store()
        em = EM(model, e_step=e_step, m_step=m_step())
        fit = em.run(x, max_iter=total, stop=None, checkpoint=tmp_path / "run.pt", every=1)
        assert went(fit) == done
    for name, value in em.blocks.constrained().items():
        assert torch.equal(value, expected[name])


# Memory -------------------------------------------------------------------------------------------------------------

PEAK = """
import gc, torch
torch.set_num_threads(1)
from benchmarks import exact_em
fits = {"ours": lambda n: exact_em.fit_mixture(n, 4_000 if n > 4_000 else 500), "theirs": exact_em.sklearn_mixture}
call = fits["SIDE"](100_000)
fits["SIDE"](1_000)()  # what is imported or kept once does not count
import pyro
pyro.clear_param_store()
gc.collect()
def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
call()
print(status("VmHWM") - before)
"""


@pytest.mark.slow
def test_memory_of_a_mixture_in_slices(record_result):
    """The peak over what the data take, against scikit-learn's GaussianMixture: N = 1e5, D = k = 10, float64."""
    pytest.importorskip("sklearn")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux")
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    peaks = {}
    for side in ("ours", "theirs"):
        command = [sys.executable, "-W", "ignore", "-c", PEAK.replace("SIDE", side)]
        run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
        peaks[side] = float(run.stdout.split()[-1])
    ratio = peaks["ours"] / peaks["theirs"]
    figure = f"{peaks['ours']:.0f} MB against {peaks['theirs']:.0f} MB, ratio {ratio:.2f}"
    record_result(
        "Gaussian mixture in slices, N = 1e5, D = k = 10: memory beside the data, against scikit-learn", figure
    )
    assert ratio <= 1.5
