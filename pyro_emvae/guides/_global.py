r"""The guide of the latents outside the data plate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoNormal

from .._checks import EmvaeError, ModelError, fail
from ..particles import keep_buffers

__all__ = ["bare", "give_models", "make_global", "set_up_global"]


def make_global(
    given: Any, model: Callable, sites: Mapping[str, Mapping[str, Any]], hidden: list[str]
) -> AutoGuide | None:
    r"""Return the guide of the latents outside the data plate, not yet set up.

    Args:
        given: An `AutoGuide`, a class of them, a function of a model that returns one, or None.
        model: The model.
        sites: Those latents, nodes of a trace by name.
        hidden: The others.

    Raises:
        EmvaeError: What was given makes no `AutoGuide`.
        ModelError: It was given and there is no such latent; a discrete one and nothing given.
    """
    if not sites:
        if given is not None:
            fail(
                ModelError,
                "AutoAmortized",
                "use its global_guide",
                got="a model without latents outside the data plate",
                because="a global guide is for latents that all data share",
                fix="Leave global_guide= out.",
            )
        return None
    if isinstance(given, AutoGuide):
        return given
    discrete = [name for name, node in sites.items() if node["fn"].support.is_discrete]
    if given is None and discrete:
        fail(
            ModelError,
            "AutoAmortized",
            f"draw the global latent {discrete[0]!r}",
            got=f"a discrete site ({type(sites[discrete[0]]['fn']).__name__})",
            because="the default guide of global latents is a normal",
            fix='Sum it out: infer={"enumerate": "parallel"} at the site and TraceEnum_ELBO; or write global_guide=.',
        )
    made = (AutoNormal if given is None else given)(poutine.block(model, hide=hidden))
    if not isinstance(made, AutoGuide):
        refuse(made)
    return made


def refuse(given: Any) -> None:
    fail(
        EmvaeError,
        "AutoAmortized",
        "use its global_guide",
        got=f"{given!r:.60}",
        because="the latents outside the data plate are drawn by one of Pyro's autoguides",
        fix="Write global_guide=pyro.infer.autoguide.AutoMultivariateNormal, or another class or instance.",
    )


def set_up_global(guide: AutoGuide, sites: Iterable[str], hidden: list[str], args: tuple, kwargs: dict) -> None:
    r"""Let the guide look at its model, and check that it serves just these latents.

    Raises:
        ModelError: A latent that it leaves out, or one of another's.
    """
    if guide.prototype_trace is None:
        with torch.no_grad(), keep_buffers():
            guide._setup_prototype(*args, **kwargs)
        for name in {"_INPUT", "_RETURN"} & set(guide.prototype_trace.nodes):
            guide.prototype_trace.remove_node(name)
    found = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
    if set(found) != set(sites):
        fail(
            ModelError,
            "AutoAmortized",
            "use its global_guide",
            got=f"a guide of {sorted(found)}",
            because=f"the latents outside the data plate are {sorted(sites)}",
            fix=f"Write global_guide={type(guide).__name__}(poutine.block(model, hide={sorted(hidden)})).",
        )


def bare(guide: AutoGuide) -> AutoGuide:
    """Return a shallow copy of a guide without data; pickling would take the model away from the guide itself."""
    result = object.__new__(type(guide))
    result.__dict__ = dict(guide.__dict__)
    modules = {k: bare(m) if isinstance(m, AutoGuide) else m for k, m in guide._modules.items()}
    result.__dict__["_modules"] = modules
    if guide.prototype_trace is not None:
        result.__dict__["prototype_trace"] = guide.prototype_trace.copy()
        for name in {"_INPUT", "_RETURN"} & set(guide.prototype_trace.nodes):
            result.prototype_trace.remove_node(name)
    return result


def give_models(source: AutoGuide, target: AutoGuide) -> None:
    """Let a copy of a guide share its model, and that of the guides in it."""
    target._model = source._model
    for name, module in source._modules.items():
        if isinstance(module, AutoGuide):
            give_models(module, target._modules[name])
