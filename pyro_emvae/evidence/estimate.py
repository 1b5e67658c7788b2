r"""What an estimate is: a value, its standard error, what it bounds, and how much to believe it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Estimate", "Gap", "PerDatum"]

UNRELIABLE = 0.7  # the k-hat above which averages over weights say little (Vehtari et al. 2024)


@dataclass(frozen=True, eq=False)
class PerDatum:
    r"""An estimate taken apart into data, each with its own importance weights.

    The total is ``constant + scale * value.sum()``.

    Args:
        plates: Names of the plates that all latent sites share, in the order of the tensors' dims.
        scale: full size / size of these plates: how often each datum counts if they are subsampled.
        value: The estimate per datum, unscaled, in nats.
        standard_error: Its standard error per datum; NaN from a single particle.
        ess: Effective sample size per datum, at most the number of particles; None for an ELBO.
        khat: Pareto tail index of the weights per datum; None for an ELBO.
        constant: Terms of no datum and no latent, such as a prior on parameters; in nats.

    Shape: ``value, standard_error, ess, khat``: ``(*plates)``, float64.
    """

    plates: tuple[str, ...]
    scale: float
    value: Tensor
    standard_error: Tensor
    ess: Tensor | None = None
    khat: Tensor | None = None
    constant: float = 0.0

    def __len__(self) -> int:
        return self.value.numel()

    def __repr__(self) -> str:
        shape = ", ".join(f"{name}: {size}" for name, size in zip(self.plates, self.value.shape, strict=True))
        scale = f", each counted {self.scale:g} times" if self.scale != 1 else ""
        return f"PerDatum({shape}; mean {format_estimate(float(self.value.mean()), self._mean_error())} nats{scale})"

    def _mean_error(self) -> float:
        return float(self.standard_error.square().sum().sqrt()) / len(self)


@dataclass(frozen=True, eq=False)
class Estimate:
    r"""An estimate of log p(x), or of a bound of it, in nats, summed over the data; ``float(estimate)`` is its value.

    Args:
        value: The estimate.
        standard_error: Of the particles, for the minibatch at hand; NaN from a single particle. Of `Quadrature`:
            how far two lattices are apart.
        kind: What the value's *expectation* is to log p(x): ``"lower"``, ``"upper"``, ``"exact"``, or ``"none"``: no
            bound, for the reason in ``note``.
        num_particles: K, the draws of the guide; the nodes of a quadrature.
        ess: Effective sample size of the weights, the smallest over the data; None for an ELBO.
        khat: Pareto tail index of the weights, the largest over the data; above 0.7 neither the value nor its standard
            error can be trusted, and it prints as unreliable; -inf for equal weights. None for an ELBO, or where there
            are too many data for it.
        khat_se: Its standard error.
        bias: How far the value's expectation lies from log p(x), to first order in 1/K: minus half the relative
            variance of the weights over K, summed over the data. Below the standard error for one datum, it grows with
            their number and the standard error only with its root. None for an ELBO, whose bias is the gap.
        per_datum: The same per datum, where every latent site lies in a plate.
        given: Sites at which the guide is a point mass: theirs is the log joint density, they are not integrated over.
        note: Why it is no bound, why the data of a plate have one weight together, or what the proposal is.
    """

    value: float
    standard_error: float
    kind: str
    num_particles: int
    ess: float | None = None
    khat: float | None = None
    khat_se: float | None = None
    bias: float | None = None
    per_datum: PerDatum | None = field(default=None, repr=False)
    given: tuple[str, ...] = ()
    note: str = ""

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        many = self.per_datum is not None
        parts = [f"{format_estimate(self.value, self.standard_error)} nats", self._bound(), _draws(self.num_particles)]
        if self.ess is not None:
            parts.append(f"ess {'>=' if many else '='} {self.ess:.1f}")
        if self.khat is not None:
            parts.append(self._tail("<=" if many else "="))
        if many:
            parts.append(f"{len(self.per_datum)} data")
        if self.note:
            parts.append(self.note)
        return f"Estimate({', '.join(parts)})"

    def _bound(self) -> str:
        target = f"log p({', '.join(('x', *self.given))})"
        if self.kind == "none":
            return f"no bound of {target}"
        return target if self.kind == "exact" else f"{self.kind} bound of {target}"

    def _tail(self, relation: str) -> str:
        if math.isinf(self.khat) and self.khat < 0:
            return "equal weights" if self.ess > (1 - 1e-6) * self.num_particles else "equal largest weights"
        doubt = ": unreliable" if self.khat > UNRELIABLE else ""
        return f"khat {relation} {self.khat:.2f} +- {self.khat_se:.2f}{doubt}"


@dataclass(frozen=True, eq=False)
class Gap:
    r"""How far the ELBO lies below the log evidence, $KL(q\|p(z|x))$, from one set of draws.

    Args:
        total: log evidence - ELBO, in nats, summed over the data.
        standard_error: Paired: both come from the same draws. With `amortization`, that of both taken as independent.
        elbo, log_evidence: The two estimates.
        per_datum: The gap per datum, where every latent site lies in a plate.
        approximation: The gap of the best member of the guide's family per datum; None unless the guide can refine
            its answer for a datum.
        amortization: What the guide loses against that by answering for all data with one network; None likewise.
    """

    total: float
    standard_error: float
    elbo: Estimate
    log_evidence: Estimate
    per_datum: PerDatum | None = field(default=None, repr=False)
    approximation: float | None = None
    amortization: float | None = None

    def __float__(self) -> float:
        return self.total

    def __repr__(self) -> str:
        first = format_estimate(self.total, self.standard_error)
        if self.amortization is not None:
            first += f" nats: approximation {self.approximation:.5g}, amortization {self.amortization:.5g}"
        return f"Gap({first} nats, elbo={self.elbo!r}, log_evidence={self.log_evidence!r})"


def format_estimate(value: float, standard_error: float) -> str:
    """Return both numbers to two digits of the standard error.

    Example:
        >>> format_estimate(-123.45678, 0.0123), format_estimate(-1.5, float("nan"))
        ('-123.457 +- 0.012', '-1.50000 +- nan')
    """
    usable = math.isfinite(standard_error) and standard_error > 0
    digits = min(max(1 - math.floor(math.log10(standard_error)), 0), 12) if usable else 5
    return f"{value:.{digits}f} +- {standard_error:.{digits}f}"


def _draws(number: int) -> str:
    return f"{number} particle{'s' if number != 1 else ''}"
