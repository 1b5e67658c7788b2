r"""Posteriors on the nodes of a Gauss-Hermite quadrature that is centred and scaled for each block of latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import NonFiniteError, StepError, fail
from ..particles import Particles, hold_batch
from ._coordinates import Point
from ._density import BlockDensity
from ._log_joint import LogJoint
from ._newton import find_mode
from ._runs import may_vectorize
from .base import Posterior, Support, expected_log_joint
from .gaussian import GaussianPosterior

__all__ = ["QuadraturePosterior", "integrate_at_mode"]

MAX_NODES = 10_000


class QuadraturePosterior(Posterior):
    r"""Weighted nodes about the mode of each block of latents: adaptive Gauss-Hermite quadrature.

    With $f_n(u)=\log p(x_n,z_n(u))+\log|dz/du|$ of D coordinates, its mode $\hat u_n$, and $C_n$ a root of the
    covariance there, $C_nC_n^\top=(-\nabla^2f_n)^{-1}$, substitute $u=\hat u_n+C_nt$ and divide by the standard
    normal density $\varphi$:

    $$\log p(x_n)=\log|C_n|+\log\int\frac{e^{f_n(\hat u_n+C_nt)}}{\varphi(t)}\varphi(t)\,dt
      \approx\log\sum_s\omega_s\,\frac{|C_n|\,e^{f_n(u_{sn})}}{\varphi(t_s)},$$

    where $t_s$ are the points of the tensor grid of S = n^D Hermite nodes and $\omega_s$ the products of their weights,
    which sum to one. The summands, divided by their sum, are the weights $w_{sn}$ of the nodes in expectations.

    The sum is exact if $e^{f_n}$ is the Gaussian at the mode times a polynomial of degree 2n - 1 in each coordinate,
    expectations of polynomials of that degree are exact if f is quadratic. At held nodes the derivative of the log sum
    by theta is the expectation of that of log p(x, z), so that an M-step climbs what the next E-step evaluates, but
    for the error of the rule.

    As a guide it draws from the Gaussian at the mode, which has a density; `marginal` is that Gaussian's too. The
    posterior's own moments are expectations.

    Args:
        gaussian: At the mode, of blocks that share nothing but theta.
        num_nodes: n, per coordinate; at least 2.

    Raises:
        NonFiniteError: The model's density is NaN or infinite at a node.

    Source: Liu and Pierce 1994, "A note on Gauss-Hermite quadrature"; Pinheiro and Bates 1995 for several coordinates.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        ...         pyro.sample("x", dist.Bernoulli(logits=z), obs=x)
        >>> posterior = integrate_at_mode("example", model, (torch.tensor([1.0, 0.0]),), {}, num_nodes=9)
        >>> print(f"{posterior.log_evidence:.4f}, exactly {2 * torch.tensor(0.5).log():.4f}")
        -1.3863, exactly -1.3863
    """

    kind = "quadrature"

    def __init__(self, gaussian: GaussianPosterior, num_nodes: int) -> None:
        self.gaussian, self.num_nodes = gaussian, num_nodes
        self.joint, self.batch, self.drawn = gaussian.joint, gaussian.batch, gaussian.drawn
        self.model, self.args, self.kwargs = gaussian.model, gaussian.args, gaussian.kwargs
        noise, self._log_factor = _hermite(num_nodes, gaussian)
        self._at = gaussian.coordinates(noise).local
        with torch.no_grad():
            log_p, counted = self._density.with_counted(self._at)
        terms = self._terms(log_p)
        self._log_p = self._require_finite(terms).logsumexp(0)
        self._log_weights = terms - self._log_p
        weights = self._log_weights.exp()
        mean = torch.where(weights > 0, weights * counted, 0.0).sum(0)
        self.log_evidence = float(self.joint.rest + self._sum(self._log_p))
        self.entropy = float(self._sum(self._log_p - mean))

    @property
    def vectorize(self) -> bool:
        """Whether the model may be run on all nodes at once."""
        return may_vectorize(self.gaussian)

    @property
    def _density(self) -> BlockDensity:
        return BlockDensity(self.joint, self.vectorize)

    def _terms(self, log_p: Tensor) -> Tensor:
        """Return the logs of the summands of each block's integral: ``(S, N)``."""
        return log_p + self._log_factor[:, None] + self.gaussian.factor.log_det(self._at.shape[1])[0]

    def _sum(self, blocks: Tensor) -> Tensor:
        return (self.joint.scale * blocks).double().sum()

    def log_evidence_at_theta(self) -> Tensor:
        r"""Return the approximation of $\log p_\theta(x)$ at the present theta, nodes held, to be differentiated by it,
        twice too, with three nodes or more: scalar, nats."""
        self.require_products("differentiate log p(x) twice")
        log_p, rest = self._density.with_rest(self._at)
        return rest + self._sum(self._terms(log_p).logsumexp(0))

    def require_products(self, act: str) -> None:
        """Raise unless products of scores are integrated as well as scores are: two nodes take t^4 for 1, and not 3."""
        if self.num_nodes < 3:
            fail(
                StepError,
                self.joint.obj,
                act,
                got=f"num_nodes={self.num_nodes}",
                because="products of scores are of degree 4 in Gaussian latents, and n nodes are exact to 2n - 1",
                fix="Write num_nodes=3, or more.",
            )

    # Expectations ---------------------------------------------------------------------------------------------------

    def support(self, num_particles: int = 1) -> Support:
        """Return the nodes and their weights, whatever the number."""
        return self._support

    @cached_property
    def _support(self) -> Support:
        joint, first = self.joint, self.joint.locals[0]
        blocks = [first.plates[dim] if dim in first.block else 1 for dim in range(-joint.nesting, 0)]
        values = joint.values(Point(self._at, self._at[..., :0]))
        weights = self._log_weights.reshape(-1, *blocks)
        return Support(values, weights, joint.nesting, first.scale, first.mask)

    def expected_log_joint(self, num_particles: int = 1) -> Tensor:
        with hold_batch(self.batch):
            return expected_log_joint(self.model, self.args, self.kwargs, self._support, self.vectorize)

    def _require_finite(self, terms: Tensor) -> Tensor:
        bad = terms.isnan() | terms.isposinf() | terms.isneginf().all(0)
        if bool(bad.any()):
            node, block = bad.nonzero()[0].tolist()
            fail(
                NonFiniteError,
                self.joint.obj,
                f"integrate {', '.join(map(repr, self.joint.latents))} out by quadrature",
                got=f"a log density of {float(terms[node, block])} at node {node} of block {block}",
                because="log p(x, z) has to be below infinity at all nodes, and above minus infinity at some",
                fix="Check the support and scale of the model's sites, or use fewer nodes, which lie closer.",
            )
        return terms

    # Draws ----------------------------------------------------------------------------------------------------------

    def particles(self, num_particles: int) -> Particles:
        return self.gaussian.particles(num_particles)

    def sample(self, plates: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        return self.gaussian.sample(plates)

    def marginal(self, site: str) -> Any:
        """Return the distribution of one latent under the Gaussian at the mode."""
        return self.gaussian.marginal(site)


def integrate_at_mode(
    obj: str, model: Callable, args: tuple, kwargs: Mapping[str, Any], *, num_nodes: int, **options: Any
) -> QuadraturePosterior:
    r"""Return the posterior on Gauss-Hermite nodes about the mode of a log joint.

    Args:
        obj: The half-step that asks, for its errors.
        model, args, kwargs: What is run.
        num_nodes: n, per coordinate.
        options: Of `find_mode`.

    Raises:
        StepError: More than 10,000 nodes for a block; by `find_mode`.
        NonFiniteError: By `QuadraturePosterior`.
    """

    def prepare(joint: LogJoint) -> LogJoint:
        joint = joint.in_independent_blocks()
        _require_few(joint, num_nodes)
        return joint

    gaussian = find_mode(obj, model, args, kwargs, prepare=prepare, **options)
    return QuadraturePosterior(gaussian, num_nodes)


def _require_few(joint: LogJoint, num_nodes: int) -> None:
    width = joint.locals[-1].place[1]
    if num_nodes**width <= MAX_NODES:
        return
    digits = width * math.log10(num_nodes)
    size = str(num_nodes**width) if digits < 9 else f"1e{digits:.0f}"
    fewer = next((n for n in range(num_nodes, 2, -1) if n**width <= MAX_NODES), 1)
    fail(
        StepError,
        joint.obj,
        f"integrate {', '.join(map(repr, joint.latents))} out by quadrature",
        got=f"{num_nodes}**{width} = {size} nodes for {width} coordinates that depend on each other",
        because=f"the model is evaluated at each node of their grid, of at most {MAX_NODES}",
        fix=f'Write num_nodes={fewer}, or use steps.MonteCarlo("importance"), whose cost does not grow with a power.',
    )


def _hermite(num_nodes: int, gaussian: GaussianPosterior) -> tuple[Tensor, Tensor]:
    r"""Return the grid ``(S, D)`` and $\log\omega_s+\tfrac12|t_s|^2$; $(2\pi)^{D/2}$ is the Gaussian's `log_det`'s."""
    like = gaussian.mean.local
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    lines = (like.new_tensor(x) for x in (nodes, np.log(weights / weights.sum()) + 0.5 * nodes**2))
    grids = [torch.meshgrid(*[line] * like.shape[-1], indexing="ij") for line in lines]
    grid, logs = (torch.stack([axis.flatten() for axis in axes], -1) for axes in grids)
    return grid, logs.sum(-1)
