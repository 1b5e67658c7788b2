r"""Stopping rules: what is left is known exactly for made-up sequences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyro_emvae._checks import EmvaeError
from pyro_emvae.convergence import STATUSES, Ascent, Deterministic, Windowed

K = np.arange(1, 4001)


def walk(rule: Deterministic, objectives: np.ndarray, changes: np.ndarray, **options) -> tuple[int, str | None]:
    """Return the first iteration at which the rule ends the run, and its status."""
    values, steps = objectives.tolist(), changes.tolist()
    for k in range(1, len(values) + 1):
        status = rule.judge(values[:k], steps[:k], **options).status
        if status is not None:
            return k, status
    return len(values), None


# Deterministic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tol", [1e-3, 1e-6])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 0.98])
def test_a_linear_run_stops_when_what_is_left_is_below_tol(rate, tol):
    number = 50
    left = number * rate**K  # L_infinity - L_k
    k, status = walk(Deterministic(tol, change_tol=1e6, confirm=1), -100.0 - left, rate ** (K / 2), num_data=number)
    assert status == "CONVERGED"
    assert left[k - 1] / number < tol * (1 + 1e-6)
    assert k <= 4 or left[k - 2] / number >= tol
    rule = Deterministic(tol, change_tol=1e6)
    assert walk(rule, -100.0 - left, rate ** (K / 2), num_data=number) == (max(k, 3) + 2, "CONVERGED")


def test_the_last_gain_says_too_little():
    """The rule that everyone writes stops a run of rate 0.98 with fifty times its tolerance left."""
    left, tol = 0.98**K, 1e-4
    naive = int(np.argmax(-np.diff(left) < tol)) + 2
    assert left[naive - 1] > 40 * tol
    assert walk(Deterministic(tol, change_tol=1e6), -left, left)[0] > naive + 100


@pytest.mark.parametrize("tol", [1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_sublinear_runs_are_never_called_converged(power, tol):
    left, change = K**-power, 1 / (2 * K)
    for end in range(3, len(K), 7):
        verdict = Deterministic(tol).judge((-left[:end]).tolist(), change[:end].tolist())
        assert verdict.status in (None, "SLOW")
        assert verdict.change > 0.05


def test_slow_linear_runs_are_called_slow():
    left = 0.995**K
    k, status = walk(Deterministic(1e-3), -left, left)
    assert status == "SLOW" and left[k - 1] == pytest.approx(1e-3, rel=0.01)
    verdict = Deterministic(1e-3).judge((-left[:k]).tolist(), left[:k].tolist())
    assert verdict.rate == pytest.approx(0.995, rel=1e-9) and "squarem" in verdict.reason


def test_a_steep_start_does_not_hide_a_plateau():
    """Fast for ten iterations, then at rate 0.97: the mean rate over the window is low, the last one is not."""
    gains = np.concatenate([10.0 ** -np.arange(4.0), 1e-4 * 0.97 ** np.arange(600)])
    left = gains[::-1].cumsum()[::-1]
    k, status = walk(Deterministic(1e-3, change_tol=1e6), -left, left)
    assert status == "CONVERGED" and left[k - 1] < 1e-3 * (1 + 1e-6)


def test_gains_that_grow_are_no_convergence():
    """Near a saddle, the gains are tiny and grow."""
    gains = 1e-12 * 1.2 ** np.arange(100)
    objectives = -1.0 + gains.cumsum()
    assert walk(Deterministic(1e-3), objectives, np.sqrt(gains))[1] is None


def test_parameters_that_still_move_are_no_convergence_but_a_stall():
    rule, flat = Deterministic(), [-5.0] * 40
    assert rule.judge(flat[:11], [0.01] * 11).status is None
    assert rule.judge(flat, [0.01] * 40).status == "STALLED"
    assert rule.judge(flat, [0.0] * 40).status == "CONVERGED"


def test_a_gain_within_the_rounding_of_float32_is_no_gain():
    rule, epsilon = Deterministic(), 2.0**-23
    noisy = [-1e5 + 0.004 * (-1) ** k for k in range(40)]
    assert rule.judge(noisy, [1e-7] * 40, num_data=1000, epsilon=epsilon).status == "CONVERGED"
    assert rule.judge(noisy, [1e-3] * 40, num_data=1000, epsilon=epsilon).status == "STALLED"
    assert rule.judge(noisy, [1e-7] * 40, num_data=1000).status is None


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0], [math.nan, 1.0, 1.0], [1.0, math.inf, 1.0]])
def test_too_little_is_not_judged(values):
    assert Deterministic().judge(values, [0.0] * len(values)).status is None


# Windowed -----------------------------------------------------------------------------------------------------------


def correlated(seed: int, number: int, rho: float = 0.3) -> np.ndarray:
    """Autoregressive noise of variance 1."""
    noise = np.random.default_rng(seed).normal(size=number)
    for k in range(1, number):
        noise[k] = rho * noise[k - 1] + math.sqrt(1 - rho**2) * noise[k]
    return noise


RULE = Windowed(tol=0.1, window=50, patience=4)


def test_noise_without_drift_converges_mostly():
    """The level is 5 % for each of five tests; batch means of correlated values make it somewhat more."""
    statuses = [RULE.judge(0.1 * correlated(seed, 250)).status for seed in range(100)]
    assert statuses.count("CONVERGED") >= 95  # the noise is far below tol


def test_a_drift_beyond_tol_is_never_called_converged():
    drift = 0.15 * np.arange(250) / 50
    assert {RULE.judge(0.1 * correlated(seed, 250) + drift).status for seed in range(100)} == {None}


def test_a_steady_drift_below_the_error_of_one_window_is_seen_over_all():
    rule = Windowed(tol=0.05, window=50, patience=8)
    noise = np.stack([correlated(seed, 450, rho=0.0) for seed in range(50)])
    drift = 0.25 * np.arange(450) / 50  # per window, where the difference of two windows has error 0.2
    seen = [rule.judge(values + drift).status is None for values in noise]
    assert sum(seen) >= 48
    assert sum(rule.judge(values).status is None for values in noise) <= 15


def test_noise_above_tol_is_a_stall():
    assert RULE.judge(3 * correlated(1, 250)).status == "STALLED"
    verdict = RULE.judge(3 * correlated(1, 250))
    assert verdict.error > 0.1 and "standard error" in verdict.reason


def test_a_drift_is_per_datum():
    drift = 10.0 * np.arange(250) / 50
    assert RULE.judge(drift, num_data=1000).status == "CONVERGED"
    assert RULE.judge(drift, num_data=10).status is None


@pytest.mark.parametrize(("count", "judged"), [(249, False), (250, True), (251, False), (299, False), (300, True)])
def test_it_is_judged_at_the_end_of_a_window(count, judged):
    assert (RULE.judge(np.zeros(count)).status == "CONVERGED") == judged


def test_never_during_warm_up():
    rule = Windowed(window=50, patience=4, warm_up=500)
    judged = [k for k in range(1, 1000) if rule.judge(np.zeros(k)).status]
    assert judged[0] == 750


def test_parameters_are_judged_too():
    still, moving = np.zeros((250, 3)), np.zeros((250, 3))
    moving[:, 1] = 0.05 * np.arange(250) / 50
    assert RULE.judge(np.zeros(250), parameters=still).status == "CONVERGED"
    assert RULE.judge(np.zeros(250), parameters=moving).status is None
    assert RULE.judge(np.zeros(250), parameters=100 + moving).status == "CONVERGED"  # relative


def test_values_that_are_not_finite_are_not_judged():
    values = np.zeros(250)
    values[-1] = math.nan
    assert RULE.judge(values).status is None


def test_errors_are_those_of_the_mean():
    """For independent noise, the error of a difference of windows is sqrt(2 / window)."""
    errors = [RULE.judge(correlated(seed, 250, rho=0.0)).error for seed in range(200)]
    assert np.mean(np.square(errors)) == pytest.approx(2 / 50, rel=0.1)


# Ascent -------------------------------------------------------------------------------------------------------------


def test_an_ascent_is_accepted_at_its_level():
    """Of estimates with mean 0, the share alpha is accepted."""
    from statistics import NormalDist

    quantiles = [(i + 0.5) / 1000 for i in range(1000)]
    rule = Ascent(alpha=0.25, tol=1e-12)
    accepted = [rule.judge(NormalDist().inv_cdf(p), 1.0) == "accept" for p in quantiles]
    assert sum(accepted) == 250


@pytest.mark.parametrize(
    ("gain", "error", "expected"),
    [(1.0, 0.0, "accept"), (0.1, 1.0, "grow"), (-1.0, 1.0, "grow"), (0.0, 1e-4, "stop"), (-1.0, 0.1, "stop")],
)
def test_accept_grow_or_stop(gain, error, expected):
    assert Ascent().judge(gain, error) == expected


def test_sizes_grow():
    size, rule = 1, Ascent(growth=1.01)
    for _ in range(5):
        assert rule.next_size(size) > size
        size = rule.next_size(size)


# Bad input ----------------------------------------------------------------------------------------------------------


WRONG = {
    "tol of zero": (Deterministic, {"tol": 0.0}, r"got 0\.0"),
    "negative tol": (Deterministic, {"tol": -1e-3}, r"got -0\.001"),
    "nan": (Deterministic, {"tol": math.nan}, "got nan"),
    "text": (Deterministic, {"tol": "small"}, "'small'"),
    "rate": (Deterministic, {"slow": 1.5}, r"got 1\.5"),
    "window of zero": (Deterministic, {"window": 0}, "got 0"),
    "short window": (Windowed, {"window": 2}, "got 2"),
    "patience": (Windowed, {"patience": 0}, "got 0"),
    "warm-up": (Windowed, {"warm_up": -1}, "got -1"),
    "level": (Ascent, {"alpha": 1.0}, r"got 1\.0"),
    "growth": (Ascent, {"growth": 1.0}, r"got 0\.0"),
}


@pytest.mark.parametrize("key", WRONG)
def test_options_out_of_range_are_refused(key):
    rule, options, observed = WRONG[key]
    with pytest.raises(EmvaeError, match=observed):
        rule(**options)


def test_rules_are_frozen():
    with pytest.raises(AttributeError):
        Deterministic().tol = 1.0
    assert set(STATUSES) >= {"CONVERGED", "SLOW", "STALLED", "MAX_ITER", "REVERTED", "DEGENERATE", "NAN", "INTERRUPTED"}


def test_an_objective_that_falls_is_judged_by_its_steps():
    """A slow fall is no convergence, a fast one to a limit is; the last fall of rounding is lost as before."""
    slow, fast = [-0.01 * k for k in range(40)], [2.0**-k for k in range(40)]
    assert Deterministic(tol=1e-6).judge(slow, [1e-9] * 39).status is None
    assert Deterministic(tol=1e-6).judge(fast, [2.0**-k for k in range(39)]).status == "CONVERGED"
    creeping = [1.0 / k for k in range(1, 400)]
    assert Deterministic(tol=1e-3).judge(creeping, [1.0 / k for k in range(1, 399)], num_data=399).status != "CONVERGED"
    level = [1.0] * 20 + [1.0 - 1e-15] * 20
    assert Deterministic(tol=1e-6).judge(level, [0.0] * 39).status == "CONVERGED"
