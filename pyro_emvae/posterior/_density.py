r"""The log joint density of independent blocks at many coordinates in one run of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
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
        joint: The log joint density whose blocks these are, separable or in one.
        vectorize: Run many coordinates at once (True) or one by one (False).

    Shape: coordinates ``(S, blocks, width)`` -> ``(S, blocks)``, nats.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", 2):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> density = BlockDensity.of("example", model, (torch.tensor([1.0, 2.0]),), {})
        >>> density.shape, density.at(torch.zeros(3, 2, 1))[0]
        ((2, 1), tensor([-2.3379, -3.8379]))
    """

    def __init__(self, joint: LogJoint, vectorize: bool) -> None:
        self.joint, self.vectorize = joint, vectorize

    @classmethod
    def of(
        cls,
        obj: str,
        model: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        *,
        single: bool = False,
        vectorize: bool | None = None,
        max_plate_nesting: int | None = None,
    ) -> BlockDensity:
        """Return the density of a model, whose minibatches are drawn once and kept.

        Args:
            obj: Who asks, for errors.
            model, args, kwargs: What is run.
            single: Put everything into one block.
            vectorize: As for the class, or whichever is right (None).
            max_plate_nesting: Number of plate dims; found out if None.

        Raises:
            StepError: A latent is discrete; the factors of a block have different scales.
        """
        with torch.enable_grad():
            joint = LogJoint(obj, model, args, kwargs, constrained=True, single=single).in_independent_blocks()
        with hold_batch(joint.batch), torch.no_grad():
            pair = (model, Prior(model), args, kwargs)
            vectorize, _ = choose_vectorize(obj, vectorize, 2, max_plate_nesting, pair, stacklevel=6)
        joint.release()
        return cls(joint, vectorize)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of blocks and of the coordinates of one."""
        first, last = self.joint.locals[0], self.joint.locals[-1]
        return math.prod(first.plates[dim] for dim in first.block), last.place[1]

    def at(self, coordinates: Tensor) -> Tensor:
        """Return f at coordinates ``(S, blocks, width)``: ``(S, blocks)``, nats, NaN where the model has none."""
        return torch.cat([self._total(*run) for run in self._runs(coordinates)])

    def with_counted(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Return `at`, and from the same runs log p by what counts: no Jacobians, and nothing of masked latents."""
        pairs = [(self._total(*run), self._total(run[0], factor=_counted)) for run in self._runs(coordinates)]
        return tuple(torch.cat(each) for each in zip(*pairs, strict=True))

    def with_rest(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Return `at`, and the scaled sum of all that no latent moves, both to be differentiated by theta."""
        runs = list(self._runs(coordinates))
        sites = runs[0][0].model.items()
        rest = [runs[0][0].rows(site.scaled)[0].sum() for name, site in sites if name not in self.joint.reached]
        total = torch.cat([self._total(*run) for run in runs])
        return total, torch.stack(rest).sum() if rest else total.new_zeros(())

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
        return joint.split(free).local, self._sum(run, joint.reached.keys() - joint.latents.keys(), {}, _factor)

    def _runs(self, coordinates: Tensor) -> Iterator[tuple[Particles, dict[str, Tensor]]]:
        if self.vectorize:
            yield self._replay(coordinates, len(coordinates))
        else:
            yield from (self._replay(part, 1) for part in coordinates)

    def _replay(self, coordinates: Tensor, count: int) -> tuple[Particles, dict[str, Tensor]]:
        """Run at coordinates ``(S, blocks, width)`` at once, or ``(blocks, width)`` outside a plate of particles;
        return the run and the log Jacobians."""
        joint, single = self.joint, count == 1
        point = Point(coordinates.squeeze(0) if single and coordinates.dim() > 2 else coordinates, coordinates[..., :0])
        free, values = joint.join(point), joint.values(point)
        with joint.as_first():
            given = (joint.model, _draw_nothing, values, joint.args, joint.kwargs)
            run = replay(*given, num_particles=count, max_plate_nesting=joint.nesting)
        jacobians = {}
        for name, latent in joint.latents.items():
            if latent.transform is not None:
                plates = len(latent.batch) if single else 1 + latent.nesting
                event_dim = values[name].dim() - plates
                jacobians[name] = run.rows(log_jacobian(latent.transform, free[name], values[name], event_dim))
        return run, jacobians

    def _total(self, run: Particles, jacobians: Mapping[str, Tensor] | None = None, factor: Any = None) -> Tensor:
        return self._sum(run, self.joint.reached.keys(), jacobians or {}, factor or _factor)

    def _sum(
        self, run: Particles, names: Iterable[str], jacobians: Mapping[str, Tensor], factor: Callable[[Site], Tensor]
    ) -> Tensor:
        """Sum factors to blocks: ``(S, blocks)``, or broadcastable to it."""
        joint, total = self.joint, []
        for name in (n for n in joint.reached if n in names):
            site = run.model[name]
            row = run.rows(factor(site)) + jacobians.get(name, 0.0)
            row = reduce_to(row.expand(run.num_particles, *row.shape[1:]), joint.frames[name], joint.plates)
            total.append(joint.locals[0].rows(row, tail=0).sum(-1))
        if not total:  # latents without data: every draw is as likely
            return next(iter(run.latents.values())).log_prob.new_zeros(run.num_particles, self.shape[0])
        return torch.stack(torch.broadcast_tensors(*total)).sum(0)


def _factor(site: Site) -> Tensor:
    """Return an observed site's log density where its mask is true, and a latent's without masks: it sums to one."""
    return _counted(site) if site.is_observed else site.log_prob


def _counted(site: Site) -> Tensor:
    if site.mask is None:
        return site.log_prob
    return torch.where(torch.as_tensor(site.mask), site.log_prob, 0.0)


def _draw_nothing(*args: Any, **kwargs: Any) -> None:
    """A guide that leaves every latent to the model."""
