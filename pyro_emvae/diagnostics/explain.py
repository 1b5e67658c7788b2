r"""`explain`: look before fitting: sites, plates, scales, estimators, parameters, and what is wrong.

What can be wrong is looked for in `flags`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import EmvaeError, fail, require_data
from ..engine import gradient
from ..estimators import POLICIES, Pathwise, Situation
from ..evidence.soundness import entangled_site, mask_of, scale_of, unpaired_auxiliaries
from ..loss import MonteCarloELBO
from ..parameters import Row, discover
from ..particles import ModuleWatch, Particles, Site, draw, hold_batch, quiet, vectorizable
from .flags import (
    CHECKS,
    REPLICATES,
    Case,
    Flag,
    attempt,
    lenient,
    named_arguments,
    plate_of,
    refused,
    run_flag,
    silent,
)

__all__ = ["Explanation", "Flag", "ParameterRow", "SiteRow", "explain"]


@dataclass(frozen=True)
class SiteRow:
    """One site: role, plates, shape, scale, mask; and if the guide draws it, its estimator, why, and what it costs."""

    site: str
    role: str
    plates: tuple[str, ...]
    shape: tuple[int, ...]
    scale: str
    mask: str
    estimator: str = ""
    why: str = ""
    cost: str = ""


@dataclass(frozen=True)
class ParameterRow:
    """One parameter: its block, the norm of its mean gradient, and that over the gradient's standard deviation."""

    parameter: str
    block: str
    shape: tuple[int, ...]
    gradient_norm: float
    snr: float
    why: str


@dataclass(frozen=True, repr=False)
class Explanation:
    """What `explain` found; it prints as tables."""

    sites: tuple[SiteRow, ...]
    parameters: tuple[ParameterRow, ...]
    flags: tuple[Flag, ...]

    def __str__(self) -> str:
        names = ("site", "role", "plates", "shape", "scale", "mask", "estimator", "why", "cost")
        blocks = [_table(names, [[_cell(getattr(row, name)) for name in names] for row in self.sites])]
        names = ("parameter", "block", "shape", "gradient_norm", "snr", "why")
        blocks.append(_table(names, [[_cell(getattr(row, name)) for name in names] for row in self.parameters]))
        blocks.append("\n".join(f"! {flag}" for flag in self.flags) or "No flags.")
        return "\n\n".join(blocks)

    __repr__ = __str__


def explain(
    model: Callable, guide: Callable, *args: Any, loss: Any = None, seed: int | None = None, **kwargs: Any
) -> Explanation:
    r"""Look at model and guide without training.

    Args:
        model, guide: Pyro callables.
        args, kwargs: The data, one batch.
        loss: The loss of the planned fit, `MonteCarloELBO` or one of Pyro's; by default ``MonteCarloELBO()``.
        seed: Seed of the draws; None goes on from the generators' present state, and leaves them there.

    Returns:
        ``.sites`` (plates, shape, scale, mask, estimator and why), ``.parameters`` (block, norm of the mean gradient
        over 20 replicates, and signal-to-noise $\|\bar g\|/\sqrt{\sum_i\mathrm{var}\,g_i}$ of one gradient, the noise
        of $\bar g$ subtracted, 0 if nothing is left) and ``.flags``:

        * ``run``: model or guide raises an error, or the data are empty;
        * ``unmatched_site``: a latent in one of model and guide only, or not the same value in both;
        * ``non_finite``: the first site, or a gradient, that is NaN or infinite;
        * ``plate_size``: a plate with data has the size of the batch and no scale while the data are larger, that is:
          the size is the first dim of a tensor argument, and another tensor argument has a larger first dim, or an
          integer argument with a name such as ``num_data`` is larger;
        * ``scale``: scale or mask of a latent differ between model and guide;
        * ``auxiliary``: an auxiliary guide site from which no latent is computed;
        * ``entangled``: a site's density at one element of a plate moves with another element's latents;
        * ``support``: the guide cannot draw values that the prior draws;
        * ``plate_name``: a latent's plate has another name in the guide;
        * ``batch_dims``: a site has batch dims that belong to no plate;
        * ``vectorize``: particles cannot be vectorized, and the site that shows it;
        * ``annotation``: a baseline or estimator annotation that the loss ignores;
        * ``no_gradient``: a parameter that nothing depends on, or whose gradient is zero in all replicates; a module
          that is used but not registered;
        * ``loss``: the loss refuses model and guide for another reason.

    Nothing is trained or changed; modules run in eval mode. Parameters that do not exist yet are made, as the first
    step of a fit would make them.

    Example:
        >>> from pyro_emvae.diagnostics import explain
        >>> from pyro_emvae.problems import subsampled
        >>> problem = subsampled()
        >>> result = explain(problem.model, problem.guide, *problem.args, seed=0)
        >>> [(row.site, row.plates, row.scale) for row in result.sites]
        [('z', (), '1'), ('x', ('data[2 of 5]',), '2.5')]
        >>> [(row.parameter, row.block) for row in result.parameters], result.flags
        ([('loc', 'guide'), ('scale', 'guide'), ('prior_mean', 'model')], ())
    """
    loss = _scratch(MonteCarloELBO() if loss is None else loss)
    _, empty = attempt(lambda: require_data("explain", args, kwargs))
    if empty is not None:
        return Explanation((), (), (run_flag(empty),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows, discovery = lenient(lambda: discover(model, guide, args, kwargs).rows)
        with quiet(seed=seed, train=False):
            with ModuleWatch() as watch, torch.no_grad():
                particles, error = lenient(lambda: draw(model, guide, args, kwargs))
            if particles is None:
                return Explanation((), (), (run_flag(error),))
            vectorizes, _ = attempt(lambda: vectorizable(model, guide, args, kwargs))
            moments, refusal = attempt(lambda: _replicates(model, guide, loss, args, kwargs, rows or ()))
            balanced, _ = attempt(lambda: _balanced(model, guide, loss, args, kwargs, rows or (), moments or {}))
            unpaired, _ = attempt(lambda: list(unpaired_auxiliaries(model, guide, args, kwargs)))
            entangled = _entangled(model, guide, args, kwargs, particles)
            drawn = [site for site in particles.guide.values() if not site.is_observed]
            choices = {site.name: attempt(lambda site=site: _choose(loss, site)) for site in drawn}
    case = Case(
        arguments=named_arguments(model, args, kwargs),
        loss=loss,
        particles=particles,
        rows=rows,
        moments=moments or {},
        estimators={name: choice for name, (choice, _) in choices.items() if choice},
        vectorizes=vectorizes or (True, 0, ""),
        called=tuple(watch.saved),
        error=error,
        refusals=tuple(e for e in (*(e for _, e in choices.values()), refusal, discovery) if e is not None),
        unpaired=unpaired or (),
        entangled=entangled,
        balanced=balanced or (),
    )
    flags = [flag for check in CHECKS for flag in check(case)]
    flags += refused(case, {flag.kind for flag in flags})
    return Explanation(_site_rows(case), _parameter_rows(case), tuple(flags))


# Looking ------------------------------------------------------------------------------------------------------------


def _scratch(loss: Any) -> Any:
    """Return a copy of the loss that resolves estimators anew and keeps its state to itself."""
    if not hasattr(loss, "loss_and_grads"):
        fail(
            EmvaeError,
            "explain",
            "look at the loss",
            got=type(loss).__name__,
            because="a loss is an instance of MonteCarloELBO or of one of Pyro's ELBOs",
            fix="Write loss=MonteCarloELBO().",
        )
    if not isinstance(loss, MonteCarloELBO):
        return copy.copy(loss)
    state, loss = loss.state_dict(), loss.fresh()
    loss.load_state_dict(state)
    return loss


def _choose(loss: Any, site: Site) -> tuple[Any, str]:
    if isinstance(loss, MonteCarloELBO):
        estimator = loss.resolve(site.name, site.fn, site.infer, None, site.frames)
        return estimator, next(row.why for row in loss.table if row.site == site.name)
    estimator, why = POLICIES["pyro"](Situation(site.name, site.fn, getattr(loss, "num_particles", 1)))
    return estimator, f"{type(loss).__name__}: {why}"


def _entangled(model, guide, args, kwargs, particles: Particles) -> dict[str, str]:
    """Return the plates of latents whose elements depend on each other, with the site that shows it."""
    frames = {frame.name: frame for site in particles.latents.values() for frame in site.frames}
    with hold_batch(particles.subsample):
        found = {n: entangled_site(model, guide, args, kwargs, (f,)) for n, f in frames.items() if int(f.size) != 1}
    return {name: site for name, site in found.items() if site is not None}


def _replicates(model, guide, loss, args, kwargs, rows: Sequence[Row]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and variance of each parameter's gradient over replicates, by Welford's recursion.

    The state of estimators runs along, as in a fit.
    """
    only = {row.name: row.leaf for row in rows}
    moments = {n: [torch.zeros_like(leaf, dtype=torch.float64) for _ in range(2)] for n, leaf in only.items()}
    for k in range(1, REPLICATES + 1):
        result = gradient(model, guide, loss, args, kwargs, only=only)
        if result.state is not None:
            loss.state = result.state
        grads = result.grads
        for name, (mean, squares) in moments.items():
            grad = grads[name].detach().double() if name in grads else torch.zeros_like(mean)
            delta = grad - mean
            mean += delta / k
            squares += delta * (grad - mean)
    return {name: (mean, squares / (REPLICATES - 1)) for name, (mean, squares) in moments.items()}


def _balanced(model, guide, loss, args, kwargs, rows: Sequence[Row], moments: Mapping) -> set[str]:
    """Return parameters whose gradient is zero here and not cut: of a KL in closed form, where guide and prior agree.

    With draws in place of the closed form, they have one.
    """
    integrated = [row.site for row in getattr(loss, "table", ()) if row.estimator.integrates]
    zero = silent(moments)
    if not (zero and integrated):
        return set()
    other = loss.fresh()
    other.resolver.by_site = {**loss.resolved, **dict.fromkeys(integrated, Pathwise())}
    return zero - silent(_replicates(model, guide, other, args, kwargs, rows))


# Tables -------------------------------------------------------------------------------------------------------------


def _site_rows(case: Case) -> tuple[SiteRow, ...]:
    guide, model = case.particles.guide, case.particles.model
    rows = []
    for name in dict.fromkeys([*guide, *model]):
        both = [run[name] for run in (model, guide) if name in run]
        scales = list(dict.fromkeys(scale_of(site) for site in both))
        masks = list(dict.fromkeys(mask_of(site) for site in both))
        estimator, why = case.estimators.get(name, ("", ""))
        rows.append(
            SiteRow(
                name,
                _role(name, case.particles),
                tuple(map(plate_of, both[0].frames)),
                tuple(both[0].value.shape),
                " / ".join(scales),
                " / ".join(masks),
                _short(estimator),
                why,
                _cost(case, name) if name in case.estimators else "",
            )
        )
    return tuple(rows)


def _role(name: str, particles: Particles) -> str:
    site = particles.model.get(name)
    if site is None:
        return "auxiliary" if particles.guide[name].infer.get("is_auxiliary") else "guide only"
    if site.is_deterministic:
        return "deterministic"
    if site.is_observed:
        return "factor" if site.infer.get("is_auxiliary") else "data"
    return "latent" if name in particles.guide else "model only"


def _short(estimator: Any) -> str:
    if isinstance(estimator, str):
        return estimator
    default, _ = attempt(lambda: type(estimator)())
    if default is None or not is_dataclass(estimator):
        return type(estimator).__name__ if estimator == default else repr(estimator)
    values = {f.name: getattr(estimator, f.name) for f in fields(estimator) if f.init and f.repr}
    given = ", ".join(f"{name}={value!r}" for name, value in values.items() if value != getattr(default, name))
    return f"{type(estimator).__name__}({given})" if given else type(estimator).__name__


def _cost(case: Case, name: str) -> str:
    """Return how many model evaluations a gradient is: particles, outcomes that are summed over, further values."""
    number = getattr(case.loss, "num_particles", 1)
    rows = case.loss.table if isinstance(case.loss, MonteCarloELBO) else ()
    count = max([number, *(row.cost for row in rows if row.site == name)])
    vectorized = getattr(case.loss, "vectorize_particles", None) is not False and case.vectorizes[0]
    how = "" if number == 1 else ", vectorized" if vectorized else ", one by one"
    return f"{count} model run{'s' * (count > 1)}{how}"


def _parameter_rows(case: Case) -> tuple[ParameterRow, ...]:
    rows = []
    for row in case.rows or ():
        mean, variance = case.moments.get(row.name, (torch.full((), torch.nan),) * 2)
        noise = float(variance.sum())
        signal = max(float(mean.square().sum()) - noise / REPLICATES, 0.0)
        snr = (signal / noise) ** 0.5 if noise > 0 else float("inf") if signal > 0 else float("nan")
        rows.append(ParameterRow(row.name, row.block, tuple(row.leaf.shape), float(mean.norm()), snr, row.why))
    return tuple(rows)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else value


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    lines = [names, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
