r"""Gaussian posteriors: exact where the log joint is quadratic, Laplace's approximation elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import transforms

from .._checks import StepError, fail, nearest
from .._pyro import scale_and_mask
from ..particles import Particles, hold_batch, report
from ._coordinates import Latent, Point
from ._log_joint import LogJoint, log_jacobian
from ._plates import in_plates
from ._precision import Factor
from ._runs import draws, may_vectorize
from .base import Posterior, Support, expected_log_joint

__all__ = ["GaussianPosterior"]


class GaussianPosterior(Posterior):
    r"""A Gaussian over the unconstrained coordinates of all latents, jointly.

    $$g=\bar g+G\epsilon_0,\qquad z_n=\bar z_n+B_n(g-\bar g)+C_n\epsilon_n,\qquad\epsilon\sim N(0,I),$$

    with blocks $z_n$ over the data and latents g that all data share. `steps.Gaussian` and `steps.Laplace` make it.

    Expectations are taken by the cubature of $2D$ nodes $\pm\sqrt D\,e_j$, D the coordinates of one block and g, which
    is exact for polynomials of degree 3: for statistics of linear-Gaussian models, and for their log joint.

    Args:
        joint: The log joint density whose coordinates these are.
        mean: The means.
        factor: The square root of the covariance.
        log_p: The log joint at the mean, per block if separable: ``(N,)`` or ``(1,)``, nats.
        is_exact: Whether the log joint is known to be quadratic.
        vectorize: What is known about running all nodes at once, by model; added to.

    Source: Bishop 2006, eqs. 2.113-2.117; Stroud and Secrest 1963 for the cubature.

    Example:
        >>> from pyro_emvae.steps import Gaussian
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> posterior = Gaussian().infer(model, (torch.tensor([1.0, 2.0]),), {})
        >>> posterior.marginal("z").mean
        tensor([0.5000, 1.0000])
    """

    def __init__(
        self,
        joint: LogJoint,
        mean: Point,
        factor: Factor,
        log_p: Tensor,
        *,
        is_exact: bool = True,
        vectorize: dict[Callable, bool] | None = None,
    ) -> None:
        self.joint, self.mean, self.factor = joint, Point(*(x.detach() for x in mean)), factor
        self.model, self.args, self.kwargs, self.batch = joint.model, joint.args, joint.kwargs, joint.batch
        self.drawn = joint.drawn
        self.kind, self.is_exact = "gaussian" if is_exact else "laplace", is_exact
        self._log_p, self.known = log_p.detach(), {} if vectorize is None else vectorize
        joint.release()

    @cached_property
    def log_evidence(self) -> float:
        r"""$\log p(x)$ in nats, with the model's scales; if not exact, Laplace's approximation, which is no bound.

        $$\log p(x)=f(\bar z)+\tfrac12\log|2\pi\Sigma|.$$
        """
        local, common = self.factor.log_det(len(self.mean.local))
        joint, scale = self.joint, self.joint.scale
        if isinstance(scale, Tensor):
            return report(joint.rest + (scale * (self._log_p + local)).sum().double())
        return report(joint.rest + scale * (self._log_p.sum() + local.sum() + common).double())

    @cached_property
    def entropy(self) -> float:
        """Entropy in nats, with the model's scales; of masked latents none."""
        half = 0.5 * (1.0 + math.log(2 * math.pi))
        total = 0.0
        for tril, latents in ((self.factor.common, self.joint.commons), (self.factor.local, self.joint.locals)):
            rows = tril.diagonal(dim1=-2, dim2=-1).log() + half
            for latent in latents:
                site = latent.unrows(latent.expand(rows[:, latent.slice]), (math.prod(latent.event),)).sum(-1)
                site = site if latent.transform is None else site + self._jacobian(latent)
                total += float(scale_and_mask(site, latent.scale, latent.mask).sum())
        return total

    def _jacobian(self, latent: Latent) -> Tensor:
        nodes = self.joint.join(self._nodes())[latent.name]
        value = latent.transform(nodes)
        event_dim = value.dim() - 1 - latent.nesting
        return log_jacobian(latent.transform, nodes, value, event_dim).mean(0).reshape(latent.batch)

    def tempered(self, beta: float) -> GaussianPosterior:
        """Return the same with the covariance over beta: the power of a Gaussian; its ``log_evidence`` is NaN."""
        if not self.is_exact:
            return super().tempered(beta)
        factor = Factor(self.factor.local / beta**0.5, self.factor.slope, self.factor.common / beta**0.5)
        new = GaussianPosterior(self.joint, self.mean, factor, self._log_p, vectorize=self.known)
        new.is_exact = beta == 1.0
        vars(new).update(log_evidence=math.nan)
        return new

    # Expectations ---------------------------------------------------------------------------------------------------

    def _nodes(self) -> Point:
        """Return the cubature's nodes, with dims ``(2D, *)``; all have the same weight."""
        mean, size = self.mean, self.mean.common.shape[-1]
        count = size + mean.local.shape[-1]
        eye = torch.eye(count, dtype=mean.local.dtype, device=mean.local.device)
        return self.coordinates(count**0.5 * torch.cat([eye, -eye]))

    def coordinates(self, noise: Tensor) -> Point:
        """Return the coordinates that standard normal numbers ``(S, D)`` stand for, the common ones first."""
        noise, size = noise[:, None], self.mean.common.shape[-1]
        return self.factor.color(Point(noise[..., size:], noise[..., :size])) + self.mean

    def values_of(self, noise: Tensor) -> dict[str, Tensor]:
        """Return the latents' values at standard normal numbers ``(S, D)``, the same for each block."""
        return self.joint.values(self.coordinates(noise))

    def support(self, num_particles: int = 1) -> Support:
        """Return the nodes of the cubature, whatever the number."""
        values = self.joint.values(self._nodes())
        first, nesting = self.joint.locals[0], self.joint.nesting
        count = len(next(iter(values.values())))
        weights = self.mean.local.new_full((count, *(1,) * nesting), -math.log(count))
        return Support(values, weights, nesting, first.scale, first.mask)

    def expected_log_joint(self, num_particles: int = 1) -> Tensor:
        with hold_batch(self.batch):
            vectorize = may_vectorize(self)
            return expected_log_joint(self.model, self.args, self.kwargs, self.support(), vectorize)

    # Draws ----------------------------------------------------------------------------------------------------------

    def particles(self, num_particles: int) -> Particles:
        return draws(self, num_particles, self.joint.nesting)

    def sample(self, plates: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        mean, factor = self.mean, self.factor
        self._plates: dict[str, Any] = dict(plates or {})
        noise = self._draw_each(self.joint.commons, mean.common, factor.common, values)
        shift = factor.color(Point(torch.zeros_like(mean.local), noise)).local
        self._draw_each(self.joint.locals, mean.local + shift, factor.local, values)
        return values

    def _draw_each(self, latents: list[Latent], mean: Tensor, tril: Tensor, values: dict[str, Tensor]) -> Tensor:
        """Draw latents one given the others before it; return the noise that the draws stand for."""
        noise = mean[..., :0]
        for latent in latents:
            mine = latent.slice
            loc = mean[..., mine] + (tril[:, mine, : latent.place[0]] @ noise[..., None]).squeeze(-1)
            own = tril[:, mine, mine]
            deviation = self._draw(latent, loc, own, values) - loc
            own = torch.linalg.solve_triangular(own, deviation[..., None], upper=False).squeeze(-1)
            noise = torch.cat([noise.expand(*own.shape[:-1], -1), own], -1)
        return noise

    def _draw(self, latent: Latent, loc: Tensor, tril: Tensor, values: dict[str, Tensor]) -> Tensor:
        """Draw one latent with `pyro.sample`; return its coordinates in rows."""
        if _is_block_diagonal(tril, math.prod(latent.event)):
            fn = _distribution(latent, loc, tril)
        else:
            fn = self._draw_together(latent, loc, tril)
        with in_plates(latent.frames, self.batch, self._plates, latent.scale, latent.mask):
            values[latent.name] = value = pyro.sample(latent.name, fn)
        return latent.rows(value if latent.transform is None else latent.transform.inv(value))

    def _draw_together(self, latent: Latent, loc: Tensor, tril: Tensor) -> Any:
        """Draw a latent whose elements depend on each other across a plate by an auxiliary site; return its Delta."""
        lead = loc.shape[:-2]
        spread = loc.reshape(*lead, *(1,) * (latent.nesting if lead else 0), *loc.shape[-2:])
        fn = dist.MultivariateNormal(spread, scale_tril=tril).to_event(1)
        with in_plates((), {}, {}, latent.scale):
            drawn = pyro.sample(f"_{latent.name}_together", fn, infer={"is_auxiliary": True})
        rows = drawn.reshape(*drawn.shape[:1], *loc.shape[-2:]) if drawn.dim() > 2 else drawn
        coordinates = latent.unrows(rows)
        batch = latent.nesting + 1 if rows.dim() > 2 else len(latent.batch)
        if latent.transform is None:
            return dist.Delta(coordinates, event_dim=coordinates.dim() - batch)
        value = latent.transform(coordinates)
        event_dim = value.dim() - batch
        log_density = -log_jacobian(latent.transform, coordinates, value, event_dim)
        return dist.Delta(value, log_density=log_density, event_dim=event_dim)

    def marginal(self, site: str) -> Any:
        """Return the distribution of one latent: Normal or MultivariateNormal in its coordinates."""
        latent = self.joint.latents.get(site)
        if latent is None:
            fail(
                StepError,
                "GaussianPosterior",
                f"give the marginal of {site!r}",
                got="no such latent",
                because="the model's latents were integrated out",
                fix=nearest(site, self.joint.latents),
            )
        common = latent in self.joint.commons
        covariance = self.factor.covariance(common)[:, latent.slice, latent.slice]
        rows = self.mean[1 if common else 0][..., latent.slice]
        return _distribution(latent, rows, torch.linalg.cholesky(_blocks(covariance, math.prod(latent.event))))


def _blocks(matrix: Tensor, size: int) -> Tensor:
    """Return the blocks on the diagonal: ``(N, E * size, E * size)`` to ``(N, E, size, size)``."""
    count = matrix.shape[-1] // size
    apart = matrix.reshape(*matrix.shape[:-2], count, size, count, size)
    return apart.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _is_block_diagonal(tril: Tensor, size: int) -> bool:
    count = tril.shape[-1] // size
    if count == 1:
        return True
    outside = 1 - torch.block_diag(*[tril.new_ones(size, size)] * count)
    return bool((tril * outside).abs().max() <= 1e3 * torch.finfo(tril.dtype).eps * tril.abs().max())


def _distribution(latent: Latent, loc: Tensor, tril: Tensor) -> Any:
    """Return the distribution of a latent with mean and scale in rows, in its own batch and event shape."""
    width = math.prod(latent.event)
    tril = tril if tril.dim() == 4 else _blocks(tril, width)
    blocks = latent.expand(loc).shape[-2]
    tril = tril.expand(blocks, *tril.shape[1:]).reshape(blocks, -1)
    flat = latent.unrows(latent.expand(loc), (width,))
    tril = latent.unrows(tril, (width, width))
    if not latent.event:
        fn = dist.Normal(flat.squeeze(-1), tril[..., 0, 0])
    else:
        fn = dist.MultivariateNormal(flat, scale_tril=tril)
        if len(latent.event) > 1:
            fn = dist.TransformedDistribution(fn, [transforms.ReshapeTransform((width,), latent.event)])
    return fn if latent.transform is None else dist.TransformedDistribution(fn, [latent.transform])
