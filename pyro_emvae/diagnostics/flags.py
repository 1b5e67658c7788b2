r"""What can be wrong with a model before it is fitted: one function each; `CHECKS` lists them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer import TraceGraph_ELBO
from torch import Tensor, nn

from .._checks import EmvaeError, NonFiniteError, nearest
from ..loss import MonteCarloELBO
from ..parameters import Row
from ..particles import Particles, Site, quiet
from .arviz import own_masks

__all__ = ["CHECKS", "Case", "Flag"]

REPLICATES = 20
DATA_SIZE = re.compile(
    r"n|size|total|(n|num)_?(data|obs|observations|total|samples|train|rows|examples|points|items|documents|cells)"
    r"|(data|dataset|full|total|train|population)_?(size|len|length)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Flag:
    """Something that is wrong, where, and the line that mends it."""

    kind: str
    where: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"[{self.kind}] {self.where}: {self.message}. {self.fix}"


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


def attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return what `function` returns, or the error: the code that is looked at may be broken in any way."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def lenient(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """As `attempt`, but if it fails, once more without validation, which lets a NaN pass up to its site."""
    result, error = attempt(function)
    if error is not None:
        with quiet(validate=False):
            result, _ = attempt(function)
    return result, error


def named_arguments(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    function = model.forward if isinstance(model, nn.Module) else model
    bound, _ = attempt(lambda: inspect.signature(function).bind(*args, **kwargs))
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


def plate_of(frame: Any) -> str:
    if int(frame.size) < 0:
        return f"{frame.name}[?]"
    part = f"{frame.size} of {frame.full_size}" if _full(frame) != int(frame.size) else f"{frame.size}"
    return f"{frame.name}[{part}]"


def _full(frame: Any) -> int:
    return int(frame.size if frame.full_size is None else frame.full_size)


def scale_of(site: Site) -> str:
    scale = site.scale
    if isinstance(scale, Tensor) and scale.numel() != 1:
        return f"{float(scale.min()):.4g} to {float(scale.max()):.4g}"
    return f"{float(scale):.4g}"


def mask_of(site: Site) -> str:
    kept = _kept(site)
    return "" if bool(kept.all()) or site.is_deterministic else f"{int(kept.sum())} of {kept.numel()}"


def _kept(site: Site) -> Tensor:
    """Return which elements neither a handler nor the distribution masks."""
    masks = [torch.as_tensor(m).bool() for m in (site.mask, *own_masks(site.fn)) if m is not None]
    ones = torch.ones(site.fn.batch_shape, dtype=torch.bool, device=masks[0].device if masks else None)
    return torch.stack(torch.broadcast_tensors(ones, *masks)).all(0)


def run_flag(error: Exception) -> Flag:
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
        pairs = {"scale": (scale_of, lambda s: torch.as_tensor(s.scale)), "mask": (mask_of, _kept)}
        for kind, (text, tensor) in pairs.items():
            if not _same(tensor(site), tensor(other)):
                one, two = (text(s) or "none" for s in (site, other))
                message = f"{kind} {one} in the model, {two} in the guide: log p - log q is no bound"
                message = message if one != two else f"{kind} {one}, of other elements in the guide than in the model"
                yield Flag("scale", name, message, f"Enter pyro.poutine.{kind}({kind}=...) around it in both.")


def _same(one: Tensor, two: Tensor) -> bool:
    equal, _ = attempt(lambda: bool(torch.isclose(one.double(), two.double()).all()))
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


def refused(case: Case, kinds: set[str]) -> list[Flag]:
    """What Pyro's validation or the loss refused and no check explains."""
    if case.error is not None and "non_finite" not in kinds:
        return [run_flag(case.error)]
    if kinds & {"unmatched_site", "non_finite", "annotation", "batch_dims"}:
        return []
    ours = dict.fromkeys(_parts(error) for error in case.refusals if isinstance(error, EmvaeError))
    flags = [Flag("loss", type(case.loss).__name__, refused, fix) for refused, fix in ours]
    return flags or [run_flag(error) for error in case.refusals[:1]]


CHECKS = (unmatched_sites, non_finite, plate_sizes, scales, batch_dims, vectorization, annotations, gradients)
