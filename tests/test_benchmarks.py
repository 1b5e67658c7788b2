"""The benchmarks of the estimators: their references are right, their pages keep what was not made anew."""

from __future__ import annotations

import itertools
import json

import pyro
import pytest
import torch

import pyro_emvae as emvae
from benchmarks import __main__ as command
from benchmarks import (
    breast_cancer,
    discrete,
    discrete_vae,
    discrete_vae_text,
    estimator_times,
    estimators,
    guides,
    page,
    snr,
    timing,
    variances,
)
from pyro_emvae import problems
from pyro_emvae.parameters import assign, discover
from pyro_emvae.plots import snr_slopes

pytestmark = pytest.mark.filterwarnings("ignore:.compare_gradients. cannot tell signals:UserWarning")


def test_a_page_keeps_the_sections_that_were_not_made_anew(tmp_path):
    path = tmp_path / "page.md"
    page.write(path, "# Title", ["one", "two"], {"two": "2"})
    assert path.read_text() == "# Title\n\n## two\n\n2\n"
    page.write(path, "# Title", ["one", "two"], {"one": "1\n\n**not a heading**"})
    page.write(path, "# Other", ["one", "two"], {"two": "3"})
    assert path.read_text() == "# Other\n\n## one\n\n1\n\n**not a heading**\n\n## two\n\n3\n"


# Logistic regression ------------------------------------------------------------------------------------------------


def test_the_reference_has_the_published_figures():
    """Those of step 0 were measured before, with 1e5 to 8e5 samples: 2.40e6, 8.1e5 and 8.85e3."""
    made = variances.reference()
    assert made["samples"] >= 100_000 and made["samples of measure_valued"] >= 100_000
    assert list(map(int, made["stages"])) == list(breast_cancer.STEPS)
    first = made["stages"]["0"]["variance"]
    for name, figure in (("score", 2.40e6), ("leave_one_out", 8.1e5), ("pathwise", 8.85e3)):
        assert first[name][0] == pytest.approx(figure, rel=0.02)
    bound = problems.logistic_regression().elbo
    bounds = [
        float(bound({n: torch.tensor(made["stages"][step][n]).double() for n in variances.BLOCKS}))
        for step in ("0", "5000")
    ]
    assert bounds[0] == pytest.approx(-1226.6, abs=0.1) and -69 < bounds[1] < -67


def test_gradients_by_hand_have_the_exact_mean(monkeypatch):
    """Their mean, plus the gradient of minus the KL, is the exact gradient of the ELBO."""
    problem = problems.logistic_regression()
    loc, log_scale = torch.linspace(-0.5, 0.5, 31).double(), torch.linspace(-1.5, -0.5, 31).double()
    exact = problems.exact_gradients(problem, {"loc": loc, "log_scale": log_scale})
    of_kl = torch.cat([-loc, 1 - (2 * log_scale).exp()])
    expected = torch.cat([exact["loc"], exact["log_scale"]]) - of_kl
    kept = []
    monkeypatch.setattr(breast_cancer, "by_parameter", lambda moments: kept.append(moments) or [0.0, 0.0])
    breast_cancer.score_and_pathwise(loc, log_scale, *problem.args, 20_000)
    breast_cancer.measure_valued(loc, log_scale, *problem.args, 2_000)
    assert len(kept) == 4
    for moments in kept:
        z = (moments.first / moments.count - expected) / (moments.variance / moments.count).sqrt()
        assert float(z.abs().max()) < 5


def test_the_score_function_does_not_weigh_by_a_constant():
    """At the end of training the KL is a third of the ELBO."""
    made = variances.reference()["stages"]["5000"]
    problem, at = problems.logistic_regression(), {n: torch.tensor(made[n]).double() for n in variances.BLOCKS}
    options = {"objective": "elbo_analytic_kl", "blocks": variances.BLOCKS, "num_particles": 1, "num_replicates": 4000}
    data = emvae.sweep_gradients(
        problem.model, problem.guide, *problem.args, estimators=["score"], stages={"end": at}, **options
    )
    assert float(data.variance_mean.sel(block="guide")[0, 0]) == pytest.approx(made["variance"]["score"][0], rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", page.registered("estimator", variances.ROWS))
def test_variances_along_training_are_those_of_the_loop_by_hand(name, record_result):
    measured, reference = variances.measure(20_000, (name,)), variances.reference()
    ratios = {
        (step, parameter): got / reference["stages"][step]["variance"][name][list(variances.BLOCKS).index(parameter)]
        for (_, step, parameter), got in measured.items()
    }
    figure = ", ".join(f"{ratio:.3f}" for ratio in ratios.values())
    record_result(f"breast cancer, variance along training over that by hand, {name}", figure)
    assert len(ratios) == 8 and all(abs(ratio - 1) <= variances.LIMIT for ratio in ratios.values())


# Ratios -------------------------------------------------------------------------------------------------------------


def test_the_toy_of_ratios_is_near_its_optimum():
    model, guide, x = snr.gaussian_toy(num_data=3, dim=4, perturbation=0.0)
    parameters = discover(model, guide, (x,))
    assert {row.name: row.block for row in parameters.rows} == {"mu": "model", "b": "guide"}
    near = emvae.elbo_gap(model, guide, x, num_particles=2000, seed=0).total
    b = pyro.param("mu").detach() / 2
    assign(parameters, {"b": b + 0.3})
    assert near < emvae.elbo_gap(model, guide, x, num_particles=2000, seed=0).total


def test_the_ratio_of_averages_rises_as_the_root_of_their_number():
    data = snr.measure("elbo", "pathwise", (1, 4, 16), 1000, num_data=4, dim=20, perturbation=0.3)
    assert float(snr_slopes(data).sel(block="guide", estimator="pathwise")) == pytest.approx(0.5, abs=0.05)


def test_rows_of_ratios_are_those_that_fit():
    assert all(snr.fits(row) for row in snr.ROWS)
    assert not snr.fits(snr.Row("iwae", "leave_one_out", "guide", "small"))
    assert not snr.fits(snr.Row("elbo", "dreg", "guide", "small"))
    assert not snr.fits(snr.Row("elbo", "unheard_of", "guide", "small"))


# Discrete latents ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", discrete.PROBLEMS)
def test_exact_gradients_of_the_discrete_problems(title):
    problem = discrete.PROBLEMS[title]()
    cell = discrete.measure(problem, "leave_one_out", 8, 2000)
    assert float(cell.bias_z) < cell.attrs["bias_z_limit"] + 1 and float(cell.evaluations) == 8
    assert "score" in discrete.fitting(problem) and "pathwise" not in discrete.fitting(problem)


@pytest.mark.parametrize(
    ("title", "name", "evaluations", "variance"),
    [
        ("one bit, t = 0.499, phi = 2", "score", 2, 0.00326112),
        ("one bit, t = 0.499, phi = 2", "leave_one_out", 2, 1.65893e-7),
        ("one bit, t = 0.499, phi = 2", "leave_one_out", 4, 6.82481e-8),
        ("one bit, t = 0.45, phi = 2", "leave_one_out", 2, 4.14731e-4),
    ],
)
def test_exact_variances_of_the_bit(title, name, evaluations, variance):
    cell = discrete.measure(discrete.PROBLEMS[title](), name, evaluations, 20_000)
    assert float(cell.variance_mean) == pytest.approx(variance, rel=0.08)


def test_too_few_evaluations_are_a_dash():
    assert discrete.measure(discrete.toy(0.45, 2.0), "leave_one_out", 1, 10) is None


def test_rows_of_the_discrete_tables():
    """Exact means are said to be, whatever their rounding; what is biased is marked and seen."""
    problem = discrete.toy(0.499, 2.0)
    assert discrete._line(problem, "enumerated", 50) == ("`enumerated`", "0", "0", "0", "exact")
    name, *_, z = discrete._line(problem, "straight_through", 2000)
    assert name == "`straight_through` (biased)" and float(z) > 10
    pyro.clear_param_store()
    assert discrete._line(discrete.binary(1.0), "measure_valued", 50) == ("`measure_valued`", "-", "-", "-", "-")


# Times --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "estimator"), [("normal", "pathwise"), ("bernoulli", "score")])
def test_the_loop_by_hand_has_the_same_loss(kind, estimator):
    torch.manual_seed(0)
    step = estimator_times.by_hand(kind, 200)
    torch.manual_seed(0)
    model, guide, x, _ = estimator_times.vae(kind)
    ours = emvae.MonteCarloELBO(200, estimator=estimator, vectorize_particles=True).loss(model, guide, x)
    assert ours == pytest.approx(step(), rel=5e-3)


def test_all_cases_are_measured_in_the_time_there_is(monkeypatch):
    given = []
    monkeypatch.setattr(timing, "measure", lambda case, seconds: given.append(seconds) or case)
    assert timing.measure_all([1, 2, 3], 1.0, most=30.0) == [1, 2, 3] and given[0] == pytest.approx(18.0, abs=0.1)
    assert given[1] == pytest.approx(29.0, abs=0.1) and given[2] == 30.0
    assert timing.measure_all([1], 0.0) == [1] and given[-1] == 0.5


def test_heavy_cases_run_with_one_thread_unless_named(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    plan = command.planned([], None)
    assert list(plan) == [4, 1] and {case.name for case in plan[1]} == set(command.CASES)
    assert "gmm" in command.HEAVY and {case.name for case in plan[4]} == set(command.CASES) - command.HEAVY
    assert [case.name for case in plan[1]][: len(command.HEAVY)] == [n for n in command.CASES if n in command.HEAVY]
    assert {n: [case.name for case in cases] for n, cases in command.planned(["gmm"], None).items()} == {
        4: ["gmm"],
        1: ["gmm"],
    }


def test_cases_of_time_run():
    assert estimator_times.evaluations("categorical", "leave_one_out") == (2, 2)
    assert estimator_times.evaluations("bernoulli", "rebar") == (2, 10)
    assert estimator_times.evaluations("bernoulli", "measure_valued") == (2, 82)
    assert estimator_times.evaluations("bernoulli", "vimco") == (2, 2)
    assert estimator_times.evaluations("categorical", "pathwise") is None
    case = estimator_times.implied("categorical", "leave_one_out", "eager")
    assert case.name == "leave_one_out_categorical_eager" and timing.measure(case, 0.001).ratio > 0
    assert "both of `iwae`" in estimator_times.implied("normal", "dreg", "graph").what
    assert estimator_times.implied("normal", "arms", "graph") is None
    (case,) = [case for case in estimator_times.hand_cases() if case.name == "by_hand_bernoulli_graph"]
    assert timing.measure(case, 0.001).ratio > 0


# The discrete VAE ---------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """Few draws and turns."""
    monkeypatch.setattr(discrete_vae, "DRAWS", 20)
    monkeypatch.setattr(discrete_vae, "MOST_TURNS", 2)


def test_a_discrete_vae_is_calibrated_and_trained_once(tmp_path, monkeypatch, short):
    arguments = ["--seconds", "0.02", "--seeds", "2", "--latents", "3", "--estimators", "leave_one_out", "score"]
    options = discrete_vae.parse([*arguments, "--path", str(tmp_path / "cells.json")])
    text = discrete_vae.section(options)
    rows = {line.split("|")[1].strip(): line.split("|") for line in text.splitlines() if line.startswith("| `")}
    assert set(rows) == {"`leave_one_out`", "`score`"} and "**3 latents**" in text
    for row in rows.values():
        elbo, bound = (float(cell.split("+-")[0]) for cell in row[2:4])
        assert -70 < elbo <= bound + 1 < 0 and int(row[-2].replace(",", "")) >= 1
    monkeypatch.setattr(discrete_vae, "run", None)
    monkeypatch.setattr(discrete_vae, "calibrate", None)
    assert discrete_vae.section(options) == text
    assert {"leave_one_out", "score", "vimco"} <= set(discrete_vae.estimators())
    assert discrete_vae.objective_of("vimco") == "iwae" and discrete_vae.objective_of("score") == "elbo"


def test_equal_time_is_fewer_updates_of_the_dearer():
    calibration = {"score": {"ms": 2.0, "ratio": 1.0}, "rebar": {"ms": 9.0, "ratio": 4.0}}
    assert [discrete_vae.updates(calibration, name, 1.0) for name in calibration] == [500, 125]
    assert discrete_vae.updates(calibration, "rebar", 1e-9) == 1


def test_a_ratio_of_times_is_the_median_of_the_turns():
    found = discrete_vae._timed([2.0, 6.0, 40.0], [1.0, 2.0, 10.0])
    assert found["ratio"] == 3.0 and found["turns"] == 3 and found["ms"] == 6000.0 and found["low"] < 3 < found["high"]


def test_training_a_discrete_vae_raises_its_bound(short):
    before, after = (discrete_vae.run("leave_one_out", 5, 0, number) for number in (0, 40))
    assert after["bound"] > before["bound"] + 2 and after["train"] > before["train"]
    assert discrete_vae.run("leave_one_out", 5, 0, 40) == after


def test_the_page_of_the_discrete_vae_says_what_the_figures_are():
    """The file holds every run of its calibrated estimators for five seeds, and the page is written from it."""
    made = json.loads(discrete_vae.PATH.read_text())
    options = discrete_vae.parse([])
    clocks = {latents: made["calibration"][str(latents)] for latents in options.latents}
    names = list(clocks[20])
    assert {"leave_one_out", "vimco", "straight_through"} <= set(names) == set(clocks[200])
    runs = {}
    for latents, name, seed in itertools.product(options.latents, names, range(options.seeds)):
        number = discrete_vae.updates(clocks[latents], name, options.seconds)
        run = made["runs"][f"{name}, {latents} latents, {number} updates, seed {seed}"]
        runs[name, latents, seed] = {"updates": number, **run}
    text = discrete_vae_text.section(options, names, clocks, runs)
    assert page.read(estimators.TARGET)[discrete_vae.TITLE] == text


def test_conclusions_are_drawn_from_the_figures():
    runs = {
        "leave_one_out": [{"elbo": -20.0 + noise} for noise in (0.0, 0.1, -0.1)],
        "score": [{"elbo": -24.0 + noise} for noise in (0.0, 0.2, -0.1)],
        "arms": [{"elbo": -20.0 + noise} for noise in (0.2, -0.1, 0.0)],
        "disarm": [{"elbo": -19.0 + noise} for noise in (0.0, 0.1, -0.1)],
        "straight_through": [{"elbo": -22.0 + noise} for noise in (0.0, 0.1, -0.1)],
    }
    text = discrete_vae_text._conclusion(runs, "elbo")
    assert "best unbiased estimator is `disarm`, -19.00 +- 0.06. Within 2 standard errors of it: none" in text
    assert (
        "more than 2 standard errors: `disarm`; worse: `straight_through` (biased), `score`; not told from it: `arms`"
        in text
    )
    assert "Places of the biased among 5: `straight_through` 4; the best of them is -3.00 +- 0.00 from the best" in text
    assert discrete_vae_text.chance(5) == pytest.approx(0.116, abs=1e-3)


def test_amortized_guides_hold_nothing_of_their_data():
    """Bytes alive after steps on ever more rows; the measure sees a tensor that is kept."""
    small, large = guides.held_after([100, 10_000])
    assert small == large
    before = guides.held()
    kept = torch.zeros(10_000)
    assert guides.held() - before == kept.untyped_storage().nbytes()


def test_guides_print_throughput_and_memory(capsys):
    assert guides.main(["--rows", "2000"]) == 0
    printed = capsys.readouterr().out
    assert "rows a second, of 2,000" in printed and printed.count("KiB of tensors alive") == 4
