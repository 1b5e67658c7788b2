r"""Hessians of log joints by blocks, and the Gaussians that they define."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import StepError, fail
from ._coordinates import Latent, Point, fixed_normal
from ._log_joint import LogJoint, Run

__all__ = ["Coupled", "Factor", "NotPositive", "Precision", "check_blocks", "precision"]


class Coupled(Exception):
    """Blocks that were taken for independent are not; carries by how much the Hessian misses."""


@dataclass(frozen=True)
class Precision:
    r"""$\Lambda=-\nabla^2 f$ of an arrow form: blocks per datum, and common coordinates that touch all of them.

    Args:
        local: $\Lambda_{nn}$, ``(N, d, d)``; ``(1, d, d)`` if all are the same.
        cross: $\Lambda_{ng}$, ``(N, d, g)``.
        corner: $\Lambda_{gg}$, ``(1, g, g)``.
    """

    local: Tensor
    cross: Tensor
    corner: Tensor

    def __matmul__(self, point: Point) -> Point:
        local = _apply(self.local, point.local) + _apply(self.cross, point.common)
        return Point(local, _apply(self.corner, point.common) + _sum(self.cross, point.local))

    def factor(self, repair: bool = False) -> Factor:
        r"""Return the Gaussian of this precision, by the Schur complement of the blocks.

        Args:
            repair: Replace eigenvalues of a matrix that is not positive definite by their absolute values.

        Raises:
            NotPositive: Of a block, by its number, or of the common coordinates.
        """
        local = _tril(self.local, repair)
        slope = -local @ (local.mT @ self.cross)
        corner = self.corner + (self.cross.mT @ slope).sum(0)
        return Factor(local, slope, _tril(corner, repair, common=True))


class NotPositive(Exception):
    """A precision is not positive definite."""

    def __init__(self, block: int, common: bool, eigenvalue: float) -> None:
        super().__init__(block)
        self.block, self.common, self.eigenvalue = block, common, eigenvalue

    def refuse(self, joint: LogJoint, because: str, fix: str) -> None:
        """Raise for the half-step that asked."""
        names = [latent.name for latent in (joint.commons if self.common else joint.locals)]
        where = f" of block {self.block}" if joint.plates and not self.common else ""
        got = f"a Hessian of -log p with the eigenvalue {self.eigenvalue:.4g}{where}"
        fail(StepError, joint.obj, f"integrate {', '.join(map(repr, names))} out", got=got, because=because, fix=fix)


@dataclass(frozen=True)
class Factor:
    r"""A square root of the covariance, lower triangular with the common coordinates first.

    $$g=\bar g+G\epsilon_0,\qquad z_n=\bar z_n+B_n(g-\bar g)+C_n\epsilon_n,\qquad\epsilon\sim N(0,I).$$

    Args:
        local: $C_n$, ``(N, d, d)`` or ``(1, d, d)``.
        slope: $B_n$, ``(N, d, g)``.
        common: $G$, ``(1, g, g)``.
    """

    local: Tensor
    slope: Tensor
    common: Tensor

    def color(self, noise: Point) -> Point:
        """Return the deviations from the mean that standard normal noise stands for."""
        local, common = _apply(self.local, noise.local), _apply(self.common, noise.common)
        return Point(local + _apply(self.slope, common) if common.shape[-1] else local, common)

    def whiten(self, gradient: Point) -> Point:
        """Return the gradient by the noise, given that by the coordinates: the transpose of `color`."""
        common = gradient.common + _sum(self.slope, gradient.local)
        return Point(_apply(self.local.mT, gradient.local), _apply(self.common.mT, common))

    def solve(self, gradient: Point) -> Point:
        """Return the covariance times a gradient, a Newton step."""
        return self.color(self.whiten(gradient))

    def log_det(self, blocks: int) -> tuple[Tensor, Tensor]:
        r"""Return $\tfrac12\log|2\pi\Sigma|$ per block ``(N,)`` given the common ones, and of those ``()``."""
        half = 0.5 * math.log(2 * math.pi)
        local, common = (_diagonal(x).log().sum(-1) + half * x.shape[-1] for x in (self.local, self.common))
        return local.expand(blocks), common.sum()

    def covariance(self, common: bool) -> Tensor:
        """Return the marginal covariance of the common coordinates, or of each block."""
        if common:
            return self.common @ self.common.mT
        through = self.slope @ self.common
        return self.local @ self.local.mT + through @ through.mT


def precision(joint: LogJoint, run: Run, gradient: Point) -> Precision:
    r"""Return minus the Hessian at a run, from one Hessian-vector product per coordinate of a block.

    Latents that no common factor joins share a product, so that a chain takes as many as three of its latents. One
    product is enough if it shows that all blocks have the same Hessian.

    It takes the blocks for independent; `check_blocks` tells.

    Source: Curtis, Powell and Reid 1974, for the sharing of products.
    """
    blocks, width = gradient.local.shape
    size = gradient.common.shape[-1]
    shared = _shared(joint, run, gradient) if joint.separable and 1 < width <= blocks // 2 else None
    if shared is not None:
        return Precision(_symmetric(shared), gradient.local.new_zeros(blocks, width, 0), shared[:, :0, :0])
    local, corner = gradient.local.new_zeros(blocks, width, width), gradient.local.new_zeros(1, size, size)
    cross = gradient.local.new_zeros(blocks, width, size)
    near = _neighbours(joint.locals, joint.reached.values())
    for group in _colors(joint.locals, near):
        for k in range(max(latent.width for latent in group)):
            columns = [(latent, latent.place[0] + k) for latent in group if k < latent.width]
            direction = _unit(gradient, [column for _, column in columns], common=False)
            found = joint.curve(run, gradient, direction).local
            for latent, column in columns:
                for other in near[latent.name]:
                    place = joint.latents[other].slice
                    local[:, place, column] = -found[:, place]
    for k in range(size):
        found = joint.curve(run, gradient, _unit(gradient, [k], common=True))
        cross[:, :, k], corner[:, :, k] = -found.local, -found.common
    return Precision(_merge(_symmetric(local)), cross, _symmetric(corner))


def _shared(joint: LogJoint, run: Run, gradient: Point) -> Tensor | None:
    """Return the precision of every block if it is the same: block n is multiplied by unit vector n modulo d."""
    blocks, width = gradient.local.shape
    eye = torch.eye(width, dtype=gradient.local.dtype, device=gradient.local.device)
    direction = eye.repeat(-(-blocks // width), 1)[:blocks]
    columns = -joint.curve(run, gradient, Point(direction, gradient.common)).local
    first, even = columns[:width], blocks // width * width
    tolerance = 8 * torch.finfo(first.dtype).eps * first.abs().max()
    misses = columns[:even].reshape(-1, width, width) - first, columns[even:] - first[: blocks - even]
    return first.mT[None] if all(bool((miss.abs() <= tolerance).all()) for miss in misses) else None


def check_blocks(joint: LogJoint, run: Run, gradient: Point, found: Precision) -> None:
    """Raise `Coupled` if the blocks depend on each other, as the Hessian times a random vector shows."""
    noise = fixed_normal(gradient, seed=0)
    true, mine = joint.curve(run, gradient, noise), found @ noise
    size = Precision(found.local.abs(), found.cross.abs(), found.corner.abs()) @ Point(*(x.abs() for x in noise))
    for one, two, scale in zip(true, mine, size, strict=True):
        miss = (one + two).abs() / (scale + scale.mean() + torch.finfo(scale.dtype).tiny)
        if miss.numel() and bool(miss.max() > torch.finfo(miss.dtype).eps ** 0.5):
            raise Coupled(float(miss.max()))


def _unit(like: Point, columns: list[int], common: bool) -> Point:
    local, corner = torch.zeros_like(like.local), torch.zeros_like(like.common)
    (corner if common else local)[..., columns] = 1.0
    return Point(local, corner)


def _neighbours(latents: list[Latent], factors: Iterable[frozenset[str]]) -> dict[str, set[str]]:
    """Return the latents that share a factor with each latent, itself included."""
    near = {latent.name: {latent.name} for latent in latents}
    for names in factors:
        inside = names & near.keys()
        for name in inside:
            near[name] |= inside
    return near


def _colors(latents: list[Latent], near: dict[str, set[str]]) -> list[list[Latent]]:
    """Group latents of which no two have a neighbour in common."""
    groups: list[tuple[list[Latent], set[str]]] = []
    for latent in latents:
        mine = near[latent.name]
        free = next((group for group in groups if not group[1] & mine), None)
        if free is None:
            groups.append(([latent], set(mine)))
        else:
            free[0].append(latent)
            free[1].update(mine)
    return [group for group, _ in groups]


def _merge(local: Tensor) -> Tensor:
    """Return one block in place of blocks that are the same up to rounding."""
    tolerance = 8 * torch.finfo(local.dtype).eps * local[0].abs().max()
    return local[:1] if bool(((local - local[:1]).abs() <= tolerance).all()) else local


def _tril(matrix: Tensor, repair: bool, common: bool = False) -> Tensor:
    """Return the lower triangular C with CC' the inverse of a positive definite matrix."""
    upside_down, info = torch.linalg.cholesky_ex(matrix.flip((-2, -1)))
    if bool(info.any()):
        values, vectors = torch.linalg.eigh(matrix)
        if not repair:
            worst = int(values[..., 0].argmin())
            raise NotPositive(worst, common, float(values[worst, 0]))
        floor = torch.finfo(matrix.dtype).eps ** 0.5 * values.abs().amax(-1, keepdim=True).clamp_min(1e-300)
        matrix = (vectors * torch.maximum(values.abs(), floor)[..., None, :]) @ vectors.mT
        upside_down = torch.linalg.cholesky(matrix.flip((-2, -1)))
    inverse = upside_down.flip((-2, -1)).mT
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(inverse, eye.expand_as(matrix), upper=False)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    if matrix.shape[0] == 1:
        return vector @ matrix[0].mT
    return (matrix @ vector[..., None]).squeeze(-1)


def _sum(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return the sum over blocks of transposed matrices times vectors: ``(*, 1, g)``."""
    return _apply(matrix.mT, vector).sum(-2, keepdim=True)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)
