r"""Figures: what was put in is what is drawn, and nothing global changes."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr

from pyro_emvae import compare_gradients, problems, sweep_gradients
from pyro_emvae._checks import DataError
from pyro_emvae.diagnostics.container import finalize, fit_stats
from pyro_emvae.plots import (
    plot_elbo,
    plot_latent,
    plot_reconstructions,
    plot_snr,
    plot_variance_cost,
    plot_variance_ladder,
    snr_slopes,
)

pytestmark = pytest.mark.filterwarnings("ignore:.compare_gradients. cannot tell signals:UserWarning")

STEPS = 12


def history(phase: list[int] | None = None, elbo: np.ndarray | None = None) -> xr.Dataset:
    elbo = np.linspace(-9.0, -3.0, STEPS) if elbo is None else elbo
    data = {"elbo": ("step", elbo)}
    return xr.Dataset(data if phase is None else data | {"phase": ("step", np.array(phase, np.int8))})


def ladder(stages: int = 0) -> xr.Dataset:
    rng = np.random.default_rng(0)
    dims, shape = ("estimator", "block"), (3, 2)
    if stages:
        dims, shape = ("stage", *dims), (stages, *shape)
    mean = np.exp(rng.normal(size=shape))
    coords = {"estimator": ["score", "leave_one_out", "pathwise"], "block": ["guide", "model"]}
    coords |= {"stage": [f"at {i}" for i in range(stages)]} if stages else {}
    return xr.Dataset({"variance_mean": (dims, mean), "variance_max": (dims, 3 * mean)}, coords)


def labels(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def bands(ax, label: str) -> list[tuple[float, float]]:
    """Return start and width of the shaded spans."""
    (collection,) = [c for c in ax.collections if c.get_label() == label]
    boxes = [path.get_extents() for path in collection.get_paths()]
    return [(box.x0, box.width) for box in boxes]


def drawn(ax) -> None:
    ax.figure.canvas.draw()


# The ELBO -----------------------------------------------------------------------------------------------------------


def test_elbo_line_and_phases():
    phase = [0] * 4 + [1] * 3 + [0] * 3 + [2] * 2
    ax = plot_elbo(history(phase))
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), history()["elbo"])
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), np.arange(1, STEPS + 1))
    assert bands(ax, "E-phase") == [(0.5, 4.0), (7.5, 3.0)]
    assert bands(ax, "M-phase") == [(4.5, 3.0)]
    assert labels(ax) == ["ELBO", "E-phase", "M-phase"]
    drawn(ax)


def test_elbo_with_evidence():
    ax = plot_elbo(history(), label="EM")
    ax = plot_elbo(history(), ax=ax, label="SVI", smooth=3)
    assert [line.get_label() for line in ax.lines if not line.get_label().startswith("_")] == [
        "EM",
        "SVI, mean of 3 steps",
    ]
    assert ax.lines[0].get_color() != ax.lines[1].get_color() == ax.lines[2].get_color()
    assert plot_elbo(history(), log_evidence=-2.5).lines[-1].get_ydata() == [-2.5, -2.5]
    ax = plot_elbo(history(), log_evidence=SimpleNamespace(value=torch.tensor(-2.5), standard_error=0.25))
    assert ax.lines[-1].get_ydata() == [-2.5, -2.5]
    (box,) = ax.patches
    assert (box.get_y(), box.get_height()) == (-2.75, 0.5)


def test_elbo_smoothed_over_what_is_there():
    elbo = np.array([1.0, 2.0, np.nan, 4.0, 5.0])
    ax = plot_elbo(history(elbo=elbo), smooth=3)
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [1.5, 1.5, 3.0, 4.5, 4.5])
    assert labels(ax) == ["ELBO, mean of 3 steps"]
    line = np.arange(40.0)
    for smooth in (2, 4, 5):
        middle = plot_elbo(history(elbo=line), smooth=smooth).lines[1].get_ydata()[5:-5]
        np.testing.assert_allclose(middle, line[5:-5] - (0.5 if smooth % 2 == 0 else 0.0))


def test_first_steps_do_not_flatten_the_rest():
    elbo = np.concatenate([[-1e5, -5e4, -2e3], np.linspace(-120.0, -100.0, 97)])
    low, high = plot_elbo(history(elbo=elbo)).get_ylim()
    assert -120 < low < -115 and -100 < high < -95
    low, high = plot_elbo(history(elbo=elbo), log_evidence=-90.0).get_ylim()
    assert -125 < low < -110 and -90 < high < -85
    low, high = plot_elbo(history(elbo=np.linspace(-120.0, -100.0, 100))).get_ylim()
    assert low < -120 and high > -100
    drawn(plot_elbo(history(elbo=np.full(50, np.nan))))
    drawn(plot_elbo(history(elbo=np.array([-1e9] + [1.0] * 49))))


def test_phases_too_thin_to_see_are_named():
    phase = [0, 1] * 400
    ax = plot_elbo(history(phase, np.zeros(800)))
    assert not ax.collections and labels(ax) == ["ELBO"]
    assert ax.get_xlabel() == "gradient step (phases: E, M, E, M, ...)"


def test_elbo_from_fit_container_and_chains():
    given = history([0, 1] * 6)
    fit = SimpleNamespace(history=given)
    for source in (fit, finalize({"fit_stats": fit_stats(fit)}), fit_stats(fit)):
        np.testing.assert_array_equal(plot_elbo(source).lines[0].get_ydata(), given["elbo"])
    both = xr.concat([given, given + 1], "chain")
    assert labels(plot_elbo(both))[:2] == ["ELBO, chain 0", "ELBO, chain 1"]


def test_empty_history():
    drawn(plot_elbo(history([], np.zeros(0))))


@pytest.mark.parametrize("given", [object(), xr.Dataset({"loss": ("step", [1.0])}), [1.0, 2.0], {"elbo": [1.0]}])
def test_what_has_no_elbo_is_refused(given):
    with pytest.raises(DataError, match="'elbo'"):
        plot_elbo(given)


# The ladder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: SimpleNamespace(dataset=d)])
@pytest.mark.parametrize(("stages", "block", "rungs"), [(0, None, 2), (2, None, 4), (2, "model", 2), (0, ["guide"], 1)])
def test_ladder(stages, block, rungs, wrap):
    table = ladder(stages)
    ax = plot_variance_ladder(wrap(table), block=block)
    assert ax.get_xscale() == "log" and len(labels(ax)) == rungs
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["score", "leave_one_out", "pathwise"]
    first = table["variance_mean"].sel(block=block if isinstance(block, str) else "guide")
    first = first.isel(stage=0) if stages else first
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), first)
    ends = [segment[-1][0] for segment in ax.collections[0].get_segments()]
    np.testing.assert_allclose(ends, 3 * first)
    drawn(ax)


def outside(ax) -> bool:
    """Whether the legend lies right of the axes and inside the figure."""
    ax.figure.draw_without_rendering()
    legend, axes = ax.get_legend().get_window_extent(), ax.get_window_extent()
    return legend.x0 >= axes.x1 and legend.x1 <= ax.figure.bbox.x1


def test_legends_cover_no_data():
    assert outside(plot_variance_ladder(ladder(2)))
    assert outside(plot_latent(np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 10))


def test_ladder_says_what_the_line_is():
    assert "line: up to the largest" in plot_variance_ladder(ladder()).get_xlabel()
    assert "largest" not in plot_variance_ladder(ladder().drop_vars("variance_max")).get_xlabel()


def test_ladder_with_zero_and_missing_variance():
    table = ladder()
    table["variance_mean"][2, 0], table["variance_mean"][1, 0] = 0.0, np.nan
    least = float(table["variance_mean"].where(table["variance_mean"] > 0).min())
    ax = plot_variance_ladder(table)
    hollow = ax.lines[1]
    assert hollow.get_fillstyle() == "none" and hollow.get_xdata() == [pytest.approx(least / 10)]
    assert np.isnan(ax.lines[0].get_xdata()).tolist() == [False, True, True]
    drawn(ax)


def test_ladder_of_a_comparison():
    problem = problems.normal_normal()
    rows = ["score", "pathwise", "sticking_the_landing"]
    table = compare_gradients(problem.model, problem.guide, *problem.args, estimators=rows, num_replicates=20, seed=0)
    ax = plot_variance_ladder(table, block="guide")
    variance = table.dataset["variance_mean"].sel(block="guide")
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), variance)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == rows and labels(table.plot()) == ["guide", "model"]


def test_ladder_refuses():
    with pytest.raises(DataError, match="'guide'"):
        plot_variance_ladder(ladder(), block="guid")
    with pytest.raises(DataError, match="variance_mean"):
        plot_variance_ladder(object())


# Sweeps -------------------------------------------------------------------------------------------------------------

COUNTS = np.array([1.0, 4.0, 16.0, 64.0])


def swept(stages: int = 0) -> xr.Dataset:
    """Ratios that rise as sqrt(K) and fall as 1/sqrt(K) into the floor; a variance that falls as 1/K, and one of 0."""
    snr = np.stack([0.5 * np.sqrt(COUNTS), np.maximum(0.2 / np.sqrt(COUNTS), 0.04)], 1)[..., None]
    variance = np.stack([3 / COUNTS, 0 * COUNTS], 1)[..., None]
    dims, coords = ("num_particles", "estimator", "block"), {"num_particles": COUNTS.astype(int)}
    coords |= {"estimator": ["rising", "falling"], "block": ["guide"]}
    data = xr.Dataset(
        {
            "snr": (dims, snr),
            "variance_mean": (dims, variance),
            "variance_max": (dims, 2 * variance),
            "evaluations": (dims[:2], np.stack([COUNTS, 2 * COUNTS], 1)),
            "milliseconds": (dims[:2], np.stack([COUNTS, 2 * COUNTS], 1) / 7),
        },
        coords,
        {"snr_floor": 0.06, "snr_noise": 0.02},
    )
    return data.expand_dims(stage=list(range(stages))) if stages else data


def test_slopes_leave_out_what_is_below_the_floor():
    slopes = snr_slopes(swept())
    np.testing.assert_allclose(slopes.sel(block="guide"), [0.5, -0.5], rtol=1e-12)
    assert abs(float(snr_slopes(swept(), floor=0.0).sel(estimator="falling")[0]) + 0.5) > 0.05
    assert np.isnan(snr_slopes(swept(), floor=0.15).sel(estimator="falling")).all()
    assert dict(snr_slopes(swept(2)).sizes) == {"stage": 2, "estimator": 2, "block": 1}


@pytest.mark.parametrize("stages", [0, 2])
def test_snr(stages):
    ax = plot_snr(swept(stages))
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    stage = [f", stage {i}" for i in range(stages)] or [""]
    assert labels(ax) == [f"{n}{s}: slope {k}" for n, k in (("rising", "+0.50"), ("falling", "-0.50")) for s in stage]
    marks, fits = ([line for line in ax.lines if (line.get_marker() == "None") == fit] for fit in (False, True))
    by_fill = {fill: [m for m in marks if m.get_fillstyle() == fill] for fill in ("full", "none")}
    np.testing.assert_allclose(by_fill["full"][-1].get_ydata(), [0.2, 0.1])
    np.testing.assert_array_equal(by_fill["none"][-1].get_xdata(), [16, 64])
    np.testing.assert_allclose(fits[0].get_ydata(), 0.5 * np.sqrt(COUNTS))
    assert fits[-1].get_ydata() == [0.02, 0.02] and len(fits) == 2 * max(1, stages) + 1
    drawn(ax)
    assert outside(ax)


def test_snr_without_a_point_above_the_floor():
    table = swept()
    table.attrs["snr_floor"] = 9.0
    assert labels(plot_snr(table)) == ["rising: no slope above the floor", "falling: no slope above the floor"]


@pytest.mark.parametrize("cost", ["evaluations", "milliseconds"])
def test_variance_against_cost(cost):
    table = swept()
    ax = plot_variance_cost(table, cost=cost, maximum=True)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), table[cost].sel(estimator="rising"))
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), 6 / COUNTS)
    assert labels(ax) == ["rising", "falling, variance 0"] and np.isnan(ax.lines[1].get_ydata()).all()
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    drawn(ax)
    assert len(plot_variance_cost(swept(3), cost=cost).lines) == 6


def test_ladder_of_a_sweep_has_a_rung_for_each_combination():
    ax = plot_variance_ladder(swept(2), block="guide")
    assert labels(ax)[:2] == ["guide, 0, num_particles 1", "guide, 0, num_particles 4"] and len(labels(ax)) == 8


def test_figures_of_a_sweep():
    problem = problems.subsampled()
    rows = ["score", "pathwise"]
    given = {"estimators": rows, "num_particles": [1, 2], "num_replicates": 20}
    table = sweep_gradients(problem.model, problem.guide, *problem.args, **given)
    assert table.estimator.values.tolist() == [*rows, "minibatch"]
    assert labels(plot_variance_cost(table)) == rows
    for figure in (plot_variance_ladder(table), plot_snr(table, block="model")):
        drawn(figure)


@pytest.mark.parametrize(
    ("plot", "options", "observed"),
    [
        (plot_snr, {"block": "gide"}, "'gide'"),
        (plot_variance_cost, {"block": "gide"}, "'gide'"),
        (plot_variance_cost, {"cost": "money"}, "cost='money'"),
    ],
)
def test_figures_of_a_sweep_refuse(plot, options, observed):
    with pytest.raises(DataError, match=observed):
        plot(swept(), **options)


def test_ratios_need_numbers_of_particles():
    for function in (plot_snr, snr_slopes):
        with pytest.raises(DataError, match=r"dims .*'estimator'"):
            function(swept().isel(num_particles=0))
        with pytest.raises(DataError, match="'snr'"):
            function(ladder())


# Images and latents -------------------------------------------------------------------------------------------------


def test_reconstructions():
    images = torch.arange(24.0, requires_grad=True).reshape(2, 12)
    ax = plot_reconstructions(images, images / 2, shape=(3, 4), num=2)
    mosaic = ax.get_images()[0].get_array()
    assert mosaic.shape == (7, 9)
    np.testing.assert_array_equal(mosaic[:3, 5:], images[1].detach().reshape(3, 4))
    np.testing.assert_array_equal(mosaic[4:, :4], images[0].detach().reshape(3, 4) / 2)
    assert (
        mosaic.mask[3].all() and mosaic.mask[:, 4].all() if np.ma.isMaskedArray(mosaic) else np.isnan(mosaic[3]).all()
    )
    assert plot_reconstructions(np.ones((20, 2, 2)), np.ones((20, 2, 2))).get_images()[0].get_array().shape == (5, 35)
    with pytest.raises(DataError, match="12"):
        plot_reconstructions(images, images)
    with pytest.raises(DataError, match="3, 4"):
        plot_reconstructions(images, images[:1], shape=(3, 4))


def test_latent_map():
    latent, digits = torch.randn(30, 3), torch.arange(30) % 3
    ax = plot_latent(latent, digits, dims=(0, 2))
    np.testing.assert_allclose(ax.collections[1].get_offsets(), latent[digits == 1][:, [0, 2]])
    assert labels(ax) == ["0", "1", "2"]
    assert plot_latent(latent).get_legend() is None
    assert len(plot_latent(latent, range(30)).collections) == 30
    for bad in ((latent[0], None), (latent[:, :1], None), (latent, [1, 2])):
        with pytest.raises(DataError, match="shape"):
            plot_latent(*bad)


# Nothing global -----------------------------------------------------------------------------------------------------


def test_given_axes_are_used(tmp_path):
    from matplotlib.figure import Figure

    axes = Figure().subplots(4)
    assert plot_elbo(history(), axes[0]) is axes[0]
    assert plot_variance_ladder(ladder(), ax=axes[1]) is axes[1]
    assert plot_reconstructions(np.ones((2, 4)), np.ones((2, 4)), axes[2]) is axes[2]
    assert plot_latent(np.ones((2, 2)), ax=axes[3]) is axes[3]
    axes[0].figure.savefig(tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 1000


PROBE = """
import json, sys
import matplotlib, numpy as np, xarray as xr
before = matplotlib.rcParams.copy()  # reading rcParams["backend"] itself would choose one
from pyro_emvae.plots import plot_elbo, plot_latent
ax = plot_elbo(xr.Dataset({"elbo": ("step", np.arange(5.0))}))
plot_latent(np.ones((3, 2)), [0, 1, 1])
ax.figure.savefig(sys.argv[1])
after = matplotlib.rcParams.copy()
changed = [key for key in before if before[key] != after[key]]
print(json.dumps([changed, "matplotlib.pyplot" in sys.modules]))
"""


def test_no_backend_no_style_no_pyplot(tmp_path):
    command = [sys.executable, "-W", "error", "-c", PROBE, str(tmp_path / "elbo.png")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(out.stdout) == [[], False]
