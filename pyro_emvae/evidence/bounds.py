r"""The three questions after a fit: how high is the ELBO, how high the evidence, and how far apart are they."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .._checks import EmvaeError, NonFiniteError, fail
from .._registry import create
from ..posterior import proposal
from .estimate import Estimate, Gap
from .importance import EvidenceMethod, importance_estimate, per_datum
from .layout import Request
from .weights import Weights, collect

__all__ = ["elbo", "elbo_gap", "log_evidence"]


def elbo(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int = 1000,
    vectorize_particles: bool | None = None,
    max_plate_nesting: int | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Estimate:
    r"""Estimate the evidence lower bound, with its standard error.

    $$L=E_q[\log p(x,z)-\log q(z)]\approx\frac1K\sum_k\big[\log p(x,z_k)-\log q(z_k)\big].$$

    Scales, masks and subsampling count as in training, so a minibatch gives an unbiased estimate of the ELBO of all
    data. All particles then see the same minibatch, and the standard error is that of the particles alone.

    Args:
        model, guide: As in Pyro; ``*args, **kwargs`` are the data.
        num_particles: K.
        vectorize_particles: One run under a particle plate (True; raises if particles then differ from single runs),
            a loop (False), or None: two particles are run both ways; if they disagree, it loops and warns.
        max_plate_nesting: Number of plate dims; found out if None.
        chunk_size: Particles per run of the model; by default as many as fit into about 2e7 numbers. Draws come chunk
            by chunk, so another size gives other draws.
        seed: Of a forked generator; None goes on from the present state of torch's, which is left where it was.

    Modules run in eval mode; modes, buffers and generators are as before when it ends, also on error. A guide that
    makes its parameters when it is called first makes them here.

    Returns:
        An `Estimate`, with ``per_datum`` where all latent sites share a plate and the data in it are independent given
        the rest. Its ``kind`` is ``"none"`` and its ``note`` says why where log p - log q is no bound, though it may be
        what was trained: a scale or mask differs between model and guide, as with ``obs_mask=`` and `AutoNormal`, or
        no latent is computed from an auxiliary guide site.

    Raises:
        EmvaeError: A number of particles below one; ``max_plate_nesting`` below the number of plate dims.
        DataError: The data are empty.
        ModelError: Sites of model and guide do not match, or have batch dims that no plate declares; particles cannot
            be vectorized with True.
        NonFiniteError: log p - log q is not finite; names the first site.

    Example:
        >>> from pyro_emvae.evidence import elbo
        >>> from pyro_emvae.problems import linear_gaussian
        >>> problem = linear_gaussian()
        >>> estimate = elbo(problem.model, problem.guide, *problem.args, seed=0)
        >>> estimate.kind, bool(abs(estimate.value - problem.elbo()) < 4 * estimate.standard_error)
        ('lower', True)
    """
    how = (num_particles, vectorize_particles, max_plate_nesting, chunk_size, seed)
    request = Request("elbo", model, guide, args, kwargs, *how)
    return _elbo_estimate(request, collect(request))


def log_evidence(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    method: str | EvidenceMethod = "importance",
    num_particles: int = 5000,
    vectorize_particles: bool | None = None,
    max_plate_nesting: int | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Estimate:
    r"""Estimate the log evidence log p(x), the parameters held fixed.

    Each datum gets weights of its own where every latent site lies in a plate; a plate's subsampling scale is then
    applied after the logarithm. With a latent outside, or where one datum's density moves with another's latents (two
    draws are mixed to see that), one weight covers everything, and a minibatch is refused.

    Args:
        model, guide: As in Pyro; ``*args, **kwargs`` are the data. All guide sites count in log q, auxiliary ones too.
            The guide of a Monte Carlo E-step, whose draws have no density, is replaced by the exact posterior of
            discrete latents, or by Laplace's approximation; ``note`` says so.
        method: ``"importance"``, ``"quadrature"`` (at most four latent coordinates per datum; takes no guide: None) or
            an instance; see `Importance` and `Quadrature`.
        num_particles: K.
        vectorize_particles, max_plate_nesting, chunk_size, seed: As for `elbo`, which makes the same draws from the
            same of these.

    Returns:
        An `Estimate`: ``value``, ``standard_error``, ``kind``, ``ess``, ``khat``, ``bias``, ``per_datum``. The standard
        error is by the delta method, per datum, since data are independent given the parameters. Look at ``khat``
        before believing either. A site at which the guide is a point mass (`AutoDelta`) is not integrated over but
        ``given``.

    Raises:
        EmvaeError: Unknown method; a minibatch under one joint weight; nothing but point masses; as for `elbo`.
        DataError: The data are empty.
        ModelError: As for `elbo`; also where log p - log q is no bound.
        NonFiniteError: A log weight is NaN or +inf, or all weights of a datum are zero.

    Example:
        >>> from pyro_emvae.evidence import log_evidence
        >>> from pyro_emvae.problems import categorical
        >>> problem = categorical()
        >>> estimate = log_evidence(problem.model, problem.guide, *problem.args, seed=0)
        >>> bool(abs(estimate.value - problem.log_evidence()) < 4 * estimate.standard_error)
        True
        >>> estimate.per_datum.plates, tuple(estimate.per_datum.value.shape)
        (('data',), (5,))
    """
    how = (num_particles, vectorize_particles, max_plate_nesting, chunk_size, seed)
    drawn = not getattr(guide, "has_density", True)
    guide = proposal("log_evidence", model) if drawn else guide
    found = _method(method).estimate(Request("log_evidence", model, guide, args, kwargs, *how))
    if not drawn:
        return found
    what = "the exact posterior" if guide.is_exact else "Laplace's approximation"
    text = f"the proposal is {what}, for the guide's draws have no density"
    return replace(found, note="; ".join(filter(None, (found.note, text))))


def elbo_gap(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int = 5000,
    vectorize_particles: bool | None = None,
    max_plate_nesting: int | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Gap:
    r"""Estimate $\log p(x)-L=KL(q\|p(z|x))$ from one set of draws.

    $$\hat g=\sum_n\frac NB\Big[\log\frac1K\sum_k w_{nk}-\frac1K\sum_k\log w_{nk}\Big]\ge0.$$

    Both terms come from the same draws, so their errors cancel in part: the standard error is paired. In expectation
    the estimate lies below the gap, as importance sampling lies below log p(x).

    Args: As for `log_evidence` by importance sampling.

    Returns:
        A `Gap`. With `guides.AutoSemiAmortized` it is that of the guide's encoder alone, from the same draws:
        ``amortization`` is what refinement gains, ``approximation`` what it leaves. They hold for the family if there
        are enough refinements: ``guide.num_refinements = 200``. With another guide both are None.

    Raises: As `log_evidence`; also NonFiniteError if a weight is zero, for then the gap is infinite.

    Source: Cremer et al. 2018, "Inference suboptimality in variational autoencoders", for the names of the parts.

    Example:
        >>> from pyro_emvae.evidence import elbo_gap
        >>> from pyro_emvae.problems import linear_gaussian
        >>> problem = linear_gaussian()
        >>> gap = elbo_gap(problem.model, problem.guide, *problem.args, seed=0)
        >>> exact = problem.log_evidence() - problem.elbo()
        >>> bool(abs(gap.total - exact) < 4 * gap.standard_error)
        True
    """
    how = (num_particles, vectorize_particles, max_plate_nesting, chunk_size, seed)
    gap = _gap(Request("elbo_gap", model, guide, args, kwargs, *how))
    encoder = getattr(guide, "amortized", None)
    if encoder is None:
        return gap
    request = Request("elbo_gap", model, encoder, args, kwargs, *how)
    start = _elbo_estimate(request, collect(request))
    amortization = gap.elbo.value - start.value
    return Gap(
        total=gap.total + amortization,
        standard_error=math.hypot(gap.log_evidence.standard_error, start.standard_error),
        elbo=start,
        log_evidence=gap.log_evidence,
        approximation=gap.total,
        amortization=amortization,
    )


def _gap(request: Request) -> Gap:
    """Estimate the gap of the request's guide."""
    weights = collect(request)
    evidence = importance_estimate(request, weights)
    lower = _elbo_estimate(request, weights)
    moments = weights.per_datum if weights.by_datum else weights.joint
    scale = weights.layout.scale if weights.by_datum else 1.0
    gaps = moments.log_mean_exp - moments.mean
    return Gap(
        total=scale * float(gaps.sum()),
        standard_error=scale * math.sqrt(float(moments.gap_variance.sum())),
        elbo=lower,
        log_evidence=evidence,
        per_datum=per_datum(weights, gaps, moments.gap_variance),
    )


def _elbo_estimate(request: Request, weights: Weights) -> Estimate:
    joint, own, unsound = weights.joint, weights.per_datum, weights.unsound
    value = float(joint.mean)
    if not math.isfinite(value):
        fail(
            NonFiniteError,
            request.obj,
            "average log p - log q",
            got=f"a mean of {value}",
            because="a draw of the guide has probability zero under the model, so the ELBO is minus infinity",
            fix="Give the guide the support of the model's sites.",
        )
    return Estimate(
        value=value,
        standard_error=math.sqrt(float(joint.mean_variance)),
        kind="none" if unsound else "exact" if _is_exact(request, weights) else "lower",
        num_particles=weights.num_particles,
        per_datum=per_datum(weights, own.mean, own.mean_variance) if own is not None else None,
        given=weights.layout.given,
        note=f"site {unsound.site!r}: {unsound.message}" if unsound else weights.together,
    )


def _is_exact(request: Request, weights: Weights) -> bool:
    """Whether the bound is the log evidence: no latents, or a guide that is the posterior."""
    return weights.layout.shared is None or bool(getattr(request.guide, "is_exact", False))


def _method(method: Any) -> EvidenceMethod:
    made = create("evidence", method)
    if not isinstance(made, EvidenceMethod):
        fail(
            EmvaeError,
            "log_evidence",
            "use this method",
            got=repr(method),
            because="a method is a registered name or an EvidenceMethod",
            fix='Write method="importance".',
        )
    return made
