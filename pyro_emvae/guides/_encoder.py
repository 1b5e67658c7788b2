r"""The encoder that a guide makes when it is given none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ._observed import Observed, refuse_change

__all__ = ["DefaultEncoder", "Served"]

WIDTH = 128


@dataclass(frozen=True)
class Served:
    r"""A latent that an encoder serves.

    Args:
        plates: The plates that it lies in, the data plate first, the others by their dims.
        sizes: Their sizes when first seen.
        columns: Columns of one value.
    """

    plates: tuple[str, ...]
    sizes: tuple[int, ...]
    columns: int


@dataclass(frozen=True)
class _Level:
    """The plates of one network, the observed sites that it reads, its latents' columns, and the levels around it."""

    plates: tuple[str, ...]
    reads: tuple[Observed, ...]
    sites: Mapping[str, int]
    parents: tuple[int, ...]


class DefaultEncoder(nn.Module):
    r"""Two layers of 128 SiLU units over the observed values of a datum.

    Event dims are flattened. Real values are shifted and scaled by their mean and standard deviation over the first
    data, one number each per site. Counts x of a datum with total t become $\log(1+x\,\bar t/t)$ and
    $\log\frac{1+t}{1+\bar t}$, with $\bar t$ the mean total of the first data; categories become one-hot. A missing
    value is 0, and the mask is appended.

    With nested plates there is one such network per level. An outer one reads the mean of the hidden units of its
    members, an inner one is given the hidden units of what it belongs to: members of a plate are exchangeable to it.
    A plate inside the data plate that has latents only, or observed values only, is flattened like event dims.

    Args:
        observed: The observed sites, in the model's order.
        served: The latents, by name.
        first: The first data, by site: value ``(*plates, *event)`` and mask or None.

    Shape: by site, value ``(*batch, *event)`` and mask -> by latent, ``(*plates, columns)`` with the data plate first.

    Raises:
        ModelError: At a call: another number of columns than before.

    Source: for counts and their library size, Lopez et al. 2018, "Deep generative modeling for single-cell
    transcriptomics". Differs: counts are divided by the size, which is an input of its own.
    """

    def __init__(
        self,
        observed: Sequence[Observed],
        served: Mapping[str, Served],
        first: Mapping[str, tuple[Tensor, Tensor | None]],
    ) -> None:
        super().__init__()
        self.observed, self.served = tuple(observed), dict(served)
        self.levels = _levels(self.observed, self.served)
        values = [value for value, _ in first.values()]
        self.register_buffer("numbers", torch.zeros((), device=values[0].device))
        dtype = next((v.dtype for v in values if v.is_floating_point()), torch.get_default_dtype())
        options = {"device": values[0].device, "dtype": dtype}
        numbers = [_numbers(o, *_flat(o, *first[o.name], self._level(o))) for o in self.observed]
        self.numbers = torch.stack(numbers).to(**options)
        self.widths = tuple(sum(self._columns(o, *first[o.name]).shape[-1] for o in v.reads) for v in self.levels)
        self.bodies, self.mixers, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, level in enumerate(self.levels):
            inputs = self.widths[i] + WIDTH * len(self._children(i))
            self.bodies.append(_layers(inputs, [WIDTH, WIDTH], options) if inputs else nn.Identity())
            above = WIDTH * (len(level.parents) + bool(inputs))
            self.mixers.append(_layers(above, [WIDTH], options) if level.parents else nn.Identity())
            columns = sum(level.sites.values())
            self.heads.append(nn.Linear(WIDTH, columns, **options) if columns else nn.Identity())

    def forward(self, observed: Mapping[str, tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
        hidden: dict[int, Tensor] = {}
        for i in reversed(range(len(self.levels))):
            inputs = self._inputs(i, observed, hidden)
            if inputs is not None:
                hidden[i] = self.bodies[i](inputs)
        result = {}
        for i, level in enumerate(self.levels):
            if level.parents:
                parts = [_lift(hidden[j], self.levels[j].plates, level.plates) for j in level.parents]
                parts += [hidden[i]] if i in hidden else []
                shape = torch.broadcast_shapes(*(part.shape for part in parts))
                hidden[i] = self.mixers[i](torch.cat([part.expand(shape) for part in parts], -1))
            if level.sites:
                columns = self.heads[i](hidden[i]).split(list(level.sites.values()), -1)
                for name, own in zip(level.sites, columns, strict=True):
                    result[name] = self._spread(name, own, level)
        return result

    def _spread(self, name: str, columns: Tensor, level: _Level) -> Tensor:
        """Return a latent's columns with the plates spelled out that were flattened."""
        site = self.served[name]
        if site.plates == level.plates:
            return columns
        inner = [plate for plate in site.plates if plate not in level.plates]
        sizes = [site.sizes[site.plates.index(plate)] for plate in inner]
        columns = columns.reshape(*columns.shape[:-1], *sizes, site.columns)
        order = [(*level.plates, *inner).index(plate) for plate in site.plates]
        return columns.permute(*order, columns.dim() - 1)

    def _children(self, i: int) -> list[int]:
        """Return the levels directly inside a level that read something."""
        inner = [j for j, level in enumerate(self.levels) if i in level.parents]
        return [j for j in inner if self.levels[j].reads or self._children(j)]

    def _level(self, site: Observed) -> _Level:
        return next(level for level in self.levels if site in level.reads)

    def _inputs(self, i: int, observed: Mapping, hidden: Mapping[int, Tensor]) -> Tensor | None:
        level = self.levels[i]
        inputs = [self._columns(o, *observed[o.name]) for o in level.reads]
        for j in self._children(i):
            members = [d for d, name in enumerate(self.levels[j].plates) if name not in level.plates]
            inputs.append(hidden[j].mean(members))
        if not inputs:
            return None
        result = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        expected = self.bodies[i][0].in_features
        if result.shape[-1] != expected:
            refuse_change(level.reads[0].name, f"{result.shape[-1]} columns, {expected} before")
        return result

    def _columns(self, site: Observed, value: Tensor, mask: Tensor | None) -> Tensor:
        """Return a site's columns: ``(*level plates, columns)``."""
        if (mask is not None) != site.is_masked:
            refuse_change(site.name, "a mask" if mask is not None else "no mask")
        if (value.dtype, value.device) != (site.dtype, self.numbers.device):
            refuse_change(site.name, f"{value.dtype} on {value.device}, {site.dtype} on {self.numbers.device} before")
        flat, there = _flat(site, value, mask, self._level(site))
        columns = _features(site, flat, there, self.numbers[self.observed.index(site)])
        return columns if there is None else torch.cat([columns, there.to(columns.dtype)], -1)

    def extra_repr(self) -> str:
        reads = ", ".join(f"{o.name!r} ({o.kind}{', mask' if o.is_masked else ''})" for o in self.observed)
        return f"reads {reads}: {' + '.join(map(str, self.widths))} columns"


def _layers(inputs: int, widths: Iterable[int], options: Mapping) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width, **options), nn.SiLU()]
        inputs = width
    return nn.Sequential(*layers)


def _levels(observed: Sequence[Observed], served: Mapping[str, Served]) -> tuple[_Level, ...]:
    """Return the levels, outer ones first. Plates make levels if both latents and observed values lie in them."""
    data = next(iter(served.values())).plates[0]
    shared = {p for site in served.values() for p in site.plates} & {p for o in observed for p in o.plates} | {data}
    dims = {name: dim for o in observed for name, dim in o.plates.items()}
    places = {o.name: frozenset(o.plates) & shared for o in observed}
    places |= {name: frozenset(site.plates) & shared for name, site in served.items()}
    result: list[_Level] = []
    for key in sorted({frozenset([data]), *places.values()}, key=lambda key: (len(key), sorted(key))):
        plates = (data, *sorted(key - {data}, key=lambda name: dims[name]))
        reads = tuple(o for o in observed if places[o.name] == key)
        sites = {n: _flattened(site, key) for n, site in served.items() if places[n] == key}
        outer = [i for i, level in enumerate(result) if set(level.plates) < key]
        direct = tuple(i for i in outer if not any(set(result[i].plates) < set(result[j].plates) for j in outer))
        result.append(_Level(plates, reads, sites, direct))
    return tuple(result)


def _flattened(site: Served, key: frozenset) -> int:
    """Return the columns of a latent in one place of a level: those of all members of plates that are no level."""
    return site.columns * math.prod(n for name, n in zip(site.plates, site.sizes, strict=True) if name not in key)


def _flat(site: Observed, value: Tensor, mask: Tensor | None, level: _Level) -> tuple[Tensor, Tensor | None]:
    """Return a value as ``(*level plates, n)``, 0 where it is missing, and where it is not."""
    order = [(site.plates[name] - site.event_dim) % value.dim() for name in level.plates]
    order += [d for d in range(value.dim()) if d not in order]
    shape = [value.shape[d] for d in order[: len(level.plates)]]
    if mask is None:
        return value.permute(order).reshape(*shape, -1), None
    there = mask.expand(value.shape)
    value = torch.where(there, value, torch.zeros_like(value))
    return value.permute(order).reshape(*shape, -1), there.permute(order).reshape(*shape, -1)


def _lift(value: Tensor, own: tuple[str, ...], plates: tuple[str, ...]) -> Tensor:
    """Return hidden units ``(*own, width)`` with a dim of size 1 for each further plate."""
    shape = [value.shape[own.index(name)] if name in own else 1 for name in plates]
    return value.reshape(*shape, value.shape[-1])


def _numbers(site: Observed, value: Tensor, there: Tensor | None) -> Tensor:
    """Return the shift and scale of real values; of counts, the mean total and the logarithm of one more."""
    value = value.double()
    if site.kind == "count":
        total = value.sum(-1).mean().clamp(min=1e-6)
        return torch.stack([total, torch.log1p(total)])
    there = torch.ones_like(value, dtype=torch.bool) if there is None else there
    number = there.sum().clamp(min=1)
    mean = value.sum() / number
    spread = (torch.where(there, value - mean, 0.0).square().sum() / number).sqrt()
    return torch.stack([mean, torch.where((spread > 0) & spread.isfinite(), spread, 1.0)])


def _features(site: Observed, value: Tensor, there: Tensor | None, numbers: Tensor) -> Tensor:
    """Return the columns of flattened values ``(..., n)``, 0 where they are missing."""
    if site.kind == "category":
        hot = one_hot(value.long(), site.num_categories).to(numbers.dtype)
        return (hot if there is None else hot * there.unsqueeze(-1)).flatten(-2)
    value = value.to(numbers.dtype)
    if site.kind == "real":
        value = (value - numbers[0]) / numbers[1]
        return value if there is None else torch.where(there, value, 0.0)
    if value.shape[-1] == 1:
        return torch.log1p(value)
    total = value.sum(-1, keepdim=True)
    return torch.cat([torch.log1p(value * (numbers[0] / total.clamp(min=1.0))), torch.log1p(total) - numbers[1]], -1)
