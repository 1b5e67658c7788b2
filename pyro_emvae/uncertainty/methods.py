r"""Standard errors after maximum likelihood by EM."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import EmvaeError, fail, positive_int, require_data
from ..driver import Fit
from ..posterior import GuidePosterior, Posterior
from .bootstrap import bootstrap
from .coordinates import coordinates
from .errors import Delta, StandardErrors
from .information import Problem, kind_of

__all__ = ["standard_errors"]

METHODS = ("louis", "opg", "hessian", "bootstrap")


def standard_errors(
    fit: Fit,
    *args: Any,
    method: str | None = None,
    sandwich: bool = False,
    num_particles: int = 100,
    n_boot: int = 200,
    seed: int = 0,
    **kwargs: Any,
) -> StandardErrors:
    r"""Standard errors of the model's parameters, from the information in the data.

    | method | information | needs |
    |---|---|---|
    | ``"hessian"`` | $-\nabla^2\log p(x)$ | an exact E-step, or `steps.Laplace` with nodes |
    | ``"louis"`` | $E[-\nabla^2\log p(x,z)]-\sum_n\mathrm{Var}(\nabla\log p(x_n,z_n))$ | latents in plates |
    | ``"opg"`` | $\sum_n\nabla\log p(x_n)\,\nabla\log p(x_n)^\top$ | independent data in a plate |
    | ``"bootstrap"`` | none: the spread of `n_boot` fits to resampled rows | all tensors in rows |

    Expectation and variance are over the posterior. The first two are the same number after an exact E-step. Louis's
    formula also works on draws; the result then has its own Monte Carlo error, by the jackknife over the draws. On the
    nodes of a quadrature both are the curvature of its approximation of log p(x).
    Derivatives are taken by unconstrained coordinates, and carried to the parameters by the delta method.

    When to use: regular maximum likelihood, at the maximum (the result's ``note`` says how far the fit is from it). It
    is NaN, with the reason in ``status``, for what is at a boundary (a variance or a weight of zero), not identified
    (the rotation of a factor model's weights), or no maximum.

    Args:
        fit: What `EM.run` returned; its values count, whatever was done to the parameters since.
        args, kwargs: All the data of the fit.
        method: A name of the table; None: ``"hessian"`` after an exact E-step, else ``"louis"``.
        sandwich: $\mathcal I^{-1}B\,\mathcal I^{-1}$ with B the matrix of ``"opg"``: valid if the model is not true.
        num_particles: Draws of a guide. Those of `steps.MonteCarlo` are the step's own number.
        n_boot: Fits of the bootstrap; each starts at the estimate.
        seed: Of draws and of resampling.

    Returns:
        A table that prints itself, with ``standard_error``, ``status`` and ``covariance``; ``result["name"]`` is one
        parameter's, in its shape. `Fit.summary` takes it.

    Raises:
        EmvaeError: An unknown method; an E-step that is not exact, for the Hessian; a minibatch; fewer than two
            independent data; more than 2,000 parameters.
        StepError: Latents that all data share, or a chain, where the method takes scores datum by datum.

    Source: Louis 1982, eq. 3.2; Berndt, Hall, Hall and Hausman 1974 for the outer product; Huber 1967 and White
    1982 for the sandwich; Efron 1979.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_emvae import EM, steps
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0, dtype=torch.float64))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.arange(8, dtype=torch.float64)
        >>> m_step = steps.ClosedForm(lambda v, x: {"z": v["z"]}, lambda s, p: {"loc": s["z"] / 8})
        >>> pyro.clear_param_store()
        >>> print(standard_errors(EM(model, e_step=steps.Gaussian(), m_step=m_step).run(x, stop=None, max_iter=100), x))
        parameter                estimate   std. error  status
        loc                           3.5          0.5  defined
        method hessian, exact
    """
    _check(fit, method, sandwich, num_particles, n_boot)
    require_data("standard_errors", args, kwargs)
    where = coordinates(fit)
    if where.parameters.subsampled:
        _refuse(
            "use a minibatch", "a plate that is subsampled", "the information is that of all data", "Pass all data."
        )
    if method == "bootstrap":
        return bootstrap(fit, where, args, kwargs, n_boot, seed)
    infer = getattr(fit.inference, "posterior", None) or (lambda *a, **k: GuidePosterior(fit.model, fit.guide, a, k))
    problem = Problem(where, infer, args, kwargs, num_particles, seed)
    posterior = problem.posterior()
    method = method or ("hessian" if posterior.is_exact else "louis")
    return _from_information(problem, posterior, method, sandwich)


def _from_information(problem: Problem, posterior: Posterior, method: str, sandwich: bool) -> StandardErrors:
    where, again = problem.coordinates, []
    outer = _outer_product(problem, posterior) if sandwich or method == "opg" else None
    if method == "hessian":
        information = _hessian(problem, posterior)
    elif method == "louis":
        information, again = problem.complete(posterior).louis()
    else:
        information = outer
    score = problem.score(posterior, where.start)
    delta = Delta(where, information, score)
    covariance = delta.covariance(outer if sandwich else None)
    error = covariance.diagonal().clamp_min(0).sqrt()
    repeats = [Delta(where, i, score).covariance(outer if sandwich else None).diagonal().sqrt() for i in again]
    return StandardErrors(
        f"{method}, sandwich" if sandwich else method,
        kind_of(posterior),
        where.places,
        where.estimate,
        error,
        delta.reasons(),
        covariance,
        _jackknife(repeats, error),
        delta.note,
    )


def _hessian(problem: Problem, posterior: Posterior) -> Tensor:
    if kind_of(posterior) not in ("exact", "quadrature"):
        _refuse(
            "differentiate log p(x)",
            f"a posterior of kind {posterior.kind!r}",
            "only after an exact E-step is the gradient of the expected log joint that of log p(x)",
            'Write method="louis", or e_step=steps.Enumerated(), steps.Gaussian() or steps.Laplace(num_nodes=9) where '
            "they fit.",
        )
    return problem.hessian(posterior)


def _outer_product(problem: Problem, posterior: Posterior) -> Tensor:
    scores, scale = problem.complete(posterior).per_datum()
    if len(scores) < 2:
        _refuse(
            "take the outer product of scores per datum",
            f"{len(scores)} independent datum",
            "data are the elements of the plates that all latents share",
            'Put the latents into the plate of the data, or write method="hessian".',
        )
    weight = torch.where(scale > 0, scale, 1.0).rsqrt() * (scale > 0)
    return (weight[:, None] * scores).mT @ (weight[:, None] * scores)


def _jackknife(repeats: list[Tensor], error: Tensor) -> Tensor:
    """Return the jackknife's standard error of the standard errors; NaN without draws."""
    if len(repeats) < 2:
        return torch.full_like(error, math.nan)
    stacked = torch.stack(repeats)
    return ((len(repeats) - 1) / len(repeats) * (stacked - stacked.mean(0)).square().sum(0)).sqrt()


def _check(fit: Any, method: Any, sandwich: bool, num_particles: Any, n_boot: Any) -> None:
    if not isinstance(fit, Fit):
        _refuse(
            "use its fit",
            repr(fit)[:80],
            "it needs the model, the parameters and the E-step",
            "Write standard_errors(em.run(x), x).",
        )
    if method is not None and method not in METHODS:
        _refuse("use its method", repr(method), f"it is one of {', '.join(METHODS)}", 'Write method="louis".')
    if sandwich and method in ("opg", "bootstrap"):
        _refuse(
            f"put {method!r} into a sandwich",
            f"method={method!r} with sandwich=True",
            "its bread is the observed information",
            'Write method="louis" or "hessian" with sandwich=True.',
        )
    positive_int("standard_errors", "num_particles", num_particles)
    if positive_int("standard_errors", "n_boot", n_boot) < 2:
        _refuse("measure a spread", "n_boot=1", "it takes two fits at least", "Write n_boot=200.")


def _refuse(act: str, got: str, because: str, fix: str) -> None:
    fail(EmvaeError, "standard_errors", act, got=got, because=because, fix=fix)
