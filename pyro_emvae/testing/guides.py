r"""`check_guide`: a guide against a model with few latent dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer import Predictive
from torch import Tensor
from torch.distributions import MultivariateNormal, biject_to

from ..estimators.base import base
from ..evidence.soundness import unequal_handlers, unpaired_auxiliaries
from ..loss import MonteCarloELBO
from ..particles import Particles, check_match, draw, quiet, vectorizable
from .mean import assert_mean

__all__ = ["check_guide"]


def check_guide(
    guide_factory: Callable[[Callable], Callable],
    model: Callable,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int = 20_000,
    seed: int = 0,
    trains: bool = True,
) -> None:
    r"""Prove a guide against a model with few latent dimensions.

    * It draws every latent of the model, with the model's event dims, shape, plates and support.
    * As with Pyro's autoguides, calling it returns a dict of every latent's value.
    * Particles vectorized equal particles run one by one, so its plates are counted from the right.
    * `pyro.infer.Predictive` works with it, in a loop and in parallel.
    * Samples and log q agree: $E_q[h(z)/q(z)]=1$ for a normal density h fitted to the samples in unconstrained space,
      narrower than they are (uniform over the values of a finite site).
    * Each latent has the model's scale and mask, and a point mass is computed from each auxiliary site.
    * The ELBO's gradient is finite and reaches every parameter that the guide uses, of which there is one at least.

    Args:
        guide_factory: Called with the model; returns a guide.
        model: A Pyro model.
        args, kwargs: Its data.
        num_samples: For the importance identity.
        seed: Of all draws.
        trains: Whether the guide has parameters; one that computes its posterior from the model may have none.

    The guide's parameters are in the param store afterwards, as after any run.

    Raises:
        AssertionError: Saying which of these fails.
        ModelError: The sites of model and guide do not match.
        Underpowered: Too many latent dimensions for the importance identity.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Gamma(2.0, 1.0))
        >>> check_guide(AutoNormal, model)
    """
    kwargs = kwargs or {}
    guide = guide_factory(model)
    with quiet(seed=seed):
        returned = guide(*args, **kwargs)
        particles = draw(model, guide, args, kwargs)
        check_match(particles)
    _check_returned(returned, particles)
    with quiet(seed=seed):
        unsound = [*unequal_handlers(particles), *unpaired_auxiliaries(model, guide, args, kwargs)]
    assert not unsound, f"site {unsound[0].site!r}: {unsound[0].message}"
    agrees, nesting, what = vectorizable(model, guide, args, kwargs)
    assert agrees, f"particles cannot be vectorized: {what}"
    _check_predictive(model, guide, args, kwargs, tuple(particles.latents), seed)
    with quiet(seed=seed, validate=False), torch.no_grad():
        many = draw(model, guide, args, kwargs, num_particles=num_samples, vectorize=True, max_plate_nesting=nesting)
    assert_mean(_importance_weights(many), 1.0, detect=0.1, what="E_q[h(z) / q(z)], which compares samples and log q,")
    if trains:
        _check_reach(model, guide, args, kwargs, seed)


def _check_returned(returned: Any, particles: Particles) -> None:
    latents = particles.latents
    assert isinstance(returned, Mapping), f"calling the guide returns {type(returned).__name__}, expected a dict"
    missing = sorted(set(latents) - set(returned))
    assert not missing, f"calling the guide returns {sorted(returned)}, without {missing}"
    for name, site in latents.items():
        shape, expected = tuple(returned[name].shape), tuple(site.fn.shape())
        assert shape == expected, f"site {name!r}: the guide returns shape {shape}, the model draws {expected}"
        inside = bool(torch.as_tensor(site.fn.support.check(site.value)).all())
        assert inside, f"site {name!r}: the guide draws {site.value}, outside the model's {site.fn.support}"


def _check_predictive(model, guide, args: tuple, kwargs: Mapping, latents: tuple[str, ...], seed: int) -> None:
    for parallel in (False, True):
        with quiet(seed=seed):
            predictive = Predictive(model, guide=guide, num_samples=3, return_sites=latents, parallel=parallel)
            drawn = predictive(*args, **kwargs)
        for name in latents:
            good = name in drawn and len(drawn[name]) == 3 and bool(torch.isfinite(drawn[name]).all())
            assert good, f"site {name!r}: Predictive(parallel={parallel}) gives {drawn.get(name)}, not 3 finite draws"


def _importance_weights(particles: Particles) -> Tensor:
    """Return h(z) / q(z) on the second half of the draws, with h fitted to the first."""
    half = particles.num_particles // 2
    log_q = sum(site.log_prob.reshape(particles.num_particles, -1).sum(1) for site in particles.guide.values())
    log_h, columns = torch.zeros_like(log_q), []
    for name, site in particles.latents.items():
        value = particles.values(name)
        if base(site.fn).has_enumerate_support:
            outcomes, per_draw = base(site.fn).enumerate_support(expand=False), base(site.fn).event_shape.numel()
            log_h = log_h - math.log(len(outcomes)) * value[0].numel() / per_draw
            continue
        transform = biject_to(site.fn.support)
        u = transform.inv(value)
        log_h = log_h - transform.log_abs_det_jacobian(u, value).reshape(len(value), -1).sum(-1)
        columns.append(u.reshape(len(u), -1))
    if columns:
        u = torch.cat(columns, -1)
        scale = 0.7 * torch.linalg.cholesky(torch.atleast_2d(torch.cov(u[:half].T)))
        log_h = log_h + MultivariateNormal(u[:half].mean(0), scale_tril=scale).log_prob(u)
    return (log_h - log_q)[half:].exp()


def _check_reach(model, guide, args: tuple, kwargs: Mapping, seed: int) -> None:
    with quiet(seed=seed):
        evaluation = MonteCarloELBO(num_particles=2, vectorize_particles=False).evaluate(model, guide, args, kwargs)
    leaves = {n: t for n, t in evaluation.particles.params["guide"].items() if t.requires_grad}
    assert leaves, "the guide has no parameter that requires a gradient: a fit cannot change it"
    assert evaluation.surrogate.requires_grad, f"none of the guide's parameters {sorted(leaves)} gets a gradient"
    grads = torch.autograd.grad(evaluation.surrogate, list(leaves.values()), allow_unused=True)
    for name, g in zip(leaves, grads, strict=True):
        assert g is not None, f"the guide's parameter {name!r} gets no gradient"
        g = g.to_dense() if g.is_sparse else g
        assert bool(torch.isfinite(g).all()), f"the guide's parameter {name!r} gets the gradient {g}"
