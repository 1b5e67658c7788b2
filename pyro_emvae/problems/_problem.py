r"""What a problem is: a Pyro model and guide, and exact answers to compare an estimate with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

from .._checks import ModelError, fail, nearest

__all__ = ["Initial", "Maker", "Problem", "ProblemTraits", "data_plate", "exact_gradients", "problem"]

EXACT = ("log_evidence", "elbo", "posterior", "exact_guide", "maximum")


@dataclass(frozen=True)
class ProblemTraits:
    """What kind of problem it is. Tests and tables select by these, never by name.

    Args:
        support: ``"continuous"``, ``"discrete"`` or ``"mixed"``: the latent sites.
        reparameterised: Every guide site has a reparameterised sampler.
        enumerable: Every latent site can be summed out by ``TraceEnum_ELBO``.
        local: Every latent site lies inside the data plate.
        subsampled: A plate draws a minibatch inside the model.
        masked: Some sites carry a mask.
        two_level: The guide has a site whose distribution depends on an earlier site.
        exact_posterior_in_family: Some guide parameters make the ELBO equal the log evidence.
        modules: Parameters live in ``pyro.module``: clearing the store does not reset them, a new problem does.
        needs: Packages beyond the core that it imports.
    """

    support: str = "continuous"
    reparameterised: bool = True
    enumerable: bool = False
    local: bool = False
    subsampled: bool = False
    masked: bool = False
    two_level: bool = False
    exact_posterior_in_family: bool = False
    modules: bool = False
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Problem:
    r"""A model, a guide, data, and what is known exactly about them.

    All exact functions take a mapping from parameter name to *constrained* value, by default the initial ones; names
    that are left out keep their initial value. They refer to the full data, also if the model subsamples: the
    expectation over minibatches of the minibatch ELBO is the ELBO of the full data. One that is not known is None.

    Args:
        name: The registered name.
        model: A Pyro model, called with ``args``.
        guide: A Pyro guide, called with ``args``.
        args: The data.
        sites: The guide's latent sites.
        model_params: Names of theta in the param store.
        guide_params: Names of phi in the param store.
        params: Initial values, constrained, by name.
        constraints: Constraints by name; ``pyro.param`` is called with the same.
        max_plate_nesting: The number of nested plates; a particle plate goes to dim ``-1 - max_plate_nesting``.
        traits: The kind of problem.
        log_evidence: ``params -> log p(x)``, a scalar in nats, differentiable.
        elbo: ``params -> E_q[log p(x, z) - log q(z)]``, a scalar in nats, differentiable.
        posterior: ``params -> {site: distribution}``, the marginal of each site under p(z | x).
        exact_guide: ``params -> phi`` at which q is the posterior.
        maximum: ``() -> theta`` of maximum likelihood.

    Example:
        >>> from pyro_emvae.problems import normal_normal
        >>> problem = normal_normal()
        >>> gap = problem.log_evidence() - problem.elbo()
        >>> bool(gap > 0), sorted(problem.exact_guide())
        (True, ['loc', 'scale'])
    """

    name: str
    model: Callable[..., Any] = field(repr=False)
    guide: Callable[..., Any] = field(repr=False)
    args: tuple[Tensor, ...] = field(repr=False)
    sites: tuple[str, ...]
    model_params: tuple[str, ...]
    guide_params: tuple[str, ...]
    params: Mapping[str, Tensor] = field(repr=False)
    constraints: Mapping[str, constraints.Constraint] = field(repr=False)
    max_plate_nesting: int
    traits: ProblemTraits
    log_evidence: Callable[..., Tensor] | None = field(default=None, repr=False)
    elbo: Callable[..., Tensor] | None = field(default=None, repr=False)
    posterior: Callable[..., dict[str, Any]] | None = field(default=None, repr=False)
    exact_guide: Callable[..., dict[str, Tensor]] | None = field(default=None, repr=False)
    maximum: Callable[[], dict[str, Tensor]] | None = field(default=None, repr=False)

    @property
    def exact(self) -> tuple[str, ...]:
        """The names of the exact functions that are known."""
        return tuple(name for name in EXACT if getattr(self, name) is not None)

    def unconstrained(self, params: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return fresh leaves in unconstrained space, one per parameter, as the param store keeps them."""
        values = _merge(self.params, params)
        with torch.no_grad():
            raw = {name: transform_to(self.constraints[name]).inv(value) for name, value in values.items()}
        return {name: value.detach().clone().requires_grad_() for name, value in raw.items()}

    def constrained(self, unconstrained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map unconstrained values to constrained ones, differentiably."""
        return {name: transform_to(self.constraints[name])(value) for name, value in unconstrained.items()}


def exact_gradients(
    problem: Problem, unconstrained: Mapping[str, Tensor] | None = None, objective: str = "elbo"
) -> dict[str, Tensor]:
    r"""Return the exact gradient with respect to the unconstrained parameters, theta and phi.

    Args:
        problem: A problem whose ``objective`` is known.
        unconstrained: Values in unconstrained space by name; those left out are the initial ones.
        objective: ``"elbo"`` or ``"log_evidence"`` (whose gradient over phi is zero).

    Returns:
        The gradient of the *maximised* quantity, by name; ``-gradient`` is what a loss accumulates in ``.grad``.

    Raises:
        ModelError: If the problem has no exact ``objective``.

    Example:
        >>> from pyro_emvae.problems import exact_gradients, normal_normal
        >>> problem = normal_normal()
        >>> tight = problem.unconstrained(problem.exact_guide())
        >>> gradients = exact_gradients(problem, tight)
        >>> bool(gradients["loc"].abs() < 1e-12), bool(gradients["prior_mean"].abs() > 0.1)
        (True, True)
    """
    function = getattr(problem, objective)
    if function is None:
        fail(
            ModelError,
            "exact_gradients",
            f"differentiate {objective!r} of problem {problem.name!r}",
            got=f"exact functions {problem.exact}",
            because="there is no closed form",
            fix="Choose a problem that has one, or compare with an estimate.",
        )
    values = _merge(problem.unconstrained(), unconstrained)
    leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
    value = function(problem.constrained(leaves))
    if not value.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    gradients = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def _merge(initial: Mapping[str, Tensor], values: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    for name in set(values or {}) - set(initial):
        fail(
            ModelError,
            "Problem",
            f"use parameter {name!r}",
            got="an unknown name",
            because="values are given by the names of the param store",
            fix=nearest(name, initial),
        )
    return {**initial, **(values or {})}


class Initial:
    r"""The initial parameters of a problem; ``initial(name)`` is its ``pyro.param`` statement.

    Args:
        theta: Values of the model's parameters by name, or pairs of value and constraint.
        phi: The same for the guide.
        tensor: What turns a number or a list into a tensor.
    """

    def __init__(self, theta: Mapping[str, Any], phi: Mapping[str, Any], tensor: Callable[[Any], Tensor]) -> None:
        pairs = {name: v if isinstance(v, tuple) else (v, constraints.real) for name, v in {**theta, **phi}.items()}
        self.theta, self.phi = tuple(theta), tuple(phi)
        self.values = {name: tensor(value) for name, (value, _) in pairs.items()}
        self.constraints = {name: constraint for name, (_, constraint) in pairs.items()}

    def __call__(self, name: str, **kwargs: Any) -> Tensor:
        """Return the current value of a parameter; the store gets a copy of the initial one."""
        return pyro.param(name, self.values[name].clone, constraint=self.constraints[name], **kwargs)


class Maker:
    """Makes a problem's tensors: in float64 on the CPU from its own generator, then cast and moved."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def __call__(self, value: Any) -> Tensor:
        """Return numbers as a tensor of the problem's dtype and device."""
        return torch.as_tensor(value, dtype=torch.float64).to(self.device, self.dtype, copy=True)

    def noise(self, *shape: int) -> Tensor:
        """Return standard normal numbers in float64, still to be passed through the maker."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def initial(self, theta: Mapping[str, Any], phi: Mapping[str, Any]) -> Initial:
        """Return the initial parameters."""
        return Initial(theta, phi, self)


def data_plate(x: Tensor, subsample_size: int | None = None) -> pyro.plate:
    """Return the plate ``data`` over the first dimension of `x`, at dim -1."""
    return pyro.plate("data", len(x), subsample_size=subsample_size, dim=-1, device=x.device)


def problem(
    name: str,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Tensor, ...],
    sites: tuple[str, ...],
    initial: Initial,
    traits: ProblemTraits,
    *,
    max_plate_nesting: int = 1,
    maximum: Callable[[], dict[str, Tensor]] | None = None,
    **exact: Callable[[SimpleNamespace], Any],
) -> Problem:
    """Return a `Problem`; its exact functions are written over a namespace of constrained values."""
    values = MappingProxyType(initial.values)

    def over_params(function: Callable[[SimpleNamespace], Any]) -> Callable[..., Any]:
        def evaluate(params: Mapping[str, Tensor] | None = None) -> Any:
            return function(SimpleNamespace(**_merge(values, params)))

        return evaluate

    return Problem(
        name=name,
        model=model,
        guide=guide,
        args=args,
        sites=sites,
        model_params=initial.theta,
        guide_params=initial.phi,
        params=values,
        constraints=MappingProxyType(initial.constraints),
        max_plate_nesting=max_plate_nesting,
        traits=traits,
        maximum=maximum,
        **{key: over_params(function) for key, function in exact.items()},
    )
