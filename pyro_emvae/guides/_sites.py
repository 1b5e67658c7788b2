r"""Which latents an encoder can serve, read from the prototype trace; and why it cannot serve the others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import IndependentTransform, Transform

from .._checks import ModelError, fail, nearest
from .._registry import create
from ..families import Family

__all__ = ["LocalSite", "choose_plate", "local_site"]


@dataclass(frozen=True)
class LocalSite:
    r"""A latent of the model that an encoder can serve.

    Args:
        name: The site's name.
        family: The family that serves it, which knows the site.
        event_dim: Event dims of the site.
        event_shape: Shape of one value of the family.
        transform: From the family's values to the site's; None if they are the same.
        annotation: The model's ``infer={"estimator": ...}`` at the site, or an empty dict.
        plates: The plates that it lies in with their dims, the data plate first, the others by their dims.
        width: The number of context columns of one value.
        is_masked: Whether the model masks it.
    """

    name: str
    family: Family
    event_dim: int
    event_shape: torch.Size
    transform: Transform | None
    annotation: Mapping[str, Any]
    plates: Mapping[str, int]
    width: int
    is_masked: bool = False

    def place(self, context: Tensor) -> Tensor:
        """Return a context ``(*plates, columns)`` with each plate at its dim."""
        dims = list(self.plates.values())
        if len(dims) == 1:
            return context if dims[0] == -1 else context.reshape(len(context), *[1] * (-dims[0] - 1), self.width)
        order = sorted(range(len(dims)), key=dims.__getitem__)
        shape = [1] * -min(dims)
        for i in order:
            shape[dims[i]] = context.shape[i]
        return context.permute(*order, len(dims)).reshape(*shape, self.width)


def choose_plate(nodes: Mapping[str, Mapping[str, Any]], name: str | None) -> Any:
    r"""Return the frame of the data plate: the named one, or the only one that all latents in plates have in common.

    Args:
        nodes: The latent sites of the prototype trace.
        name: The plate's name, or None if there is only one.

    Raises:
        ModelError: No plate; several and no name.
    """
    frames = {site: {f.name: f for f in node["cond_indep_stack"]} for site, node in nodes.items()}
    plates = {plate: frame for own in frames.values() for plate, frame in own.items()}
    if not plates:
        _no_local(list(nodes))
    if name is None:
        common = set.intersection(*(set(own) for own in frames.values() if own))
        if len(common) != 1:
            _several_plates(frames, list(plates))
        (name,) = common
    elif name not in plates:
        _unknown_plate(name, list(plates))
    return plates[name]


def local_site(node: Mapping[str, Any], frame: Any, family: str | Family | None) -> LocalSite:
    r"""Return what the guide needs of a site of the prototype trace.

    Raises:
        ModelError: If the family cannot serve the site; if its support has no bijection to the reals, or one that
            differs between data.
    """
    name, fn = node["name"], node["fn"]
    frames = {f.name: f.dim for f in node["cond_indep_stack"]}
    inner = sorted((plate for plate in frames if plate != frame.name), key=frames.get)
    family = create("family", _default_family(name, fn) if family is None else family)
    dims = [dim - fn.event_dim for dim in frames.values()]
    support = fn.support if fn.support.is_discrete or _is_real(fn.support) else _of_one_datum(name, fn.support, dims)
    transform, shape = None, fn.event_shape
    if not (family.direct or fn.support.is_discrete or _is_real(fn.support)):
        transform = _transform(name, support)
    bound = family.for_site(name, fn, support=support)
    if transform is not None:
        if transform.codomain.event_dim < fn.event_dim:
            transform = IndependentTransform(transform, fn.event_dim - transform.codomain.event_dim)
        shape = torch.Size(transform.inverse_shape(fn.batch_shape + fn.event_shape)[len(fn.batch_shape) :])
    return LocalSite(
        name,
        bound,
        fn.event_dim,
        shape,
        transform,
        {key: value for key, value in (node["infer"] or {}).items() if key == "estimator"},
        {plate: frames[plate] for plate in (frame.name, *inner)},
        bound.num_features(shape),
        isinstance(node["mask"], Tensor),
    )


def _default_family(name: str, fn: Any) -> str:
    """Return the name of the family that fits a site's support."""
    if not fn.support.is_discrete:
        return "normal"
    for family in ("bernoulli", "categorical", "one_hot"):
        if create("family", family).fits(fn):
            return family
    base = fn
    while hasattr(base, "base_dist"):
        base = base.base_dist
    _refuse(
        name,
        f"a discrete site ({type(base).__name__})",
        "the families of discrete sites are those with few values: Bernoulli, categorical and one-hot",
        f"Hide it: AutoAmortized(poutine.block(model, hide=[{name!r}]), encoder), write its part of the guide by hand, "
        "and add both to a pyro.infer.autoguide.AutoGuideList.",
    )


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return isinstance(support, type(constraints.real))


def _transform(name: str, support: Any) -> Transform:
    try:
        return biject_to(support)
    except NotImplementedError as cause:
        _refuse(
            name,
            f"support {support}",
            "torch.distributions.biject_to knows no map from the reals to it",
            "Register one, or write this site's part of the guide by hand.",
            cause,
        )


def _of_one_datum(name: str, support: Any, dims: list[int]) -> Any:
    """Return the support with its bounds at one datum; they have to be the same at all."""
    result = copy.copy(support)
    for key, value in vars(support).items():
        if isinstance(value, constraints.Constraint):
            setattr(result, key, _of_one_datum(name, value, dims))
        elif isinstance(value, Tensor):
            first = value
            for dim in dims:
                first = first.narrow(dim, 0, 1) if value.dim() >= -dim and value.shape[dim] > 1 else first
            if first is value:
                continue
            if not bool((value == first).all()):
                _refuse(
                    name,
                    f"support {support} that differs between data",
                    "the support is read once, at set-up",
                    "Draw a site with a fixed support and scale it in the model, as in low + (high - low) * u.",
                )
            setattr(result, key, first.clone())
    return result


def _refuse(name: str, got: str, because: str, fix: str, cause: BaseException | None = None) -> None:
    fail(ModelError, "AutoAmortized", f"amortize site {name!r}", got=got, because=because, fix=fix, cause=cause)


def _no_local(sites: list[str]) -> None:
    fail(
        ModelError,
        "AutoAmortized",
        "find a local latent",
        got=f"latents {sites} outside every plate" if sites else "a model without latents",
        because="an encoder gives each datum of a plate its own latent",
        fix='Put the site under pyro.plate("data", len(x)), or use pyro.infer.autoguide.AutoNormal(model).',
    )


def _several_plates(frames: dict[str, dict], plates: list[str]) -> None:
    where = ", ".join(f"{site!r} in {sorted(own) or 'no plate'}" for site, own in frames.items())
    fail(
        ModelError,
        "AutoAmortized",
        "choose the data plate",
        got=f"latents in plates {plates}: {where}",
        because="the encoder's rows are the data of one plate",
        fix=f"Write amortize={plates[0]!r}, or another of them; or an AutoGuideList with one guide for each, made of "
        "poutine.block(model, hide=[...]).",
    )


def _unknown_plate(name: str, plates: list[str]) -> None:
    fail(
        ModelError,
        "AutoAmortized",
        f"amortize plate {name!r}",
        got="no latent in a plate of that name",
        because="amortize= names the plate whose data the encoder reads",
        fix=nearest(str(name), plates),
    )
