r"""The evidence by quadrature, for few latent dimensions per datum."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .._checks import EmvaeError, NonFiniteError, fail, positive_int
from .._registry import register
from ..particles import quiet
from ..posterior import BlockDensity, Prior
from .estimate import Estimate, PerDatum
from .importance import EvidenceMethod
from .lattice import Frame, Lattice, Spread, TooMany, integrate
from .layout import Layout, Request, look
from .soundness import entangled_site

__all__ = ["Quadrature"]

MAX_DIMS = 4
CHUNK_FLOATS = 4_000_000
SURPRISE = 6.0


@dataclass(frozen=True)
class Quadrature(EvidenceMethod):
    r"""The trapezoidal rule on lattices that adapt to each datum's posterior.

    $$\log p(x)=\sum_n\frac NB\log\int p(x_n,z(u))\,\Big|\frac{dz}{du}\Big|\,du,\qquad u\in\mathbb R^D,\ D\le4.$$

    `num_particles` draws from the prior say where the mass is; lattices take it from there (`lattice.integrate`). No
    guide is used, it may be None: every latent is integrated over, in unconstrained coordinates.

    When to use: continuous latents, at most four coordinates per datum, and log p(x) wanted without the doubts of
    importance weights; also after E-steps whose posterior has no density, such as Markov chains. Cost: as many runs of
    the model as nodes, 2,000 to 20,000 in three dimensions; it grows with the power of D. A mode that no draw from the
    prior came near is missed; if the draws weigh significantly more than what was found, that is an error.

    Args:
        tol: Nats per datum, on average, that the last two lattices may differ by. In float32, 1e-5 is within reach.
        max_nodes: Nodes per datum at most.

    The estimate's ``standard_error`` is no statistical one: it is the sum over the data of these differences, and
    ``num_particles`` the nodes per datum. The last lattice is usually closer to the integral than to the one before.

    Raises:
        EmvaeError: More than four coordinates that depend on each other, as with a global latent beside local ones; a
            minibatch of data with a common latent; two lattices that do not agree within `max_nodes`; draws from the
            prior that contradict them.
        StepError: A discrete latent.
        NonFiniteError: A density that is NaN or infinite.

    Source: Naylor and Smith 1982, "Applications of a method for the efficient computation of posterior distributions";
    Trefethen and Weideman 2014, "The exponentially convergent trapezoidal rule". Differs: equal steps in a ball that
    adapts, in place of Gauss-Hermite nodes, for posteriors of several modes.

    Example:
        >>> from pyro_emvae.evidence import Quadrature, log_evidence
        >>> from pyro_emvae.problems import linear_gaussian
        >>> problem = linear_gaussian()
        >>> found = log_evidence(problem.model, None, *problem.args, method=Quadrature(tol=1e-9), seed=0)
        >>> bool(abs(found.value - problem.log_evidence()) < 1e-8)
        True
    """

    name: ClassVar[str] = "quadrature"
    bounds: ClassVar[str] = "exact"

    tol: float = 1e-3
    max_nodes: int = 100_000

    def __post_init__(self) -> None:
        positive_int("Quadrature", "max_nodes", self.max_nodes)
        if not isinstance(self.tol, int | float) or not 0 < self.tol < 1:
            fail(
                EmvaeError,
                "Quadrature",
                "use tol",
                got=repr(self.tol),
                because="it is a number of nats between 0 and 1",
                fix="Write tol=1e-3.",
            )

    def estimate(self, request: Request) -> Estimate:
        request = replace(request, guide=Prior(request.model))
        with quiet(seed=request.seed, train=False), torch.no_grad():
            layout = look(request)
            density = _density(request, layout)
            chunk = request.chunk_size or max(1, CHUNK_FLOATS // layout.floats)
            with quiet(validate=False):
                lattice, errors = self._integrate(request, density, chunk)
        return _estimate(density, lattice, errors)

    def _integrate(self, request: Request, density: BlockDensity, chunk: int) -> tuple[Lattice, Tensor]:
        scan = _Scan.of(request, density, chunk)

        def evaluate(u: Tensor) -> Tensor:
            return _finite(request, density.at(u.to(scan.dtype)).double())

        how = {"tol": self.tol, "chunk": chunk, "max_nodes": self.max_nodes}
        try:
            lattice, errors = integrate(evaluate, scan.frame, scan.spread, **how)
        except TooMany as found:
            nodes, error = found.args
            apart = "" if math.isnan(error) else f"two lattices that differ by {error:.2g} nats per datum, and "
            fail(
                EmvaeError,
                request.obj,
                f"integrate by quadrature to tol={self.tol:g}",
                got=f"{apart}{nodes} nodes for the next lattice",
                because=f"max_nodes={self.max_nodes} limits what it may cost",
                fix=f"Write Quadrature(tol={10 * self.tol:g}), raise max_nodes, or use method='importance'.",
            )
        scan.check(request, lattice.log_integral, errors)
        return lattice, errors


@dataclass(frozen=True)
class _Scan:
    r"""What draws from the prior say of each block's posterior.

    ``spread.log_sum`` and ``squares`` are the logs of the sums of likelihoods and of their squares.
    """

    frame: Frame
    spread: Spread
    squares: Tensor
    count: int
    dtype: torch.dtype

    @classmethod
    def of(cls, request: Request, density: BlockDensity, chunk: int) -> _Scan:
        count, prior, spread, squares = request.num_particles, Spread(), Spread(), []
        for start in range(0, count, chunk):
            u, log_weights = density.draw_prior(min(chunk, count - start))
            log_weights = _finite(request, log_weights.double()).expand(u.shape[:2])
            spread.update(log_weights, u.double())
            prior.update(torch.zeros_like(log_weights), u.double())
            squares.append((2 * log_weights).logsumexp(0))
        empty = spread.log_sum.isneginf()
        if bool(empty.any()):
            fail(
                NonFiniteError,
                request.obj,
                "find where the posterior is",
                got=f"{count} draws from the prior of likelihood zero at block {int(empty.nonzero()[0])}",
                because="the lattice starts where the prior's draws have mass",
                fix="Raise num_particles, or use method='importance' with a guide.",
            )
        width = u.shape[-1]
        apart = count ** (-2 / width) * prior.covariance  # draws tell no more than what lies between them
        floor = 1e-8 * torch.eye(width, dtype=torch.float64, device=u.device)
        frame = Frame.around(spread.mean, spread.covariance + apart + floor)
        return cls(frame, spread, torch.stack(squares).logsumexp(0), count, u.dtype)

    def check(self, request: Request, log_integral: Tensor, errors: Tensor) -> None:
        """Raise if the draws weigh significantly more than the integral: then a part of it was not found."""
        mean = self.spread.log_sum - math.log(self.count)
        deviation = ((self.squares - 2 * self.spread.log_sum).exp() - 1 / self.count).clamp(min=0).sqrt()
        missing = 1 - (log_integral - mean).exp()
        bad = missing > SURPRISE * deviation + 10 * errors + 1e-4
        if bool(bad.any()):
            place = int(bad.nonzero()[0])
            fail(
                EmvaeError,
                request.obj,
                "integrate by quadrature",
                got=f"log p = {float(log_integral[place]):.6g} at block {place}, where draws from the prior give "
                f"{float(mean[place]):.6g} +- {float(deviation[place]):.2g}",
                because="a part of the posterior lies where no lattice was put",
                fix="Raise num_particles, the draws that say where to look, or use method='importance'.",
            )


def _density(request: Request, layout: Layout) -> BlockDensity:
    """Return the log joint density in blocks, of at most so many coordinates."""
    if layout.shared is None:
        _refuse(request, "a model without latents", "there is nothing to integrate over", "elbo(...), which is exact")
    crossed = entangled_site(*request.program, layout.shared) if layout.shared else None
    subsampled = layout.subsampled if layout.shared and not crossed else layout.all_subsampled
    if subsampled:
        what = f"a subsampled plate {subsampled[0]!r} of data with a common latent"
        _refuse(request, what, "scaled up, the evidence of a minibatch bounds nothing", "elbo(...), or all data")
    density = BlockDensity.of(
        request.obj,
        request.model,
        request.args,
        request.kwargs,
        single=crossed is not None,
        vectorize=request.vectorize_particles,
        max_plate_nesting=request.max_plate_nesting,
    )
    width = density.shape[1]
    if width > MAX_DIMS:
        why = f", for site {crossed!r} of one datum depends on another's" if crossed else ""
        what = f"{width} coordinates that depend on each other{why}"
        _refuse(request, what, f"nodes grow with the power of the dimension, of at most {MAX_DIMS}", "importance")
    return density


def _refuse(request: Request, got: str, because: str, instead: str) -> None:
    instead = "method='importance'" if instead == "importance" else instead
    fail(EmvaeError, request.obj, "integrate by quadrature", got=got, because=because, fix=f"Use {instead}.")


def _finite(request: Request, log_density: Tensor) -> Tensor:
    bad = log_density.isnan() | log_density.isposinf()
    if bool(bad.any()):
        fail(
            NonFiniteError,
            request.obj,
            "integrate by quadrature",
            got=f"a log density of {float(log_density[bad][0])} at block {int(bad.nonzero()[0, 1])}",
            because="log p(x, z) has to be a number below infinity at all latents",
            fix="Check the data and the support and scale of the model's sites.",
        )
    return log_density


def _estimate(density: BlockDensity, lattice: Lattice, errors: Tensor) -> Estimate:
    joint, values = density.joint, lattice.log_integral
    scale = joint.scale
    frames = sorted(joint.plates, key=lambda frame: frame.dim)
    per_datum = None
    if frames and not isinstance(scale, Tensor):
        shape = [joint.locals[0].plates[frame.dim] for frame in frames]
        names = tuple(frame.name for frame in frames)
        per_datum = PerDatum(names, scale, values.reshape(shape), errors.reshape(shape), constant=joint.rest)
    return Estimate(
        value=joint.rest + float((scale * values).sum()),
        standard_error=float((scale * errors).sum()),
        kind="exact",
        num_particles=len(lattice.used),
        per_datum=per_datum,
    )


register(
    "evidence",
    "quadrature",
    Quadrature,
    summary="adaptive lattices, for at most four latent coordinates per datum",
    source="Naylor and Smith 1982; Trefethen and Weideman 2014",
)
