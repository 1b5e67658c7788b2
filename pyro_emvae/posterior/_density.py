r"""The log joint density of independent blocks at many coordinates in one run of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..particles import Particles, Site, choose_vectorize, draw, hold_batch, reduce_to, replay
from ._coordinates import Point
from ._log_joint import LogJoint, log_jacobian
from .prior import Prior
from .samples import lay_out

__all__ = ["BlockDensity"]


class BlockDensity:
    r"""$f_n(u)=\log p_\theta(x_n,z_n(u))+\log|dz/du|$ of blocks n that are independent given theta.

    Blocks are the elements of the plates that all latents share, u their unconstrained coordinates. With a latent
    outside of those plates, or what depends on several blocks, everything is one block. Factors count without the
    scale of the plates, and a latent without its mask.

    Args:
        obj: Who asks, for errors.
        model, args, kwargs: What is run; its minibatches are drawn once and kept.
        single: Put everything into one block.
        vectorize: Run many coordinates at once (True), one by one (False), or whichever is right (None).
        max_plate_nesting: Number of plate dims; found out if None.

    Shape: coordinates ``(S, blocks, width)`` -> ``(S, blocks)``, nats.

    Raises:
        StepError: A latent is discrete; the factors of a block have different scales.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", 2):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> density = BlockDensity("example", model, (torch.tensor([1.0, 2.0]),), {})
        >>> density.shape, density.at(torch.zeros(3, 2, 1))[0]
        ((2, 1), tensor([-2.3379, -3.8379]))
    """

    def __init__(
        self,
        obj: str,
        model: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        *,
        single: bool = False,
        vectorize: bool | None = None,
        max_plate_nesting: int | None = None,
    ) -> None:
        with torch.enable_grad():
            joint = LogJoint(obj, model, args, kwargs, constrained=True, single=single)
            self.joint = joint = joint if joint.separable or not joint.plates else joint.in_one_block()
        with hold_batch(joint.batch), torch.no_grad():
            pair = (model, Prior(model), args, kwargs)
            self.vectorize, _ = choose_vectorize(obj, vectorize, 2, max_plate_nesting, pair, stacklevel=6)
        joint.release()

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of blocks and of the coordinates of one."""
        first, last = self.joint.locals[0], self.joint.locals[-1]
        return math.prod(first.plates[dim] for dim in first.block), last.place[1]

    def at(self, coordinates: Tensor) -> Tensor:
        """Return f at coordinates ``(S, blocks, width)``: ``(S, blocks)``, nats, NaN where the model has none."""
        if self.vectorize:
            return self._replay(coordinates, len(coordinates))
        return torch.cat([self._replay(part, 1) for part in coordinates])

    def draw_prior(self, num_particles: int) -> tuple[Tensor, Tensor]:
        r"""Return draws from the prior and their log likelihoods: ``(S, blocks, width)`` and ``(S, blocks)``."""
        joint = self.joint
        with hold_batch(joint.batch):
            how = {"vectorize": self.vectorize, "max_plate_nesting": joint.nesting}
            run = draw(joint.model, _draw_nothing, joint.args, joint.kwargs, num_particles=num_particles, **how)
        values = lay_out(run.latents.values(), num_particles, joint.nesting)
        free = {
            n: value if joint.latents[n].transform is None else joint.latents[n].transform.inv(value)
            for n, value in values.items()
        }
        return joint.split(free).local, self._sum(run, joint.reached.keys() - joint.latents.keys(), {})

    def _replay(self, coordinates: Tensor, count: int) -> Tensor:
        """Score coordinates in one run: ``(S, blocks, width)``, or ``(blocks, width)`` outside a plate of particles."""
        joint, single = self.joint, count == 1
        point = Point(coordinates.squeeze(0) if single and coordinates.dim() > 2 else coordinates, coordinates[..., :0])
        free, values = joint.join(point), joint.values(point)
        with hold_batch(joint.batch):
            given = (joint.model, _draw_nothing, values, joint.args, joint.kwargs)
            run = replay(*given, num_particles=count, max_plate_nesting=joint.nesting)
        jacobians = {}
        for name, latent in joint.latents.items():
            if latent.transform is not None:
                plates = len(latent.batch) if single else 1 + latent.nesting
                event_dim = values[name].dim() - plates
                jacobians[name] = run.rows(log_jacobian(latent.transform, free[name], values[name], event_dim))
        return self._sum(run, joint.reached.keys(), jacobians)

    def _sum(self, run: Particles, names: Iterable[str], jacobians: Mapping[str, Tensor]) -> Tensor:
        """Sum factors to blocks: ``(S, blocks)``, or broadcastable to it."""
        joint, total = self.joint, []
        for name in (n for n in joint.reached if n in names):
            site = run.model[name]
            row = run.rows(_factor(site)) + jacobians.get(name, 0.0)
            row = reduce_to(row.expand(run.num_particles, *row.shape[1:]), joint.frames[name], joint.plates)
            total.append(joint.locals[0].rows(row, tail=0).sum(-1))
        if not total:  # latents without data: every draw is as likely
            return next(iter(run.latents.values())).log_prob.new_zeros(run.num_particles, self.shape[0])
        return torch.stack(torch.broadcast_tensors(*total)).sum(0)


def _factor(site: Site) -> Tensor:
    """Return an observed site's log density where its mask is true, and a latent's without masks: it sums to one."""
    if not site.is_observed or site.mask is None:
        return site.log_prob
    return torch.where(torch.as_tensor(site.mask), site.log_prob, 0.0)


def _draw_nothing(*args: Any, **kwargs: Any) -> None:
    """A guide that leaves every latent to the model."""
