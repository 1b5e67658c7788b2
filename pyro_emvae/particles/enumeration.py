r"""Discrete sites summed out: enumerated by Pyro, contracted in the model, averaged under q in the guide."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from opt_einsum import get_symbol
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from torch import Tensor

from .._checks import EstimatorError, ModelError, fail
from .._distributions import base_of
from .._pyro import EnumMessenger, scale_and_mask
from .handlers import is_subsample
from .sites import Site

__all__ = ["MAX_OUTCOMES", "Average", "Enumerate", "averaged", "is_annotated", "marginalized", "num_outcomes"]

MAX_OUTCOMES = 100_000
Sites = dict[str, Site]


class Enumerate(EnumMessenger):
    r"""Enumerate the sites that are wanted, each in a tensor dim left of all plates.

    Args:
        wanted: Which messages.
        keep: Number of dims that are plates, or the particles.
        go_on: Whether to go on from where the guide's enumeration ended.

    Source: Obermeyer et al. 2019, "Tensor variable elimination for plated factor graphs"; Pyro's ``EnumMessenger``.
    Differs: a site that is not wanted is drawn, whatever its annotation says, and too large an enumeration is refused.
    """

    def __init__(self, wanted: Callable[[dict], bool], keep: int, go_on: bool = False) -> None:
        super().__init__(None if go_on else -1 - keep)
        self.wanted, self.keep, self.go_on = wanted, keep, go_on
        self.found: list[str] = []

    def __enter__(self) -> Enumerate:
        super().__enter__()
        self._markov_depths = defaultdict(lambda: -1)  # of sites that came before all enumeration
        return self

    @property
    def _idle(self) -> bool:
        """Whether there is no enumeration yet, so that no dims have to be followed."""
        return not (self.found or self.go_on)

    def _pyro_sample(self, msg: dict) -> None:
        if msg["done"] or msg["is_observed"] or is_subsample(msg):
            if not self._idle:
                super()._pyro_sample(msg)
            return
        wanted = self.wanted(msg)
        if self._idle and not wanted:
            return
        infer = dict(msg["infer"] or {})
        if wanted:
            _check_size(msg, self.keep)
            msg["infer"] = infer | {"enumerate": "parallel"}
            self.found.append(msg["name"])
            super()._pyro_sample(msg)
            return
        kept = {"enumerate": infer.pop("enumerate")} if "enumerate" in infer else {}
        msg["infer"] = infer
        super()._pyro_sample(msg)
        msg["infer"].update(kept)

    def _pyro_post_sample(self, msg: dict) -> None:
        if not self._idle:
            super()._pyro_post_sample(msg)


def is_annotated(infer: Mapping[str, Any] | None) -> bool:
    """Whether a site says that it is to be summed out."""
    return (infer or {}).get("enumerate") == "parallel"


def num_outcomes(fn: Any) -> int | None:
    """Return how many values an element of a distribution's plates has; None if it has no finite support."""
    inner, events = base_of(fn), fn.event_shape.numel()
    if not inner.has_enumerate_support:
        return None
    try:
        count = len(inner.enumerate_support(expand=False))
    except NotImplementedError:  # a Binomial whose counts differ
        return None
    return count ** (events // max(1, inner.event_shape.numel()))


def _check_size(msg: dict, keep: int) -> None:
    fn, name, count = msg["fn"], msg["name"], num_outcomes(msg["fn"])
    before = math.prod(fn.batch_shape[: max(0, len(fn.batch_shape) - keep)])
    if count is None:
        got, because = f"{type(fn).__name__}{tuple(fn.shape())}", "a sum needs a finite support, the same everywhere"
    elif not fn.has_enumerate_support:
        got = f"an event of several elements, which has {_large(count)} outcomes"
        because = "the outcomes of one event are summed together, and those of a plate's elements one by one"
    elif count * before > MAX_OUTCOMES:
        got = f"{_large(count)} outcomes" + (f" times {before} of what it depends on" if before > 1 else "")
        because = f"the model is evaluated at each of them, at most {MAX_OUTCOMES:,}"
    else:
        return
    fail(
        EstimatorError,
        "enumerated",
        f"sum over site {name!r}",
        got=got,
        because=because,
        fix=f'Use estimator={{"{name}": "leave_one_out"}} at the guide\'s site, or a plate in place of .to_event().',
    )


def _large(count: int) -> str:
    return f"{count:,}" if count < 10**12 else f"about 10^{int(math.log10(count))}"


@dataclass(frozen=True)
class Average:
    r"""The expectation under the enumerated sites of the guide, given those that were drawn.

    $$E[c]=\sum_{z_1}q(z_1)\cdots\sum_{z_n}q(z_n|z_{<n})\,c(z),$$

    summed from the last site to the first, so that a chain costs no more than its longest table.

    Args:
        sites: Per site its name, its enumeration dim, its log q by outcome, and its plates; in order of execution.
        keep: Number of dims that are no enumeration: plates, and the particles if vectorized.
    """

    sites: tuple[tuple[str, int, Tensor, tuple], ...]
    keep: int

    @classmethod
    def of(cls, sites: Iterable[Site], keep: int) -> Average:
        """Return the expectation under enumerated sites of the guide, in order of execution."""
        return cls(tuple((s.name, s.infer["_enumerate_dim"], s.log_prob, s.frames) for s in sites), keep)

    def __call__(self, tensor: Tensor, frames: Iterable, where: str) -> Tensor:
        """Average a tensor over the outcomes that its leading dims are of.

        Raises:
            EstimatorError: It lies outside a plate of a site: what depends on all elements of a plate at once needs the
                sum over all their outcomes together.
        """
        for name, dim, log_q, own in reversed(self.sites):
            if tensor.dim() < -dim or tensor.shape[dim] == 1:
                continue
            missing = [frame.name for frame in own if frame not in set(frames)]
            if missing:
                _refuse_outside(name, where, missing[0])
            q = log_q.exp()
            tensor = (torch.where(q > 0, tensor, 0.0) * q).sum(dim, keepdim=True)
        return tensor.reshape(tensor.shape[max(0, tensor.dim() - self.keep) :])


def _refuse_outside(name: str, where: str, plate: str) -> None:
    fail(
        EstimatorError,
        "enumerated",
        f"sum over site {name!r}",
        got=f"{where}, which depends on it and lies outside plate {plate!r}",
        because="the elements of a plate are summed one by one",
        fix=f'Use estimator={{"{name}": "leave_one_out"}}.',
    )


def averaged(sites: Sites, side: str, average: Average) -> Sites:
    """Replace the densities of one side by their expectations under the enumerated sites of the guide."""
    result = {}
    for name, site in sites.items():
        where = f"the {side}'s site {name!r}"
        outcomes, scale, mask = site.log_prob, site.scale, site.mask
        if any(isinstance(x, Tensor) and x.dim() > average.keep for x in (scale, mask)):
            outcomes, scale, mask = scale_and_mask(outcomes, scale, mask), 1.0, None
        log_prob = average(outcomes, site.frames, where)
        mean = partial(average, frames=site.frames, where=where)
        result[name] = replace(site, log_prob=log_prob, scale=scale, mask=mask, outcomes=outcomes, average=mean)
    return result


def marginalized(sites: Sites, latents: Iterable[str], keep: int, nesting: int) -> Sites:
    r"""Sum enumerated latents out of the model: each group of sites becomes one, log p of what is left.

    The latents' part of the joint is contracted to one density per component, in the plates that the whole component
    shares. It takes the name of the component's last observed site in those plates, or of its last latent there; the
    other latents that the guide draws stay, with a density of one.

    Raises:
        ModelError: The sites of a component differ in scale, or their plates are no tree.

    Source: `TraceEnum_ELBO`; Obermeyer et al. 2019.
    """
    latents = list(latents)
    ids = {sites[name].infer["_dim_to_id"][sites[name].infer["_enumerate_dim"]]: name for name in latents}
    symbols: dict[Any, str] = {}
    places: dict[str, int] = {}
    touched: dict[str, Tensor] = {}
    tree: OrderedDict = OrderedDict()
    for name, site in sites.items():
        dims = {dim: ("outcome", i) for dim, i in site.infer.get("_dim_to_id", {}).items()}
        shape = site.log_prob.shape
        mine = [i for dim, (_, i) in dims.items() if len(shape) >= -dim and shape[dim] > 1 and i in ids]
        if name not in latents and not mine:
            continue
        if site.is_deterministic:
            touched[name] = site.log_prob
            continue
        for latent in (ids[i] for i in mine):
            missing = [frame.name for frame in sites[latent].frames if frame not in set(site.frames)]
            if missing:
                _refuse_outside(latent, f"the model's site {name!r}", missing[0])
        dims |= {frame.dim: ("plate", frame.name) for frame in site.frames}
        dims |= {-keep: ("particles", "")} if keep > nesting else {}
        names = {dim: symbols.setdefault(key, get_symbol(len(symbols))) for dim, key in dims.items()}
        places |= {symbol: dim for dim, symbol in names.items()}
        touched[name] = _packed(site, names, masked=name not in latents)
        plates = frozenset(s for key, s in symbols.items() if key[0] == "plate" and s in names.values())
        tree.setdefault(plates | ({names[-keep]} if keep > nesting else frozenset()), []).append(name)
    _check_scales([sites[name] for group in tree.values() for name in group])
    summed = {symbols["outcome", i] for i in ids if ("outcome", i) in symbols}
    try:
        factors = OrderedDict((plates, [touched[name] for name in group]) for plates, group in tree.items())
        found = contract_tensor_tree(factors, summed)
    except NotImplementedError as cause:
        _refuse_plates(latents, cause)
    return _replaced(sites, touched, tree, _unpacked(found, places), latents, keep)


def _packed(site: Site, names: Mapping[int, str], masked: bool) -> Tensor:
    """Name the dims of a density; one of a latent that is summed out is kept where it is masked, and sums to one."""
    log_prob = scale_and_mask(site.log_prob, 1.0, site.mask) if masked else site.log_prob
    try:
        return packed.pack(log_prob[...], names)
    except ValueError as cause:
        fail(
            ModelError,
            "model",
            f"sum out the latents at site {site.name!r}",
            got=f"a density of shape {tuple(log_prob.shape)} in the plates {[f.name for f in site.frames]}",
            because="every batch dim belongs to a plate",
            fix="Write .to_event(1) at its distribution, or put it into a pyro.plate.",
            cause=cause,
        )


def _unpacked(found: Mapping, places: Mapping[str, int]) -> dict[frozenset, Tensor]:
    return {plates: sum(packed.unpack(term, places) for term in terms) for plates, terms in found.items()}


def _replaced(sites: Sites, touched: Mapping, tree: Mapping, found: Mapping, latents: list[str], keep: int) -> Sites:
    """Put each marginal density in the place of the site whose name it takes; drawn latents stay, with none left."""
    named = {}
    for plates, log_prob in found.items():
        group = tree[plates]
        rest = [name for name in group if name not in latents]
        last = next((name for name in reversed(rest) if sites[name].is_observed), (rest or group)[-1])
        named[last] = log_prob
    result = {}
    for name, site in sites.items():
        infer = {**site.infer, "summed_out": tuple(latents)}
        if name in named:
            observed = site.is_observed or name in latents
            result[name] = replace(site, log_prob=named[name], mask=None, infer=infer, is_observed=observed)
        elif name not in touched:
            result[name] = site
        elif name not in latents and not site.is_observed:
            shape = site.log_prob.shape
            zeros = site.log_prob.new_zeros(shape[max(0, len(shape) - keep) :])
            result[name] = replace(site, log_prob=zeros, mask=None, infer=infer)
    return result


def _check_scales(sites: list[Site]) -> None:
    scales = [site.scale for site in sites]
    wide = next((s for s in sites if isinstance(s.scale, Tensor) and s.scale.numel() > 1), None)
    if wide is None and len({float(scale) for scale in scales}) <= 1:
        return
    got = (
        f"scales {sorted({float(s) for s in scales})} at the sites {[site.name for site in sites]}"
        if wide is None
        else f"a scale of shape {tuple(wide.scale.shape)} at site {wide.name!r}"
    )
    fail(
        ModelError,
        "model",
        "sum out enumerated latents",
        got=got,
        because="a scale multiplies the logarithm of a sum, and is one number for all its terms",
        fix="Give whole data, or put the latents into the plate that subsamples; use poutine.mask for a scale of 0.",
    )


def _refuse_plates(latents: list[str], cause: BaseException) -> None:
    fail(
        ModelError,
        "model",
        f"sum out the latents {latents}",
        got="plates of which neither contains the other",
        because="sums and products over them cannot be exchanged",
        fix='Draw one of them in the guide, with estimator="leave_one_out".',
        cause=cause,
    )
