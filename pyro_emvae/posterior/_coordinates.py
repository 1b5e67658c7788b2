r"""Coordinates of the latents: rows of blocks, and where each latent lies among them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Latent", "Point", "fixed_normal"]


class Point(tuple):
    r"""Coordinates of all latents, or a direction: ``(local, common)`` of shapes ``(*, N, d)`` and ``(*, 1, g)``."""

    def __new__(cls, local: Tensor, common: Tensor) -> Point:
        return super().__new__(cls, (local, common))

    @property
    def local(self) -> Tensor:
        return self[0]

    @property
    def common(self) -> Tensor:
        return self[1]

    def __add__(self, other: Point) -> Point:
        return Point(self.local + other.local, self.common + other.common)

    def times(self, factor: Any) -> Point:
        """Return the point times a number, or times one number per block."""
        if isinstance(factor, Tensor) and factor.numel() > 1:
            return Point(self.local * factor[:, None], self.common)
        return Point(self.local * factor, self.common * factor)

    def detach(self) -> Point:
        return Point(*(part.detach() for part in self))


@dataclass(frozen=True)
class Latent:
    r"""One latent site and where its values lie among the coordinates.

    Args:
        name: The site's name.
        frames: Its vectorized plates.
        scale, mask: What the model multiplies by and keeps.
        transform: From the coordinates to the site's support; None if that is all real numbers.
        batch, event: Shape of its coordinates.
        nesting: Number of plate dims of the model.
        block: Dims of the plates whose elements are independent blocks, empty for a latent that all blocks share.
        place: Its first coordinate and the one after its last, within a block.

    Coordinates are kept in rows ``(*lead, blocks, width)``, where ``lead`` are dims of particles.
    """

    name: str
    frames: tuple = field(repr=False)
    scale: Any = field(repr=False)
    mask: Any = field(repr=False)
    transform: Any = field(repr=False)
    batch: tuple[int, ...]
    event: tuple[int, ...]
    nesting: int
    block: tuple[int, ...]
    place: tuple[int, int]

    @property
    def plates(self) -> tuple[int, ...]:
        return (1,) * (self.nesting - len(self.batch)) + self.batch

    @property
    def others(self) -> tuple[int, ...]:
        """Dims of plates whose elements share a block."""
        return tuple(dim for dim in range(-self.nesting, 0) if dim not in self.block)

    @property
    def width(self) -> int:
        return math.prod(self.plates[dim] for dim in self.others) * math.prod(self.event)

    @property
    def slice(self) -> slice:
        return slice(*self.place)

    def rows(self, coordinates: Tensor, tail: int | None = None) -> Tensor:
        """Return ``(*lead, *plates, *event)`` as rows; ``tail`` is the number of event dims if it is not the site's."""
        tail = len(self.event) if tail is None else tail
        batch = tuple(coordinates.shape[: coordinates.dim() - tail])
        lead = batch[: max(len(batch) - self.nesting, 0)]
        event = tuple(coordinates.shape[coordinates.dim() - tail :])
        plates = (1,) * (self.nesting - len(batch) + len(lead)) + batch[len(lead) :]
        full = coordinates.reshape((*lead, *plates, *event))
        ahead = len(lead) + self.nesting
        order = [*range(len(lead)), *(ahead + d for d in (*self.block, *self.others)), *range(ahead, full.dim())]
        blocks = math.prod(plates[dim] for dim in self.block)
        return full.permute(order).reshape(*lead, blocks, -1)

    def unrows(self, rows: Tensor, event: tuple[int, ...] | None = None) -> Tensor:
        """Return rows as ``(*batch, *event)``, or ``(*lead, *plates, *event)`` under dims of particles."""
        event = self.event if event is None else event
        lead = tuple(rows.shape[:-2])
        order = (*self.block, *self.others)
        full = rows.reshape((*lead, *(self.plates[dim] for dim in order), *event))
        back = [order.index(dim) for dim in range(-self.nesting, 0)]
        ahead = len(lead)
        full = full.permute([*range(ahead), *(ahead + i for i in back), *range(ahead + self.nesting, full.dim())])
        return full if lead else full.reshape((*self.batch, *event))

    def expand(self, rows: Tensor) -> Tensor:
        """Give rows of one block to all blocks."""
        count = math.prod(self.plates[dim] for dim in self.block)
        return rows.expand(*rows.shape[:-2], count, rows.shape[-1])


def fixed_normal(like: Point, seed: int) -> Point:
    """Return standard normal numbers that are the same in every call; torch's generator is not used."""
    generator = torch.Generator().manual_seed(seed)
    return Point(*(torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x) for x in like))
