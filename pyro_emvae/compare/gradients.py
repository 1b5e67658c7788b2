r"""Estimators side by side on one model: bias, variance, cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._checks import EmvaeError, fail, message, positive_int
from .._registry import create
from ..loss import MonteCarloELBO
from ..parameters import Parameters, discover, keep_store
from ..particles import hold_batch, quiet
from .coordinates import choose
from .cost import check_equal, equalize
from .figures import assemble, exact_by_block, least_variance
from .replicates import Problem, draw_batch, minibatch_variance, sample, time_rows
from .result import GradientComparison
from .rows import Row, is_unbiased, make_row, specifications, warm_up

__all__ = ["compare_gradients", "measure"]


def compare_gradients(
    model: Callable,
    guide: Callable,
    *args: Any,
    estimators: Iterable[Any] | Mapping[str, Any] | None = None,
    num_replicates: int = 1000,
    num_particles: int = 2,
    equal: str | None = None,
    budget: float | None = None,
    reference: Mapping[str, Tensor] | None = None,
    objective: Any = "elbo",
    blocks: Any = None,
    max_coordinates: int = 20_000,
    memory: float | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> GradientComparison:
    r"""Estimate the same gradient with several estimators and compare bias, variance and cost.

    The gradient is that of the objective (maximised) by the unconstrained parameters, at their present values.

    Args:
        model, guide, args, kwargs: The problem.
        estimators: Rows: registered names, instances, mappings from site to these, or any `pyro.infer.ELBO`, run
            through its own ``loss_and_grads``; or a mapping from label to row. By default ``"score"``,
            ``"leave_one_out"`` (if K > 1), ``"pathwise"`` if every site allows it, and `Trace_ELBO`; of another
            objective than the ELBO, every registered unbiased estimator that fits. A row wins over the guide's
            annotations.
        num_replicates: R, independent replicates of each row. They are vectorized over the recorded gradient; a row
            that cannot be (a Pyro loss, a sampler without a batching rule) is looped and named.
        num_particles: K of the default rows and of those that are no instances of a loss.
        equal: ``"evaluations"`` or ``"milliseconds"``: what all rows are to spend alike. A row gets as many particles
            as the budget allows; one whose number of particles is part of what it estimates (an objective of several
            samples, a loss that was given) becomes the mean of as many independent gradients. It is counted in whole
            particles and gradients, so that a row may spend a little less than the budget, never more; what it spent
            is in the table. Milliseconds are those of an ordinary eager gradient, and differ from run to run.
        budget: What one gradient of each row may cost; by default what the dearest row costs with `num_particles`.
        reference: Exact gradient by parameter name. By default bias is the paired difference to the row of least
            variance that is unbiased for the objective, whose own bias is then not measured (NaN).
        objective: Objective of the rows.
        blocks: See `EM`.
        max_coordinates: Per block at most so many coordinates, drawn at random, are kept.
        memory: Bytes that one chunk of replicates may take; by default 15 million, which stay in a processor's cache,
            or a quarter of a GPU's free memory.
        seed: Seed of the forked generators.

    Returns:
        Per row and block: bias (norm of the mean difference), its z (the largest over coordinates; `bias_z_limit` is
        its 0.1 % point under no bias), variance (mean and largest over coordinates), signal-to-noise ratio, cosine
        between a single gradient and the reference (a reference row's mean without the replicate itself), E|g|^2,
        milliseconds of one ordinary eager gradient, model evaluations, variance x evaluations, variance x milliseconds
        and E|g|^2 x evaluations, by which Geffner and Domke choose an estimator. The same figures per guide site, as
        ``site_variance_mean`` and so on, are over the parameters that move the site's density or its draw; one that
        moves several counts at each.
        A signal-to-noise ratio below 3/sqrt(R) cannot be told from 0 (noise alone gives 0.8/sqrt(R)): that is warned of
        and printed. Without a reference (which is of the full data), one batch of a plate that
        subsamples is held, and a row ``minibatch`` says how much variance comes from the choice of the batch, which
        no estimator can remove.

    Parameters, buffers, ``.grad`` and generators are bit-for-bit as before.

    Raises:
        EmvaeError: There is no row, no parameter, or no row that can keep to the budget (if some can, the others are
            NaN, and the table says why); a reference that does not fit the parameters.

    Source: Mohamed et al. 2020, section 8, for the design; Rainforth et al. 2018 for the signal-to-noise ratio;
    Geffner and Domke 2020, "A rule for gradient estimator selection", for E|g|^2 x cost.

    Example:
        >>> import pyro
        >>> from pyro_emvae import problems
        >>> pyro.clear_param_store()
        >>> problem = problems.two_level()
        >>> table = compare_gradients(
        ...     problem.model, problem.guide, *problem.args, estimators=["score", "pathwise"], seed=0)
        >>> variance = table.dataset.variance_mean.sel(block="guide")
        >>> bool(variance.sel(estimator="score") > 5 * variance.sel(estimator="pathwise"))
        True
    """
    options = {"objective": objective, "blocks": blocks, "max_coordinates": max_coordinates, "memory": memory}
    options |= {"equal": equal, "budget": budget, "reference": reference, "seed": seed}
    rows = {"estimators": estimators, "num_replicates": num_replicates, "num_particles": num_particles}
    comparison = measure(model, guide, args, kwargs, **rows, **options)
    if weak := comparison.weak_signals():
        warnings.warn(_weak(weak, num_replicates), stacklevel=2)
    return comparison


def measure(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    estimators: Any,
    num_replicates: int,
    num_particles: int,
    equal: str | None,
    budget: float | None,
    reference: Any,
    objective: Any,
    blocks: Any,
    max_coordinates: int,
    memory: float | None,
    seed: int | None,
) -> GradientComparison:
    """Do what `compare_gradients` does, but do not warn; `reference` may be a function of the leaves."""
    positive_int("compare_gradients", "num_replicates", num_replicates, 2)
    positive_int("compare_gradients", "num_particles", num_particles)
    check_equal(equal, budget)
    with quiet(seed=seed):
        parameters = discover(model, guide, args, kwargs, blocks=blocks)
    _require_parameters(parameters)
    with quiet(seed=seed), keep_store():
        objective = create("objective", objective)
        specs = specifications(model, guide, args, kwargs, estimators, num_particles, objective)
        rows = [make_row(*spec, num_particles, objective) for spec in specs]
        batch = draw_batch(model, guide, args, kwargs) if reference is None else {}
        problem = Problem(model, guide, args, kwargs, parameters, choose(parameters, max_coordinates))
        exact = exact_by_block(
            reference(parameters.leaves()) if callable(reference) else reference, problem.coordinates
        )
        base = int(torch.randint(2**31, ()))
        with hold_batch(batch):
            limit = _run(rows, problem, objective, num_replicates, memory, base, equal, budget)
        best = least_variance(rows) or next(row for row in rows if not row.too_dear)
        minibatch = minibatch_variance(best, problem, num_replicates) if batch else None
    dataset = assemble(rows, problem.coordinates, parameters.moving, exact, minibatch, num_replicates)
    if equal:
        dataset.attrs |= {"equal": equal, "budget": limit}
    return GradientComparison(dataset, {row.name: row.looped for row in rows if row.looped})


def _run(rows: list[Row], problem: Problem, objective, num_replicates, memory, base, equal, budget) -> float | None:
    """Check, equalize, sample and time the rows."""
    for row in rows:
        warm_up(row, *problem.pair)
    limit = equalize(rows, problem, equal, budget) if equal else None
    rows = [row for row in rows if not row.too_dear]
    for row in rows:
        row.unbiased = is_unbiased(row, *problem.pair, objective)
        own = isinstance(row.loss, MonteCarloELBO)
        row.biased = own and not all(resolution.estimator.traits.unbiased for resolution in row.loss.table)
        sample(row, problem, num_replicates, memory, base)
    time_rows(rows, problem)
    return limit


def _weak(names: list[str], num_replicates: int) -> str:
    return message(
        "compare_gradients",
        "tell signals from noise",
        got=f"{', '.join(names)} below 3/sqrt(R) with R = {num_replicates}",
        because="noise alone gives a signal-to-noise ratio of 0.8/sqrt(R)",
        fix="Read no slope off these ratios; raise num_replicates if they matter.",
    )


def _require_parameters(parameters: Parameters) -> None:
    if not parameters.leaves():
        fail(
            EmvaeError,
            "compare_gradients",
            "compare gradients",
            got="a model and a guide without parameters",
            because="a gradient needs something to differentiate by",
            fix="Declare parameters with pyro.param.",
        )
