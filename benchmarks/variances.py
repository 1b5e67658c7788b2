r"""Gradient variances of Bayesian logistic regression along training, against a reference made by hand."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import pyro
import torch

import pyro_emvae as emvae
from pyro_emvae import problems

from . import breast_cancer
from .page import markdown, registered

ROWS = ("score", "leave_one_out", "pathwise", "measure_valued")
PARTICLES = {"leave_one_out": 100}  # of many particles the mean of the others is the mean, as in the reference
REPLICATES = {"leave_one_out": 2_000}
LIMIT = 0.15
BLOCKS = {"loc": "guide", "log_scale": "model"}  # one block each, so that the table has rows for both
TEXT = """Bayesian logistic regression on the breast cancer data as in Mohamed et al. 2020, section 8: the variance of
one sample's gradient, mean over the 31 coordinates, at four steps of their training. The reference is a loop by hand,
`{command}`: {samples:,} samples ({fewer:,} of `measure_valued`), the KL in closed form and no part of the learning
signal. The estimators' rows are `sweep_gradients` at the reference's parameters with `elbo_analytic_kl`, variance times
particles. Each has to be within {limit:.0%}.

At step {step}, for the means: the score function has {score:.0f} times the variance of pathwise gradients, a
leave-one-out baseline divides it by {baseline:.0f}, and measure-valued gradients have
{measured:.2f} times that of pathwise ones, for four evaluations per coordinate."""


def reference() -> dict[str, Any]:
    """Return what `breast_cancer` wrote."""
    return json.loads(breast_cancer.PATH.read_text(encoding="utf-8"))


def measure(replicates: int = 20_000, rows: tuple[str, ...] = ROWS) -> dict[tuple[str, str, str], float]:
    """Return the variance of one sample's gradient by estimator, step and parameter, of those that are registered."""
    made, found = reference(), {}
    to_tensor = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    stages = {s: {n: to_tensor(at[n]) for n in BLOCKS} for s, at in made["stages"].items()}
    for name in registered("estimator", rows):
        problem, particles = problems.logistic_regression(), PARTICLES.get(name, 1)
        pyro.clear_param_store()
        data = emvae.sweep_gradients(
            problem.model,
            problem.guide,
            *problem.args,
            estimators=[name],
            num_particles=particles,
            num_replicates=min(replicates, REPLICATES.get(name, replicates)),
            stages=stages,
            objective="elbo_analytic_kl",
            blocks=BLOCKS,
        )
        for step in stages:
            for parameter, block in BLOCKS.items():
                cell = data.variance_mean.sel(stage=step, block=block, estimator=name)
                found[name, step, parameter] = particles * float(cell)
    return found


def section(quick: bool = False) -> str:
    """Return the section's text and table."""
    made = reference()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured = measure(500 if quick else 20_000)
    lines = []
    for step, stage in made["stages"].items():
        for i, parameter in enumerate(BLOCKS):
            for name in ROWS:
                exact, got = stage["variance"][name][i], measured.get((name, step, parameter), math.nan)
                ratio = got / exact
                ok = "not registered" if math.isnan(got) else "yes" if abs(ratio - 1) <= LIMIT else "**no**"
                figures = ("", "") if math.isnan(got) else (f"{got:.4g}", f"{ratio:.3f}")
                lines.append((step, parameter, f"`{name}`", f"{exact:.4g}", *figures, ok))
    head = ("step", "parameter", "estimator", "reference", "measured", "ratio", "within 15 %")
    return f"{_text(made)}\n\n{markdown(head, lines)}"


def _text(made: dict[str, Any]) -> str:
    step = max(made["stages"], key=int)
    last = {name: loc for name, (loc, _) in made["stages"][step]["variance"].items()}
    return TEXT.format(
        samples=made["samples"],
        fewer=made["samples of measure_valued"],
        command=made["command"],
        limit=LIMIT,
        step=step,
        score=last["score"] / last["pathwise"],
        baseline=last["score"] / last["leave_one_out"],
        measured=last["measure_valued"] / last["pathwise"],
    )
