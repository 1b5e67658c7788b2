r"""What can be wrong with a model before it is fitted: one function each; `CHECKS` lists them."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO
from torch import Tensor, nn

from .._checks import EmvaeError, NonFiniteError, nearest, tensors_in
from ..estimators.base import is_point_mass
from ..evidence.soundness import Unsound, unequal_handlers
from ..loss import MonteCarloELBO
from ..parameters import Row
from ..particles import Particles, Site, quiet

__all__ = ["CHECKS", "Case", "Flag"]

REPLICATES = 20
PRIOR_VALUES = 2000  # numbers drawn from a prior, to see whether the guide's support holds them
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
    unpaired: Sequence[Unsound] = ()
    entangled: Mapping[str, str] = field(default_factory=dict)
    balanced: Collection[str] = ()


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
            fix = f"Rename it ({near}), or add it to the model; infer={{'is_auxiliary': True}} is for a site that a "
            fix += "Delta site of a latent is computed from."
            yield Flag("unmatched_site", name, "the guide draws it, the model has no such site", fix)
        elif model[name].is_observed:
            yield Flag("unmatched_site", name, "the guide draws it, the model observes it", "Delete it from the guide.")
        elif model[name].fn.event_dim != site.fn.event_dim:
            got = f"event_dim is {site.fn.event_dim} in the guide and {model[name].fn.event_dim} in the model"
            yield Flag("unmatched_site", name, got, "Write the same .to_event(...) in both.")
    for name in case.particles.latents:
        if name in guide:
            continue
        message = "a latent of the model that the guide does not draw"
        fix = f"Add pyro.sample({name!r}, ...) to the guide"
        yield Flag("unmatched_site", name, message, f"{fix}, or obs= to the model.")
    summed = {name for site in model.values() for name in site.infer.get("summed_out", ())}
    for name in () if isinstance(case.loss, TraceEnum_ELBO | MonteCarloELBO) else sorted(summed):
        message = (
            f'{type(case.loss).__name__} does not sum out infer={{"enumerate": ...}}, and the guide does not draw it'
        )
        fix = f"Write loss=MonteCarloELBO(), or TraceEnum_ELBO(). Or: Add pyro.sample({name!r}, ...) to the guide."
        yield Flag("unmatched_site", name, message, fix)


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
    spoilt = [n for n, a in case.arguments.items() if not all(bool(t.isfinite().all()) for t in tensors_in(a))]
    if "value at the model" in where:
        fix = "Mask what is missing: dist.mask(x.isfinite()), obs=x.nan_to_num()."
    elif "at the guide" in where and spoilt:
        where += f", and argument {spoilt[0]!r} holds NaN or infinity"
        fix = f"Give the guide {spoilt[0]}.nan_to_num(), and mask what is missing in the model: dist.mask(...)."
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
    for site, message, fix in unequal_handlers(case.particles):
        yield Flag("scale", site, message, fix)


def auxiliaries(case: Case) -> Iterator[Flag]:
    """An auxiliary guide site that no latent is computed from."""
    for site, message, fix in case.unpaired:
        yield Flag("auxiliary", site, message, fix)


def entangled(case: Case) -> Iterator[Flag]:
    """A plate whose elements depend on each other's latents."""
    for plate, site in case.entangled.items() if not list(unmatched_sites(case)) else ():
        message = f"its density at one element of plate {plate!r} moves with another's latents: importance weights "
        message += "per datum and estimators that keep plates apart are wrong"
        fix = f"Make what interacts one event, .to_event(1) in place of plate {plate!r}, in model and guide."
        yield Flag("entangled", site, message, fix)


def supports(case: Case) -> Iterator[Flag]:
    """A guide site that cannot draw what the model's prior draws."""
    for name, site, other in _both(case):
        outside, _ = attempt(lambda site=site, other=other: _outside(site, other))
        if outside is not None and outside.numel():
            supports = f"{other.fn.support} in the guide and {site.fn.support} in the model"
            message = f"the support is {supports}: the guide never draws values such as {float(outside[0]):.3g}"
            fix = "Draw it on the model's support, from dist.Normal, or dist.LogNormal for positive values."
            yield Flag("support", name, message, fix)


def _outside(site: Site, other: Site) -> Tensor:
    """Return values of the prior that lie outside of the guide's support."""
    with quiet():
        values = site.fn.sample((max(1, PRIOR_VALUES // max(1, math.prod(site.fn.shape()))),))
    inside = other.fn.support.check(values)
    outside = values[~inside].flatten()
    return outside[outside.isfinite()]


def plate_names(case: Case) -> Iterator[Flag]:
    """A latent that lies in plates of other names in the guide than in the model."""
    for name, site, other in _both(case):
        guide = {frame.dim: frame.name for frame in other.frames}
        for frame in site.frames:
            if guide.get(frame.dim, frame.name) != frame.name:
                message = f"plate {frame.name!r} in the model, {guide[frame.dim]!r} in the guide"
                message += ": costs cannot be kept apart by plates, and the score function's variance grows"
                yield Flag("plate_name", name, message, f'Write pyro.plate("{frame.name}", ...) in the guide too.')


def _both(case: Case) -> list[tuple[str, Site, Site]]:
    """Return latents with their sites in model and guide, without point masses, of one event dim."""
    guide = case.particles.guide
    pairs = [(name, site, guide[name]) for name, site in case.particles.latents.items() if name in guide]
    return [(n, s, o) for n, s, o in pairs if not is_point_mass(o.fn) and s.fn.event_dim == o.fn.event_dim]


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


def _is_summed(loss: MonteCarloELBO, site: Site) -> bool:
    return loss.resolve(site.name, site.fn, site.infer, None, site.frames).traits.draws == "enumerated"


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
        if ours and "enumerate" in site.infer and not _is_summed(case.loss, site):
            fix = f'Write estimator={{"{name}": "enumerated"}}, or delete it: the site is drawn.'
            yield Flag("annotation", name, f'{kind} ignores infer={{"enumerate": ...}}', fix)
        if "estimator" in site.infer and not (ours and case.loss.annotations):
            fix = f'Write loss=MonteCarloELBO(estimator={{"{name}": ...}}).'
            yield Flag("annotation", name, f'{kind} ignores infer={{"estimator": ...}}', fix)
    for name in case.particles.ignored:
        message = 'infer={"estimator": ...} stands in the model, but the guide makes the draws'
        yield Flag("annotation", name, message, f"Move it to the guide's pyro.sample({name!r}, ...).")


def silent(moments: Mapping[str, tuple[Tensor, Tensor]]) -> set[str]:
    """Return the parameters whose gradient is zero in all replicates."""
    return {name for name, both in moments.items() if not any(bool(m.any()) for m in both)}


def gradients(case: Case) -> Iterator[Flag]:
    """Parameters that cannot learn."""
    for row in case.rows or ():
        if row.block == "unused":
            fix = "Use it, or delete its pyro.param or module."
            yield Flag("no_gradient", row.name, "neither log q nor log p depends on it", fix)
        elif row.name in silent(case.moments) and row.name not in case.balanced:
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


CHECKS = (
    unmatched_sites,
    non_finite,
    plate_sizes,
    scales,
    auxiliaries,
    entangled,
    supports,
    plate_names,
    batch_dims,
    vectorization,
    annotations,
    gradients,
)
