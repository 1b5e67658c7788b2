r"""Observed information and scores of the model's parameters, from the posterior that an E-step leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._checks import EmvaeError, fail
from ..posterior import CompleteData, GuidePosterior, Posterior, Support, complete_data, second_order_support
from .coordinates import Coordinates

__all__ = ["Problem"]


@dataclass(frozen=True)
class Problem:
    r"""A model at a fit's parameters, its data, and the E-step.

    Args:
        coordinates: The parameters u.
        infer: ``infer(*args, **kwargs)``, the E-step's posterior at the present parameters.
        args, kwargs: The data.
        num_particles: Draws of a posterior that has to be drawn from.
        seed: Of these draws.
    """

    coordinates: Coordinates = field(repr=False)
    infer: Callable[..., Posterior] = field(repr=False)
    args: tuple = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)
    num_particles: int
    seed: int

    def posterior(self, u: Tensor | None = None) -> Posterior:
        """Return the posterior at u, that of the fit if None."""
        with self.coordinates.at(self.coordinates.start if u is None else u.detach()), torch.no_grad():
            torch.manual_seed(self.seed)
            return self.infer(*self.args, **self.kwargs)

    def score(self, posterior: Posterior, u: Tensor) -> Tensor:
        r"""Return $\nabla_u\log p(x)=\nabla_uE[\log p_u(x,z)]$, Fisher's identity: ``(P,)``."""
        u = u.detach().clone().requires_grad_()
        with self.coordinates.at(u):
            torch.manual_seed(self.seed)
            return _gradient(posterior.expected_log_joint(self.num_particles), u)

    # The likelihood's Hessian ---------------------------------------------------------------------------------------

    def hessian(self, posterior: Posterior) -> Tensor:
        r"""Return $-\nabla^2_u\log p(x)$, for exact posteriors and quadratures: by automatic differentiation of the
        evidence where the posterior offers it, else by central differences of the exact score."""
        found = self._differentiated(posterior)
        return self._differenced(posterior) if found is None or not bool(torch.isfinite(found).all()) else found

    def _differentiated(self, posterior: Posterior) -> Tensor | None:
        evidence = getattr(posterior, "log_evidence_at_theta", None)
        if evidence is None:
            return None
        u = self.coordinates.start.clone().requires_grad_()
        with self.coordinates.at(u):
            return -_hessian(evidence(), u)

    def _differenced(self, posterior: Posterior) -> Tensor:
        """Differences of fourth order, with steps of about a hundredth of the complete data's standard error."""
        start = self.coordinates.start
        fine = torch.finfo(start.dtype).eps ** 0.125
        steps = fine * self._complete_spread(posterior)
        columns = []
        for place, step in enumerate(steps.tolist()):
            total = torch.zeros_like(start)
            for offset, weight in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
                u = start.clone()
                u[place] += offset * step
                total += weight * self.score(self.posterior(u), u)
            columns.append(-total / (12 * step))
        matrix = torch.stack(columns, 1)
        return 0.5 * (matrix + matrix.mT)

    def _complete_spread(self, posterior: Posterior) -> Tensor:
        u = self.coordinates.start.clone().requires_grad_()
        with self.coordinates.at(u):
            torch.manual_seed(self.seed)
            diagonal = -_hessian(posterior.expected_log_joint(self.num_particles), u).diagonal()
        usual = u.detach().abs().clamp_min(1.0)
        return torch.where(diagonal > 0, diagonal.clamp_min(1e-300).rsqrt(), usual).minimum(10 * usual)

    # Louis's formula ------------------------------------------------------------------------------------------------

    def complete(self, posterior: Posterior) -> Complete:
        """Return scores and densities of the complete data."""
        with self.coordinates.at(self.coordinates.start), torch.no_grad():
            torch.manual_seed(self.seed)
            support = second_order_support(posterior, self.num_particles)
        return Complete(self, posterior, support)


@dataclass(frozen=True)
class Complete:
    r"""The complete data's scores $s_{sn}=\nabla_u\log p_u(x_n,z_{sn})$.

    Args:
        problem: Where.
        posterior: Of the latents.
        support: Its values and weights.
    """

    problem: Problem
    posterior: Posterior
    support: tuple[Support, Tensor] = field(repr=False)

    def _run(self, use: Callable[[CompleteData, Tensor], Any]) -> Any:
        u = self.problem.coordinates.start.clone().requires_grad_()
        with self.problem.coordinates.at(u):
            return use(complete_data(self.posterior, self.support), u)

    def per_datum(self) -> tuple[Tensor, Tensor]:
        r"""Return the scores $\sum_sw_{sn}s_{sn}$, ``(N, P)``, and how often each counts, ``(N,)``."""

        def use(data: CompleteData, u: Tensor) -> tuple[Tensor, Tensor]:
            return _scores((data.weights * data.log_p).sum(0), u), data.scale

        return self._run(use)

    def louis(self) -> tuple[Tensor, list[Tensor]]:
        r"""Return $E[-\nabla^2\log p(x,z)]-\sum_n\mathrm{Var}(s_n)$, and where values are draws, the same from each of
        the jackknife's samples, which leave a tenth of the draws out."""

        def use(data: CompleteData, u: Tensor) -> tuple[Tensor, list[Tensor]]:
            scores = _scores(data.log_p.flatten(), u).reshape(*data.log_p.shape, -1)
            whole = _louis(data, scores, data.weights, u)
            kept = _leave_out(data.weights) if data.drawn else []
            return whole, [_louis(data, scores, weights, u) for weights in kept]

        return self._run(use)


def _louis(data: CompleteData, scores: Tensor, weights: Tensor, u: Tensor) -> Tensor:
    information = -_hessian((weights * data.log_p).sum() + data.rest, u)
    centred = scores - (weights[..., None] * scores).sum(0)
    # a variance about the draws' own mean is too small by the share of the weights' squares
    share = 1 - weights.square().sum(0) if data.drawn else torch.ones_like(data.scale)
    factor = weights / (share * data.scale).clamp_min(torch.finfo(weights.dtype).tiny)
    factor = torch.where(data.scale > 0, factor, 0.0)[..., None]
    return information - torch.tensordot(factor * centred, centred, ([0, 1], [0, 1]))


def _leave_out(weights: Tensor, groups: int = 10) -> Iterable[Tensor]:
    """Yield the weights without each of up to ten groups of draws, normalised again."""
    group = torch.arange(len(weights), device=weights.device) % min(groups, len(weights))
    for left in range(int(group.max()) + 1):
        kept = weights * (group != left)[:, None]
        yield kept / kept.sum(0).clamp_min(torch.finfo(weights.dtype).tiny)


# Derivatives --------------------------------------------------------------------------------------------------------


def _gradient(value: Tensor, u: Tensor, **options: Any) -> Tensor:
    if not value.requires_grad:
        fail(
            EmvaeError,
            "standard_errors",
            "differentiate log p by the model's parameters",
            got="a log density that none of them moves",
            because="standard errors are those of parameters",
            fix="Use parameters in the model, by pyro.param or a module.",
        )
    return torch.autograd.grad(value, u, allow_unused=True, materialize_grads=True, **options)[0]


def _hessian(value: Tensor, u: Tensor) -> Tensor:
    """Return the matrix of second derivatives, one backward per row."""
    gradient = _gradient(value, u, create_graph=True)
    if not gradient.requires_grad:
        return u.new_zeros(len(u), len(u))
    matrix = torch.stack([_gradient(entry, u, retain_graph=True) for entry in gradient])
    return 0.5 * (matrix + matrix.mT)


def _scores(values: Tensor, u: Tensor) -> Tensor:
    r"""Return $\partial v_i/\partial u_p$, ``(I, P)``.

    It is $\partial g_p/\partial w_i$ with $g(w)=\nabla_u\sum_iw_iv_i$: one backward per parameter, however many values
    there are.
    """
    weights = torch.ones_like(values, requires_grad=True)
    gradient = _gradient((weights * values).sum(), u, create_graph=True)
    columns = [_gradient(entry, weights, retain_graph=True) for entry in gradient]
    return torch.stack(columns, -1).to(u).detach()


def kind_of(posterior: Posterior) -> str:
    """Return what averages under the posterior are: the `kind` of `StandardErrors`."""
    if isinstance(posterior, GuidePosterior) or posterior.kind in ("laplace", "mean_field"):
        return "approximate"
    if posterior.is_exact:
        return "exact"
    return "quadrature" if posterior.kind == "quadrature" else "monte carlo"
