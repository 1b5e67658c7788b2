r"""Coordinate ascent over the factors of a mean-field posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._checks import StepError, fail
from .._pyro import scale_and_mask
from ..particles import Particles
from ._conjugacy import LEVELS
from ._factored import FactoredJoint, Nodes
from ._factors import DiscreteFactor, blend, tensors, toward, with_tensors
from ._families import Factor, GammaFactor, NormalFactor, NormalGammaFactor
from ._meetings import is_quadratic, meeting_dims
from ._natural import by_slopes, by_values, can_climb, is_sloped, least_nodes, nodes_of
from ._vectors import NormalWishartFactor, VectorFactor, WishartFactor

__all__ = ["Ascent", "Update", "paired"]

MOST_NODES = 4096
PAIRS = {(GammaFactor, NormalFactor), (WishartFactor, VectorFactor)}


@dataclass(frozen=True)
class Update:
    """How a factor is moved.

    Args:
        kind: ``"exact"``, or ``"natural_gradient"`` for normal factors, and others in which the model is not conjugate.
        rate: Length of a natural-gradient step.
        num_nodes: Nodes of a factor that is moved so.
    """

    kind: str = "exact"
    rate: float = 1.0
    num_nodes: int = 20


class Ascent:
    r"""The factors $q_j$ of one run of a model, and what moves each to its best given the others.

    $$\eta_j=\frac{1}{w_j}\,\partial_{E[t_j]}E_{-j}\Big[\sum_sw_s\log p_s(x,z)\Big],$$

    with sites s of scale $w_s$. Elements of a factor that meet in a site are moved one after the other.

    Args:
        joint: The model.
        factors: One for each latent, or pair of latents.
        update: How they are moved.
    """

    def __init__(self, joint: FactoredJoint, factors: Sequence[Factor], update: Update) -> None:
        self.joint, self.factors, self.update = joint, list(factors), update
        self.dims = [meeting_dims(joint, self.factors, i) for i in range(len(self.factors))]
        self.quadratic = [bool(d) and is_quadratic(joint, self.factors, i) for i, d in enumerate(self.dims)]
        self.climbs = [update.kind == "natural_gradient" and isinstance(f, NormalFactor) for f in self.factors]
        if update.kind == "natural_gradient":
            self.climbs = [climbs or self._has_to_climb(i) for i, climbs in enumerate(self.climbs)]

    def _has_to_climb(self, place: int) -> bool:
        """Whether no exact update is known of a factor, but a natural-gradient step is; found out once for a model."""
        factor = self.factors[place]
        key = ("climbs", self.joint.model, *factor.names)
        if key not in self.joint.known:
            fits = not can_climb(factor) or self.best(place, self.units(place)[0])[1] <= self._tolerance
            self.joint.known[key] = not fits
        return self.joint.known[key]

    def are_independent(self, places: Sequence[int]) -> bool:
        """Whether no two of some factors, or elements of them, meet in a site: one exact sweep is then their best."""
        place = {name: i for i, factor in enumerate(self.factors) for name in factor.names}
        alone = all(len({place[n] for n in latents} & set(places)) < 2 for latents in self.joint.reached.values())
        return alone and not any(self.dims[i] for i in places)

    # Nodes ----------------------------------------------------------------------------------------------------------

    def nodes(self, place: int, skip: int | None = None) -> Nodes:
        """Return nodes of a factor, for the expectation over all its elements, or all but those of one number."""
        factor = self.factors[place]
        batch = self.joint.shape(factor.names[0])
        if self.dims[place] and self.quadratic[place]:
            return self._signs(factor, place, skip)
        base = self._base(place, len(batch))
        return self._product(base, place, skip) if self.dims[place] else base

    def _base(self, place: int, batch_dims: int) -> Nodes:
        """Return nodes of each element by itself."""
        factor = self.factors[place]
        if isinstance(factor, DiscreteFactor):
            values, log_weights = factor.nodes()
            return Nodes(values, log_weights.exp())
        if self.climbs[place]:
            return Nodes(*self._climbing(place))
        values = factor.pair()
        count = len(next(iter(values.values())))
        like = next(iter(tensors(factor).values()))
        return Nodes(values, like.new_full((count, *(1,) * batch_dims), 1 / count))

    def _signs(self, factor: Factor, place: int, skip: int | None) -> Nodes:
        r"""Return $m\pm s$ with signs that are uncorrelated between elements; the mean alone if one is skipped."""
        shape = self._unit_shape(place)
        ones = [1] * len(factor.loc.shape)
        if skip is not None:
            return Nodes({factor.name: factor.loc[None]}, factor.loc.new_ones(1, *ones))
        signs = _hadamard(math.prod(shape)).to(factor.loc).reshape(-1, *shape)
        return Nodes(
            {factor.name: factor.loc + factor.scale * signs}, factor.loc.new_full((len(signs), *ones), 1 / len(signs))
        )

    def _product(self, base: Nodes, place: int, skip: int | None) -> Nodes:
        """Return all combinations of the elements' nodes; where one is skipped, its first node."""
        shape = self._unit_shape(place)
        units = [u for u in range(math.prod(shape)) if u != skip]
        count = len(base) ** len(units)
        if count > 4096:
            self.joint._refuse_rows([self.factors[place]], count)
        digits = torch.zeros(count, math.prod(shape), dtype=torch.long)
        for k, u in enumerate(units):
            digits[:, u] = torch.arange(count) // len(base) ** k % len(base)
        digits = digits.reshape(count, *shape)
        values = {name: _gather(x, digits) for name, x in base.values.items()}
        weights = _gather(base.weights.expand(len(base), *_joined(base.weights.shape[1:], shape)), digits)
        if skip is not None:
            weights = torch.where(self.mask(place, skip).to(weights.device), 1.0, weights)
        dims = self.dims[place]
        return Nodes(values, _prod(weights, dims))

    def _unit_shape(self, place: int) -> tuple[int, ...]:
        """Return the batch shape with the size of those plates only along which elements meet."""
        batch = self.joint.shape(self.factors[place].names[0])
        return tuple(n if d - len(batch) in self.dims[place] else 1 for d, n in enumerate(batch))

    def units(self, place: int) -> list[int | None]:
        """Return the numbers of the groups of elements that are moved one after the other; None: all at once."""
        return list(range(math.prod(self._unit_shape(place)))) if self.dims[place] else [None]

    def mask(self, place: int, unit: int | None) -> Tensor:
        """Return which elements belong to a group: broadcasts to the batch shape."""
        shape = self._unit_shape(place)
        return (torch.arange(math.prod(shape)) == unit).reshape(shape) if unit is not None else torch.tensor(True)

    # Updates --------------------------------------------------------------------------------------------------------

    def sweep(self, places: Sequence[int] | None = None, twice: bool = False) -> None:
        """Move each factor once; ``twice``: solve for it a second time about the first result, for precision."""
        for place in range(len(self.factors)) if places is None else places:
            self.move(place, twice=twice)

    def move(self, place: int, rate: float = 1.0, twice: bool = False) -> None:
        """Move one factor to its best given the others, or part of the way there."""
        for unit in self.units(place):
            if self.climbs[place]:
                self._climb(place, unit, rate * self.update.rate)
                continue
            old = self.factors[place]
            new, miss = self.best(place, unit)
            if self.update.kind == "natural_gradient" and not miss <= self._tolerance and can_climb(old):
                self.climbs[place] = self.joint.known[("climbs", self.joint.model, *old.names)] = True
                self._climb(place, unit, rate * self.update.rate)  # theta has moved to where it is not conjugate
                continue
            if not isinstance(old, DiscreteFactor):
                self._require_fit(new, miss)
                near = self._merge(place, unit, old, new)
                if twice and near.is_proper:
                    self.factors[place] = near
                    new, miss = self.best(place, unit)
                    self._require_fit(new, miss)
                    self.factors[place] = old
            self.factors[place] = self._merge(place, unit, old, blend(old, new, rate))
            if not self.factors[place].is_proper:
                self.factors[place] = old
                self._refuse(new, f"no proper {new.family} density", math.nan)

    def _climb(self, place: int, unit: int | None, rate: float) -> None:
        """Make a natural-gradient step, shorter where it would leave the family."""
        old = self.factors[place]
        values, weights = self._climbing(place)
        if is_sloped(old):
            eta = by_slopes(old, values[old.name], weights, self._slopes(place, unit, values)[old.name])
        else:
            eta = by_values(old, values[old.name], weights, self._values(place, unit, values))
        for _ in range(20):
            moved = self._merge(place, unit, old, toward(old, eta, rate))
            if moved.is_proper:
                self.factors[place] = moved
                return
            rate = 0.5 * rate
        self._refuse(old, f"no proper {old.family} density", math.nan)

    def _climbing(self, place: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return nodes and weights for a natural-gradient step."""
        factor = self.factors[place]
        if least_nodes(factor) > MOST_NODES:
            self.joint._refuse_rows([factor], least_nodes(factor))
        return nodes_of(factor, self.update.num_nodes)

    def _merge(self, place: int, unit: int | None, old: Factor, new: Factor) -> Factor:
        """Return the new factor at the elements of one group, the old one elsewhere."""
        if unit is None:
            return new
        mask, found = self.mask(place, unit), {}
        for name, x in tensors(new).items():
            before = tensors(old)[name]
            wide = mask.reshape(mask.shape + (1,) * (x.dim() - mask.dim())).to(x.device)
            found[name] = torch.where(wide, x, before)
        return with_tensors(new, found)

    def best(self, place: int, unit: int | None = None) -> tuple[Factor, float]:
        """Return the factor that is best given the others, and by how much its family misses the log joint."""
        factor = self.factors[place]
        if isinstance(factor, DiscreteFactor):
            logits = self._values(place, unit, factor.nodes()[0]).movedim(0, -1)
            return replace(factor, logits=logits.to(factor.logits.dtype)), 0.0
        values = self._levels(factor)
        slopes = self._slopes(place, unit, values)
        count = len(next(iter(values.values())))
        each = ([{n: x[t] for n, x in found.items()} for t in range(count)] for found in (values, slopes))
        new, miss = factor.fit(*each)
        inside = torch.ones_like(miss, dtype=torch.bool)
        if unit is not None:
            mask = self.mask(place, unit)
            inside = mask.reshape(*mask.shape, *(1,) * (miss.dim() - mask.dim())).expand(miss.shape)
        return new, float(torch.where(inside.to(miss.device), miss, 0.0).max())

    def _levels(self, factor: Factor) -> dict[str, Tensor]:
        """Return values at a few levels about the mean: ``(levels, *batch, *event)``."""
        if isinstance(factor, VectorFactor | WishartFactor | NormalWishartFactor):
            return factor.levels()
        levels, rows = torch.tensor(LEVELS, dtype=torch.float64), []
        for level in range(len(LEVELS)):
            noise = {}
            for order, name in enumerate(factor.names):
                like = self.joint.latents[name].value
                places = torch.randint(len(LEVELS), like.shape, generator=torch.Generator().manual_seed(order))
                jitter = torch.randn(like.shape, generator=torch.Generator().manual_seed(10 + level + 4 * order))
                noise[name] = (levels[(places + level) % len(LEVELS)] + 0.2 * jitter.double()).to(like)
            rows.append(factor.around(noise, wide=True))
        return {name: torch.stack([row[name] for row in rows]) for name in factor.names}

    def _others(self, place: int) -> tuple[list[str], dict[int, Nodes]]:
        """Return the sites that a factor moves, and nodes of the others that move them."""
        sites = self.joint.moved_by(self.factors[place].names)
        moving = frozenset().union(*(self.joint.reached[site] for site in sites))
        others = [i for i, f in enumerate(self.factors) if i != place and moving & set(f.names)]
        return sites, {i: self.nodes(i) for i in others}

    def _target(self, place: int, unit: int | None, levels: Mapping[str, Tensor]) -> tuple[Nodes, int]:
        """Return the levels of one group of elements with all combinations of the others', and how many those are."""
        count = len(next(iter(levels.values())))
        batch = self.joint.shape(self.factors[place].names[0])
        if unit is None:
            like = next(iter(levels.values()))
            kind = like.dtype if like.is_floating_point() else self.joint.dtype
            return Nodes(levels, torch.ones((count, *(1,) * len(batch)), dtype=kind, device=like.device)), 1
        rest, values = self.nodes(place, skip=unit), {}
        mask = self.mask(place, unit)
        for name, x in levels.items():
            wide = mask.reshape(mask.shape + (1,) * (x.dim() - 1 - mask.dim())).to(x.device)
            pairs = torch.where(wide, x[:, None], rest.values[name][None])
            values[name] = pairs.flatten(0, 1)
        return Nodes(values, rest.weights.repeat(count, *(1,) * (rest.weights.dim() - 1))), len(rest)

    @torch.enable_grad()
    def _slopes(self, place: int, unit: int | None, levels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the derivatives of the expected log joint at levels of a factor: ``(levels, *batch, *event)``."""
        leaves = {name: x.detach().clone().requires_grad_() for name, x in levels.items()}
        sites, nodes = self._others(place)
        nodes[place], _ = self._target(place, unit, leaves)
        found = {name: torch.zeros_like(x) for name, x in leaves.items()}

        def use(run: Particles, weighted: dict[str, Tensor], part: Tensor) -> None:
            total = sum(row.sum() for row in weighted.values())
            grads = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, materialize_grads=True)
            for name, grad in zip(leaves, grads, strict=True):
                if not bool(torch.isfinite(grad).all()):
                    self.joint.refuse_non_finite(run)
                found[name] += grad

        rows = self.joint.rows(self.factors, nodes, sites)
        self.joint.expect(self.factors, nodes, sites, rows, place, use)
        return {name: grad / self._scale(name, event=True) for name, grad in found.items()}

    @torch.no_grad()
    def _values(self, place: int, unit: int | None, levels: Mapping[str, Tensor]) -> Tensor:
        """Return the expected log joint at levels of a factor: ``(levels, *batch)``."""
        name, like = self.factors[place].names[0], next(iter(levels.values()))
        sites, nodes = self._others(place)
        nodes[place], rest = self._target(place, unit, levels)
        batch = self._padded(self.joint.shape(name))
        kept = batch if unit is None else self._padded(self._with_unit_dims_alone(place))
        log_p = torch.zeros(len(like), *kept, dtype=torch.float64, device=like.device)
        rows = self.joint.rows(self.factors, nodes, sites)

        def use(run: Particles, weighted: dict[str, Tensor], part: Tensor) -> None:
            level = (rows.digits[place][part] // rest).to(log_p.device)
            for row in weighted.values():
                dims = [d for d in range(1, row.dim()) if kept[d - 1] == 1 and row.shape[d] > 1]
                row = row.double().sum(dims, keepdim=True) if dims else row.double()
                log_p.index_add_(0, level, row.expand(len(row), *kept))
            if bool(torch.isnan(log_p).any()):
                self.joint.refuse_non_finite(run)

        self.joint.expect(self.factors, nodes, sites, rows, place, use)
        shape = self.joint.shape(name)
        own = tuple(kept[len(kept) - len(shape) :])
        return log_p.reshape(-1, *own).expand(-1, *shape) / self._scale(name)

    def _with_unit_dims_alone(self, place: int) -> tuple[int, ...]:
        batch = self.joint.shape(self.factors[place].names[0])
        return tuple(1 if d - len(batch) in self.dims[place] else n for d, n in enumerate(batch))

    def _padded(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (1,) * (self.joint.nesting - len(shape)) + tuple(shape)

    def _scale(self, name: str, event: bool = False) -> Any:
        site = self.joint.latents[name]
        if not isinstance(site.scale, Tensor):
            return site.scale
        return site.scale.reshape(site.scale.shape + (1,) * (site.fn.event_dim if event else 0))

    # Objective ------------------------------------------------------------------------------------------------------

    def expected_log_joint(self) -> Tensor:
        r"""Return $E_q[\log p_\theta(x,z)]$ at the present theta, to be differentiated by it: scalar, nats."""
        terms: list[Tensor] = []
        self._all_rows(lambda run, weighted, part: terms.append(sum(row.sum() for row in weighted.values())))
        return torch.stack(terms).sum()

    @torch.no_grad()
    def elbo(self) -> tuple[float, float]:
        r"""Return $E_q[\log p(x,z)-\log q(z)]$ with scales and masks, and how far rounding may move it, in nats."""
        terms: list[Tensor] = []

        def use(run: Particles, weighted: dict[str, Tensor], part: Tensor) -> None:
            found = [row.double() for row in weighted.values()]
            if not all(bool(torch.isfinite(row).all()) for row in found):
                self.joint.refuse_non_finite(run)
            terms.extend(found)

        self._all_rows(use)
        for factor in self.factors:
            for name in factor.names:
                site = self.joint.latents[name]
                terms.append(scale_and_mask(factor.entropy(name), site.scale, site.mask).double())
        size = sum(float(term.abs().sum()) for term in terms)
        return float(sum(term.sum() for term in terms)), torch.finfo(self.joint.dtype).eps * size

    def _all_rows(self, use: Callable[[Particles, dict[str, Tensor], Tensor], None]) -> None:
        nodes = {i: self.nodes(i) for i in range(len(self.factors))}
        sites = list(self.joint.sites)
        self.joint.expect(self.factors, nodes, sites, self.joint.rows(self.factors, nodes, sites), None, use)

    # Errors ---------------------------------------------------------------------------------------------------------

    @property
    def _tolerance(self) -> float:
        return torch.finfo(self.joint.dtype).eps ** 0.5

    def _require_fit(self, factor: Factor, miss: float) -> None:
        if not miss <= self._tolerance:
            self._refuse(factor, f"an expected log joint that is no log {factor.family} density", miss)

    def _refuse(self, factor: Factor, got: str, miss: float) -> None:
        fail(
            StepError,
            self.joint.obj,
            f"update the factor of {', '.join(map(repr, factor.names))}",
            got=f"{got} (its derivatives miss by {miss:.2g}, relatively)",
            because="an exact update needs a model that is conjugate in each latent given the others",
            fix='Write MeanField(update="natural_gradient"), for latents other than matrices, or use steps.Laplace(), '
            "steps.MonteCarlo() or a guide.",
        )


def paired(joint: FactoredJoint, factors: Sequence[Factor], update: Update) -> list[Factor]:
    """Join a precision and a mean into one Normal-Gamma or Normal-Wishart factor, where that is conjugate."""
    found = {name: f for f in factors for name in f.names}
    for name in joint.latents:
        near = [found[n] for n in joint.reached[name] - {name}]
        if len(near) != 1 or (type(near[0]), type(found[name])) not in PAIRS:
            continue
        first = near[0].name
        if joint.shape(first) != joint.shape(name):
            continue
        pair = _as_pair(near[0], found[name])
        key = ("pair", joint.model, first, name)
        if key not in joint.known:
            others = [f for f in _unique(found.values()) if not set(f.names) & {first, name}]
            ascent = Ascent(joint, [pair, *others], replace(update, kind="exact"))
            joint.known[key] = not ascent.dims[0] and ascent.best(0)[1] <= torch.finfo(joint.dtype).eps ** 0.5
        if joint.known[key]:
            found[first] = found[name] = pair
    return _unique(found.values())


def _as_pair(precision: Any, mean: Any) -> NormalGammaFactor | NormalWishartFactor:
    """Return the pair whose means, and deviation of the mean, are those of two factors."""
    if isinstance(mean, VectorFactor):
        expected = precision.df[..., None, None] * torch.linalg.inv(precision.inverse)
        spread = (mean.scale_tril * (expected @ mean.scale_tril)).sum((-2, -1))
        count = mean.loc.shape[-1] / spread
        return NormalWishartFactor(precision.name, mean.name, precision.df, precision.inverse, mean.loc, count)
    tau = precision.a / precision.b
    count = (tau * mean.scale.square()).reciprocal()
    return NormalGammaFactor(precision.name, mean.name, precision.a, precision.b, mean.loc, count)


def _unique(factors: Any) -> list[Factor]:
    return list({id(factor): factor for factor in factors}.values())


def _hadamard(columns: int) -> Tensor:
    """Return signs ``(R, columns)`` whose columns are uncorrelated and of mean zero."""
    matrix = torch.ones(1, 1)
    while len(matrix) < columns + 1:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix[:, 1 : columns + 1]


def _gather(x: Tensor, digits: Tensor) -> Tensor:
    """Return for each row and group of elements its node: ``(rows, ...)``."""
    wide = digits.reshape(digits.shape + (1,) * (x.dim() - digits.dim())).to(x.device)
    return x.gather(0, wide.expand(len(wide), *x.shape[1:]))


def _joined(shape: Sequence[int], units: Sequence[int]) -> torch.Size:
    return torch.broadcast_shapes(tuple(shape), tuple(units))


def _prod(x: Tensor, dims: Sequence[int]) -> Tensor:
    for dim in dims:
        x = x.prod(dim, keepdim=True)
    return x
