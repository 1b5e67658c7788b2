r"""`explain`: look before fitting: sites, plates, scales, estimators, parameters, and what is wrong.

Each thing that can be wrong is one function at the end of this file that yields its flags; `CHECKS` lists them.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer import TraceGraph_ELBO
from torch import Tensor, nn

from .._checks import EmvaeError, NonFiniteError, fail, nearest
from ..engine import gradient
from ..estimators import POLICIES
from ..loss import MonteCarloELBO
from ..parameters import Row, discover
from ..particles import ModuleWatch, Particles, Site, draw, quiet, vectorizable
from .arviz import own_masks

__all__ = ["Explanation", "Flag", "ParameterRow", "SiteRow", "explain"]

REPLICATES = 20
DATA_SIZE = re.compile(
    r"n|size|total|(n|num)_?(data|obs|observations|total|samples|train|rows|examples|points|items|documents|cells)"
    r"|(data|dataset|full|total|train|population)_?(size|len|length)",
    re.IGNORECASE,
)


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


@dataclass(frozen=True)
class Flag:
    """Something that is wrong, where, and the line that mends it."""

    kind: str
    where: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"[{self.kind}] {self.where}: {self.message}. {self.fix}"


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

        * ``run``: model or guide raises an error;
        * ``unmatched_site``: a latent in one of model and guide only, or not the same value in both;
        * ``non_finite``: the first site, or a gradient, that is NaN or infinite;
        * ``plate_size``: a plate with data has the size of the batch and no scale while the data are larger, that is:
          the size is the first dim of a tensor argument, and another tensor argument has a larger first dim, or an
          integer argument with a name such as ``num_data`` is larger;
        * ``scale``: scale or mask of a latent differ between model and guide;
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows, discovery = _lenient(lambda: discover(model, guide, args, kwargs).rows)
        with quiet(seed=seed, train=False):
            with ModuleWatch() as watch, torch.no_grad():
                particles, error = _lenient(lambda: draw(model, guide, args, kwargs))
            if particles is None:
                return Explanation((), (), (_run_flag(error),))
            vectorizes, _ = _attempt(lambda: vectorizable(model, guide, args, kwargs))
            moments, refusal = _attempt(lambda: _replicates(model, guide, loss, args, kwargs, rows or ()))
            drawn = [site for site in particles.guide.values() if not site.is_observed]
            choices = {site.name: _attempt(lambda site=site: _choose(loss, site)) for site in drawn}
    case = Case(
        arguments=_named_arguments(model, args, kwargs),
        loss=loss,
        particles=particles,
        rows=rows,
        moments=moments or {},
        estimators={name: choice for name, (choice, _) in choices.items() if choice},
        vectorizes=vectorizes or (True, 0, ""),
        called=tuple(watch.saved),
        error=error,
        refusals=tuple(e for e in (*(e for _, e in choices.values()), refusal, discovery) if e is not None),
    )
    flags = [flag for check in CHECKS for flag in check(case)]
    flags += _refused(case, {flag.kind for flag in flags})
    return Explanation(_site_rows(case), _parameter_rows(case), tuple(flags))


@dataclass(frozen=True)
class Case:
    """What the checks look at."""

    arguments: Mapping[str, Any] = field(repr=False)
    loss: Any
    particles: Particles = field(repr=False)
    rows: Sequence[Row] | None
    moments: Mapping[str, tuple[Tensor, Tensor]] = field(repr=False)
    estimators: Mapping[str, tuple[Any, str]]
    vectorizes: tuple[bool, int, str]
    called: Sequence[nn.Module] = field(repr=False)
    error: Exception | None
    refusals: Sequence[Exception]


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


def _attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return what `function` returns, or the error: the code that is looked at may be broken in any way."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def _lenient(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """As `_attempt`, but if it fails, once more without validation, which lets a NaN pass up to its site."""
    result, error = _attempt(function)
    if error is not None:
        with quiet(validate=False):
            result, _ = _attempt(function)
    return result, error


def _choose(loss: Any, site: Site) -> tuple[Any, str]:
    if isinstance(loss, MonteCarloELBO):
        estimator = loss.resolve(site.name, site.fn, site.infer)
        return estimator, next(row.why for row in loss.table if row.site == site.name)
    estimator, why = POLICIES["pyro"](site.fn, getattr(loss, "num_particles", 1))
    return estimator, f"{type(loss).__name__}: {why}"


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


def _named_arguments(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    function = model.forward if isinstance(model, nn.Module) else model
    bound, _ = _attempt(lambda: inspect.signature(function).bind(*args, **kwargs))
    if bound is None:
        return {f"argument {i}": a for i, a in enumerate(args)} | dict(kwargs)
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}[{i}]": a for i, a in enumerate(value)}
        else:
            named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return named


# Tables -------------------------------------------------------------------------------------------------------------


def _site_rows(case: Case) -> tuple[SiteRow, ...]:
    guide, model = case.particles.guide, case.particles.model
    rows = []
    for name in dict.fromkeys([*guide, *model]):
        both = [run[name] for run in (model, guide) if name in run]
        scales = list(dict.fromkeys(_scale(site) for site in both))
        masks = list(dict.fromkeys(_mask(site) for site in both))
        estimator, why = case.estimators.get(name, ("", ""))
        rows.append(
            SiteRow(
                name,
                _role(name, case.particles),
                tuple(map(_plate, both[0].frames)),
                tuple(both[0].value.shape),
                " / ".join(scales),
                " / ".join(masks),
                _short(estimator),
                why,
                _cost(case) if name in case.estimators else "",
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


def _plate(frame: Any) -> str:
    if int(frame.size) < 0:
        return f"{frame.name}[?]"
    part = f"{frame.size} of {frame.full_size}" if _full(frame) != int(frame.size) else f"{frame.size}"
    return f"{frame.name}[{part}]"


def _full(frame: Any) -> int:
    return int(frame.size if frame.full_size is None else frame.full_size)


def _scale(site: Site) -> str:
    scale = site.scale
    if isinstance(scale, Tensor) and scale.numel() != 1:
        return f"{float(scale.min()):.4g} to {float(scale.max()):.4g}"
    return f"{float(scale):.4g}"


def _mask(site: Site) -> str:
    kept = _kept(site)
    return "" if bool(kept.all()) or site.is_deterministic else f"{int(kept.sum())} of {kept.numel()}"


def _kept(site: Site) -> Tensor:
    """Return which elements neither a handler nor the distribution masks."""
    masks = [torch.as_tensor(m).bool() for m in (site.mask, *own_masks(site.fn)) if m is not None]
    ones = torch.ones(site.fn.batch_shape, dtype=torch.bool, device=masks[0].device if masks else None)
    return torch.stack(torch.broadcast_tensors(ones, *masks)).all(0)


def _short(estimator: Any) -> str:
    if isinstance(estimator, str):
        return estimator
    default, _ = _attempt(lambda: type(estimator)())
    return type(estimator).__name__ if estimator == default else repr(estimator)


def _cost(case: Case) -> str:
    number = getattr(case.loss, "num_particles", 1)
    if number == 1:
        return "1 model run"
    vectorized = getattr(case.loss, "vectorize_particles", None) is not False and case.vectorizes[0]
    return f"{number} model runs, {'vectorized' if vectorized else 'one by one'}"


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


# What can be wrong --------------------------------------------------------------------------------------------------


def _run_flag(error: Exception) -> Flag:
    refused, fix = _parts(error)
    return Flag("run", "model or guide", refused, fix or "Run guide(*args), then model(*args), alone.")


def _parts(error: Exception) -> tuple[str, str]:
    """Return what an error says, and its last sentence if it is one of ours, which mends it."""
    text = " ".join(str(error).split()).rstrip(".")
    if not isinstance(error, EmvaeError):
        return f"{type(error).__name__}: {text}", ""
    refused, _, reason = text.partition(". This is because ")
    because, _, fix = reason.partition(". ")
    return f"{refused}: {because}", f"{fix}."


def unmatched_sites(case: Case) -> Iterator[Flag]:
    """A latent in one of the two only, or with another event shape, or observed in the model."""
    guide, model = case.particles.guide, case.particles.model
    drawn = {n: s for n, s in guide.items() if not s.is_observed and not s.infer.get("is_auxiliary")}
    for name, site in drawn.items():
        if name not in model:
            near = nearest(name, case.particles.latents)
            fix = f"Rename it ({near}), add it to the model, or write infer={{'is_auxiliary': True}}."
            yield Flag("unmatched_site", name, "the guide draws it, the model has no such site", fix)
        elif model[name].is_observed:
            yield Flag("unmatched_site", name, "the guide draws it, the model observes it", "Delete it from the guide.")
        elif model[name].fn.event_dim != site.fn.event_dim:
            got = f"event_dim is {site.fn.event_dim} in the guide and {model[name].fn.event_dim} in the model"
            yield Flag("unmatched_site", name, got, "Write the same .to_event(...) in both.")
    for name in case.particles.latents:
        if name not in guide:
            fix = f"Add pyro.sample({name!r}, ...) to the guide, or obs= to the model."
            yield Flag("unmatched_site", name, "a latent of the model that the guide does not draw", fix)


def non_finite(case: Case) -> Iterator[Flag]:
    """The first site whose value or density is NaN or infinite, or the first such gradient."""
    where = case.particles.first_non_finite()
    if where is None:
        for error in case.refusals:
            if isinstance(error, NonFiniteError):
                fix = "Look for sqrt, log or / at zero on its way to a site."
                yield Flag("non_finite", "gradient", _parts(error)[0], fix)
                return
        return
    name = where.split("site ")[-1].strip("'")
    if "value at the model" in where:
        fix = "Mask what is missing: dist.mask(x.isfinite()), obs=x.nan_to_num()."
    elif "value" in where:
        fix = "Start its parameters at finite values inside their constraints: pyro.param(..., constraint=...)."
    else:
        fix = "Let its value lie in the support, and keep its scale above zero: constraint=constraints.positive."
    yield Flag("non_finite", name, where, fix)


def plate_sizes(case: Case) -> Iterator[Flag]:
    """A plate that holds data, is as large as the batch and has no scale, while the data are larger."""
    tensors = {n: len(a) for n, a in case.arguments.items() if isinstance(a, Tensor) and a.dim()}
    counts = {n: a for n, a in case.arguments.items() if type(a) is int and DATA_SIZE.fullmatch(n)}
    for frame in {f.name: f for site in case.particles.observed.values() for f in site.frames}.values():
        size = int(frame.size)
        if _full(frame) != size or size not in tensors.values():
            continue
        larger = [(n, f"len({n})", m) for n, m in tensors.items() if m > size]
        larger += [(n, n, m) for n, m in counts.items() if m > size]
        if larger:
            name, length, number = larger[-1]
            message = f"its size is {size}, the batch's, but {name!r} speaks of {number} data"
            message += f": what is outside the plate counts {number / size:.3g} times too much"
            fix = f'Write pyro.plate("{frame.name}", {length}, subsample_size={size}) in model and guide.'
            yield Flag("plate_size", frame.name, message, fix)


def scales(case: Case) -> Iterator[Flag]:
    """A latent whose scale or mask is not the same in model and guide."""
    for name, site in case.particles.latents.items():
        other = case.particles.guide.get(name)
        if other is None:
            continue
        pairs = {"scale": (_scale, lambda s: torch.as_tensor(s.scale)), "mask": (_mask, _kept)}
        for kind, (text, tensor) in pairs.items():
            if not _same(tensor(site), tensor(other)):
                one, two = (text(s) or "none" for s in (site, other))
                message = f"{kind} {one} in the model, {two} in the guide: log p - log q is no bound"
                message = message if one != two else f"{kind} {one}, of other elements in the guide than in the model"
                yield Flag("scale", name, message, f"Enter pyro.poutine.{kind}({kind}=...) around it in both.")


def _same(one: Tensor, two: Tensor) -> bool:
    equal, _ = _attempt(lambda: bool(torch.isclose(one.double(), two.double()).all()))
    return bool(equal)


def batch_dims(case: Case) -> Iterator[Flag]:
    """A site with batch dims that are no plate's."""
    for name, site in (case.particles.model | case.particles.guide).items():
        plates, shape = {frame.dim for frame in site.frames}, tuple(site.fn.batch_shape)
        if not site.is_observed and any(n != 1 and i - len(shape) not in plates for i, n in enumerate(shape)):
            message = f"batch shape {shape}, of which plates declare {len(plates)} dims"
            yield Flag("batch_dims", name, message, "Write .to_event(1), or put it into a pyro.plate.")


def vectorization(case: Case) -> Iterator[Flag]:
    """Two particles vectorized are not the same two run one by one."""
    agrees, _, what = case.vectorizes
    if not agrees and not list(unmatched_sites(case)):
        site = re.search(r"site '([^']*)'", what)
        message = f"particles cannot be vectorized: {what}" + (" differs" if site else "")
        fix = "Index from the right (z.mean(-1), not z.mean()), or write vectorize_particles=False."
        yield Flag("vectorize", site.group(1) if site else "model or guide", message, fix)


def annotations(case: Case) -> Iterator[Flag]:
    """Annotations that the loss does not read."""
    ours, kind = isinstance(case.loss, MonteCarloELBO), type(case.loss).__name__
    for name, site in case.particles.guide.items():
        if "baseline" in site.infer and (site.fn.has_rsample or not isinstance(case.loss, TraceGraph_ELBO)):
            if site.fn.has_rsample:
                fix = "Delete it: the site has rsample and needs no baseline."
            elif ours:
                fix = 'Write infer={"estimator": "decaying_average"}.'
            else:
                fix = f'Write loss=MonteCarloELBO(estimator={{"{name}": "decaying_average"}}), or TraceGraph_ELBO().'
            yield Flag("annotation", name, f'{kind} ignores infer={{"baseline": ...}} here', fix)
        if "estimator" in site.infer and not (ours and case.loss.annotations):
            fix = f'Write loss=MonteCarloELBO(estimator={{"{name}": ...}}).'
            yield Flag("annotation", name, f'{kind} ignores infer={{"estimator": ...}}', fix)
    for name in case.particles.ignored:
        message = 'infer={"estimator": ...} stands in the model, but the guide makes the draws'
        yield Flag("annotation", name, message, f"Move it to the guide's pyro.sample({name!r}, ...).")


def gradients(case: Case) -> Iterator[Flag]:
    """Parameters that cannot learn."""
    for row in case.rows or ():
        if row.block == "unused":
            fix = "Use it, or delete its pyro.param or module."
            yield Flag("no_gradient", row.name, "neither log q nor log p depends on it", fix)
        elif row.name in case.moments and not any(bool(m.any()) for m in case.moments[row.name]):
            fix = "Look for .detach(), torch.no_grad() or an empty mask between it and its sites."
            if not isinstance(case.loss, MonteCarloELBO):
                fix += " loss=MonteCarloELBO() gives a gradient to sites without rsample."
            yield Flag("no_gradient", row.name, f"its gradient is zero in all {REPLICATES} replicates", fix)
    known = {id(row.leaf) for row in case.rows or ()}
    for module in case.called if case.rows is not None else ():
        strange = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad and id(p) not in known]
        if strange:
            name = type(module).__name__
            message = f"{', '.join(strange)} of a module that is used but not registered: no optimizer sees it"
            yield Flag("no_gradient", name, message, 'Write pyro.module("name", module) where it is used.')


def _refused(case: Case, kinds: set[str]) -> list[Flag]:
    """What Pyro's validation or the loss refused and no check explains."""
    if case.error is not None and "non_finite" not in kinds:
        return [_run_flag(case.error)]
    if kinds & {"unmatched_site", "non_finite", "annotation"}:
        return []
    ours = dict.fromkeys(_parts(error) for error in case.refusals if isinstance(error, EmvaeError))
    flags = [Flag("loss", type(case.loss).__name__, refused, fix) for refused, fix in ours]
    return flags or [_run_flag(error) for error in case.refusals[:1]]


CHECKS = (unmatched_sites, non_finite, plate_sizes, scales, batch_dims, vectorization, annotations, gradients)
