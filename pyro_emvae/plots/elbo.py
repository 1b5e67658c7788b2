r"""The ELBO along a run."""

from __future__ import annotations

from typing import Any

import numpy as np

from .common import axes, require

__all__ = ["plot_elbo"]

PHASES = {0: ("E", "tab:blue"), 1: ("M", "tab:orange")}
BANDS = 150  # more changes of phase than that are too thin to see


def plot_elbo(
    fit_or_history: Any,
    ax: Any = None,
    log_evidence: Any = None,
    smooth: int | None = None,
    label: str = "ELBO",
) -> Any:
    r"""Plot the ELBO over gradient steps, with E- and M-phases shaded.

    Args:
        fit_or_history: What ``run`` returned, its ``.history``, or the container that `to_arviz` made of it.
        ax: Axes to draw into.
        log_evidence: A number, or anything with ``.value`` (and ``.standard_error``): a line that
            the ELBO stays below, but for Monte Carlo error.
        label: What the legend calls the line, to tell several runs in one figure apart.
        smooth: Window of a centred running mean in steps; the steps themselves are then drawn faintly.

    Phases that change too often to be seen are named below the axis and not shaded. If the first tenth of the steps
    would make all others a flat line, it is left to lie outside of the frame.

    Raises:
        DataError: If there is no ELBO.

    Example:
        >>> import numpy as np, xarray as xr
        >>> history = xr.Dataset({"elbo": ("step", np.log(np.arange(1.0, 9.0))), "phase": ("step", [0, 1] * 4)})
        >>> plot_elbo(history, log_evidence=3.0).get_ylabel()
        'ELBO (nats)'
    """
    history = _history(fit_or_history)
    chains = np.atleast_2d(np.asarray(history["elbo"], dtype=float))
    ax = axes("plot_elbo", ax, figsize=(7.0, 4.0))
    steps = np.arange(1, chains.shape[1] + 1)
    drawn = len({line.get_color() for line in ax.lines})  # of earlier calls
    colors = [f"C{drawn + i}" for i in range(len(chains))]
    for i, elbo in enumerate(chains):
        name = label if len(chains) == 1 else f"{label}, chain {i}"
        if smooth is not None and smooth > 1:
            ax.plot(steps, elbo, color=colors[i], alpha=0.3, linewidth=0.8)
            elbo, name = _running_mean(elbo, smooth), f"{name}, mean of {smooth} steps"
        ax.plot(steps, elbo, color=colors[i], label=name)
    phases = _shade(ax, steps, np.atleast_2d(np.asarray(history["phase"]))[0]) if "phase" in history else ""
    if log_evidence is not None:
        _line(ax, log_evidence)
    _frame(ax, chains, log_evidence)
    ax.set_xlabel("gradient step" + phases)
    ax.set_ylabel("ELBO (nats)")
    ax.set_xlim(0.5, max(len(steps), 1) + 0.5)
    ax.legend()
    return ax


def _history(fit: Any) -> Any:
    history = getattr(fit, "history", fit)
    if not hasattr(history, "data_vars") or "elbo" not in history:
        history = history["fit_stats"] if hasattr(history, "__contains__") and "fit_stats" in history else history
    require("plot_elbo", history, "elbo", "a fit, or its history")
    return history


def _shade(ax: Any, steps: np.ndarray, phase: np.ndarray) -> str:
    """Shade runs of one phase as bands behind the lines; return text for what is too thin to be seen."""
    starts = np.flatnonzero(np.diff(phase.astype(int), prepend=-1))
    ends = np.append(starts, len(phase))[1:]
    if len(starts) > BANDS:
        first = ", ".join(PHASES[int(k)][0] for k in phase[starts[:4]] if int(k) in PHASES)
        return f" (phases: {first}, ...)"
    for value, (name, color) in PHASES.items():
        spans = [(steps[a] - 0.5, b - a) for a, b in zip(starts, ends, strict=True) if phase[a] == value]
        if spans:
            look = {"color": color, "alpha": 0.15, "linewidth": 0, "label": f"{name}-phase"}
            ax.broken_barh(spans, (0, 1), transform=ax.get_xaxis_transform(), **look)
    return ""


def _frame(ax: Any, chains: np.ndarray, log_evidence: Any) -> None:
    """Fit the y-axis to the steps after the first tenth, if this makes them more than three times as tall."""
    start = chains.shape[1] // 10
    everything, later = (rows[np.isfinite(rows)] for rows in (chains, chains[:, start:]))
    if start == 0 or later.size == 0:
        return
    ends = [float(later.min()), float(later.max())]
    if log_evidence is not None:
        ends.append(float(getattr(log_evidence, "value", log_evidence)))
    low, high = min(ends), max(ends)
    if high > low and max(np.ptp(everything), high - everything.min()) > 3 * (high - low):
        margin = 0.05 * (high - low)
        ax.set_ylim(low - margin, high + margin)


def _line(ax: Any, log_evidence: Any) -> None:
    value = float(getattr(log_evidence, "value", log_evidence))
    error = getattr(log_evidence, "standard_error", None)
    ax.axhline(value, color="black", linestyle="--", linewidth=1, label="log evidence")
    if error is not None:
        ax.axhspan(value - float(error), value + float(error), color="black", alpha=0.15, linewidth=0)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean over the `window` values around each that are there; NaN counts as not there."""
    there = np.isfinite(values)
    sides = np.array([[-(window // 2)], [window - window // 2]])
    ends = np.clip(np.arange(len(values)) + sides, 0, len(values))
    sums, counts = (
        np.diff(np.concatenate([[0], np.cumsum(column)])[ends], axis=0)[0]
        for column in (np.where(there, values, 0.0), there)
    )
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
