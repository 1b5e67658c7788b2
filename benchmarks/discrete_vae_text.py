r"""What the section of the discrete VAE says: the table, and what comes out of its figures."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from pyro_emvae._registry import lookup

from .page import markdown

BASELINE = "leave_one_out"
BEYOND = 2.0  # standard errors of a mean of differences that count as a difference
FIGURES = {"elbo": "the held-out ELBO", "bound": "the held-out bound"}
TEXT = """z ~ Bernoulli with learned logits, x | z by a network of {hidden} hidden units, as the guide has; {train:,}
images for training in batches of {batch}, each pixel drawn anew from its grey level (which keeps the networks from
learning the images by heart), the others held out and drawn once. Adam, learning rate {rate:g}, {particles} particles
or the nearest number that an estimator takes, recorded steps; the ELBO, or `iwae` for the estimators of that alone.

Equal time: each estimator makes as many updates as fit {seconds:g} seconds of one thread at {reference} milliseconds
of an update of `score` with {latents} latents. Times relative to that are medians over {turns} turns in one process, in
which each came in turn; their largest standard error is {error:.0%}. The figures are of what can be had in that time,
not at convergence. Calibration and figures of all runs are in `benchmarks/discrete_vae.json`.

Means over {seeds} seeds and their standard errors, nats per image; runs of a seed have one start, one order of images
and one noise of pixels, so that comparisons are of differences by seed, as "less `{baseline}`" is. The bound is the log
of the mean of {draws} weights, which lies below log p(x). Of equal estimators, chance puts {chance:.0%} of comparisons
beyond {beyond:g} standard errors."""

Runs = Mapping[tuple[str, int, int], Mapping[str, float]]


def section(options: argparse.Namespace, names: Sequence[str], clocks: Mapping[int, Mapping], runs: Runs) -> str:
    """Return text, tables and conclusions."""
    from . import discrete_vae as made

    rows = [row for latents in options.latents for row in clocks[latents].values()]
    text = TEXT.format(
        hidden=made.HIDDEN,
        train=made.TRAIN,
        batch=made.BATCH,
        rate=made.RATE,
        particles=made.PARTICLES,
        draws=made.DRAWS,
        seconds=options.seconds,
        seeds=options.seeds,
        baseline=BASELINE,
        reference=" and ".join(f"{clocks[d][made.REFERENCE]['ms']:.3g}" for d in options.latents),
        latents=" and ".join(map(str, options.latents)),
        turns=_range([row["turns"] for row in rows]),
        error=max(row["error"] for row in rows),
        beyond=BEYOND,
        chance=chance(options.seeds),
    )
    parts = [text]
    for latents in options.latents:
        chosen = {n: [runs[n, latents, seed] for seed in range(options.seeds)] for n in names}
        parts += [f"**{latents} latents**", table(chosen, clocks[latents]), conclusions(chosen)]
    return "\n\n".join(parts)


def chance(seeds: int) -> float:
    """Return how often a mean of so many normal differences of mean zero is beyond `BEYOND` standard errors."""
    from scipy.stats import t

    return float(2 * t.sf(BEYOND, seeds - 1)) if seeds > 1 else math.nan


def _range(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def is_biased(name: str) -> bool:
    return not lookup("estimator", name).traits.unbiased


def label(name: str) -> str:
    from .discrete_vae import objective_of

    marks = [word for word, holds in (("biased", is_biased(name)), ("`iwae`", objective_of(name) == "iwae")) if holds]
    return f"`{name}`" + (f" ({', '.join(marks)})" if marks else "")


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def differences(ours: Sequence[Mapping], theirs: Sequence[Mapping], figure: str) -> tuple[float, float]:
    """Return the mean of the differences by seed and its standard error."""
    return mean([a[figure] - b[figure] for a, b in zip(ours, theirs, strict=True)])


def table(runs: Mapping[str, Sequence[Mapping]], clock: Mapping[str, Mapping]) -> str:
    """Return a row per estimator, best bound first."""
    lines = []
    for name in ranked(runs, "bound"):
        own = [_pm(*mean([run[figure] for run in runs[name]])) for figure in ("elbo", "bound", "train")]
        less = _pm(*differences(runs[name], runs[BASELINE], "bound")) if name != BASELINE and BASELINE in runs else ""
        cost = f"{clock[name]['ratio']:.3g}", f"{runs[name][0]['updates']:,}"
        lines.append((label(name), *own[:2], less, own[2], *cost))
    head = ("estimator", "ELBO", "bound", f"bound less `{BASELINE}`", "ELBO, training", "time of an update", "updates")
    return markdown(head, lines)


def _pm(value: float, error: float) -> str:
    return f"{value:.2f} +- {error:.2f}"


def ranked(runs: Mapping[str, Sequence[Mapping]], figure: str) -> list[str]:
    """Return the names, the largest mean first."""
    return sorted(runs, key=lambda name: -fmean(run[figure] for run in runs[name]))


def conclusions(runs: Mapping[str, Sequence[Mapping]]) -> str:
    """Return what the figures say: the best, who is not told from it, who differs from the baseline, the biased."""
    return "\n\n".join(_conclusion(runs, figure) for figure in FIGURES)


def _conclusion(runs: Mapping[str, Sequence[Mapping]], figure: str) -> str:
    order = ranked(runs, figure)
    unbiased, biased = ([n for n in order if is_biased(n) == which] for which in (False, True))
    parts = [f"By {FIGURES[figure]},"]
    if unbiased:
        best = unbiased[0]
        value, error = mean([run[figure] for run in runs[best]])
        parts.append(f"the best unbiased estimator is {label(best)}, {_pm(value, error)}.")
        near = [n for n in unbiased[1:] if not _beyond(differences(runs[best], runs[n], figure))]
        parts.append(f"Within {BEYOND:g} standard errors of it: {_list(near)}.")
    if BASELINE in runs:
        gaps = {n: differences(runs[n], runs[BASELINE], figure) for n in order if n != BASELINE}
        above = [n for n, gap in gaps.items() if gap[0] > 0 and _beyond(gap)]
        below = [n for n, gap in gaps.items() if gap[0] < 0 and _beyond(gap)]
        parts.append(f"Better than `{BASELINE}` by more than {BEYOND:g} standard errors: {_list(above)};")
        parts.append(f"worse: {_list(below)}; not told from it: {_list([n for n in gaps if n not in above + below])}.")
    if biased and unbiased:
        gap = differences(runs[biased[0]], runs[unbiased[0]], figure)
        places = ", ".join(f"`{n}` {order.index(n) + 1}" for n in biased)
        parts.append(f"Places of the biased among {len(order)}: {places};")
        parts.append(f"the best of them is {_pm(*gap)} from the best unbiased.")
    return " ".join(parts)


def _beyond(gap: tuple[float, float]) -> bool:
    return abs(gap[0]) > BEYOND * gap[1]


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(label, names)) or "none"
