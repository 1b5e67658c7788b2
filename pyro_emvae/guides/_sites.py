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

__all__ = ["LocalSite", "choose_plate", "local_site"]


@dataclass(frozen=True)
class LocalSite:
    r"""A latent of the model that an encoder can serve.

    Args:
        name: The site's name.
        event_dim: Event dims of the site.
        event_shape: Shape of one *unconstrained* value.
        transform: From unconstrained values to the site's support; None if the support is real.
        annotation: The model's ``infer={"estimator": ...}`` at the site, or an empty dict.
    """

    name: str
    event_dim: int
    event_shape: torch.Size
    transform: Transform | None
    annotation: Mapping[str, Any]


def choose_plate(nodes: Mapping[str, Mapping[str, Any]], name: str | None) -> Any:
    r"""Return the frame of the one plate that all sites are in.

    Args:
        nodes: The latent sites of the prototype trace.
        name: The plate's name, or None if there is only one.

    Raises:
        ModelError: No plate; several and no name; a latent outside it.
    """
    frames = {site: {f.name: f for f in node["cond_indep_stack"]} for site, node in nodes.items()}
    plates = {plate: frame for own in frames.values() for plate, frame in own.items()}
    if not plates:
        _no_local(list(nodes))
    if name is None:
        if len(plates) > 1:
            _several_plates(frames, list(plates))
        (name,) = plates
    elif name not in plates:
        _unknown_plate(name, list(plates))
    others = [site for site, own in frames.items() if set(own) != {name}]
    if others:
        _elsewhere(others, frames[others[0]], name, [site for site in frames if site not in others])
    return plates[name]


def local_site(node: Mapping[str, Any], frame: Any) -> LocalSite:
    r"""Return what the guide needs of a site of the prototype trace.

    Raises:
        ModelError: If the site is discrete, has a support without a bijection to the reals, or one that differs
            between data.
    """
    name, fn = node["name"], node["fn"]
    if fn.support.is_discrete:
        _refuse(
            name,
            f"a discrete site ({type(_base(fn)).__name__})",
            "its families are continuous",
            f'Sum it out: model sites with infer={{"enumerate": "parallel"}}, '
            f"AutoAmortized(poutine.block(model, hide=[{name!r}]), encoder) and TraceEnum_ELBO; or write its part of "
            "the guide by hand and add both to a pyro.infer.autoguide.AutoGuideList.",
        )
    annotation = {key: value for key, value in (node["infer"] or {}).items() if key == "estimator"}
    if _is_real(fn.support):
        return LocalSite(name, fn.event_dim, fn.event_shape, None, annotation)
    transform = _transform(name, _of_one_datum(name, fn.support, frame.dim - fn.event_dim))
    if transform.codomain.event_dim < fn.event_dim:
        transform = IndependentTransform(transform, fn.event_dim - transform.codomain.event_dim)
    shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)[len(fn.batch_shape) :]
    return LocalSite(name, fn.event_dim, torch.Size(shape), transform, annotation)


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


def _of_one_datum(name: str, support: Any, dim: int) -> Any:
    """Return the support with its bounds at one datum; they have to be the same at all."""
    result = copy.copy(support)
    for key, value in vars(support).items():
        if isinstance(value, constraints.Constraint):
            setattr(result, key, _of_one_datum(name, value, dim))
        elif isinstance(value, Tensor) and value.dim() >= -dim and value.shape[dim] > 1:
            first = value.narrow(dim, 0, 1)
            if not bool((value == first).all()):
                _refuse(
                    name,
                    f"support {support} that differs between data",
                    "the support is read once, at set-up",
                    "Draw a site with a fixed support and scale it in the model, as in low + (high - low) * u.",
                )
            setattr(result, key, first.clone())
    return result


def _base(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


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
        fix=f"Write amortize={plates[0]!r}, or another of them.",
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


def _elsewhere(sites: list[str], own: Mapping[str, Any], plate: str, local: list[str]) -> None:
    fail(
        ModelError,
        "AutoAmortized",
        f"amortize site {sites[0]!r}",
        got=f"a latent in plates {list(own)}" if own else "a global latent",
        because=f"the encoder has one row per datum of plate {plate!r}, and nothing else",
        fix="Give it a guide of its own: guide = pyro.infer.autoguide.AutoGuideList(model); "
        f"guide.append(AutoNormal(poutine.block(model, hide={local}))); "
        f"guide.append(AutoAmortized(poutine.block(model, hide={sites}), encoder)).",
    )
