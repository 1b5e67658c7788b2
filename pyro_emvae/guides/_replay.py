r"""Run a guide without leaving sites behind: to draw from it, or to score values that another guide has drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from pyro.ops.provenance import detach_provenance
from torch import Tensor, nn
from torch.distributions import biject_to

from .._checks import ModelError, fail
from .._pyro import Messenger
from ..particles import is_subsample

__all__ = ["HiddenRun", "lead_shape", "run_hidden", "score"]

ENDING = "_unconstrained"


@dataclass
class HiddenRun:
    """The sites that a guide would have had, by its own names: distributions, values, plates, which are auxiliary."""

    fns: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    frames: dict[str, tuple] = field(default_factory=dict)
    auxiliary: set[str] = field(default_factory=set)

    def log_prob(self, name: str) -> Tensor:
        """Return the log density of one site, unscaled and unmasked."""
        return self.fns[name].log_prob(self.values[name])

    def is_drawn(self, name: str) -> bool:
        """Whether a site has its own randomness, and is not computed from an auxiliary one."""
        return not isinstance(_base(self.fns[name]), dist.Delta)


def run_hidden(guide: Callable, args: tuple, kwargs: Mapping[str, Any], prefix: str, given: Callable | None = None):
    r"""Run a guide inside another; plates around both are seen by its sites, traces and replays are not.

    Args:
        guide, args, kwargs: What is run.
        prefix: Makes the names of its sites others than those of the guide around it.
        given: ``given(name, fn, is_auxiliary)`` returns the value of a site that is not to be drawn, or None.

    Returns:
        A `HiddenRun`.
    """
    with _Hide(prefix, given) as hidden:
        guide(*args, **kwargs)
    return hidden.run


class _Hide(Messenger):
    def __init__(self, prefix: str, given: Callable | None) -> None:
        super().__init__()
        self.supplied: dict[str, Tensor] = {}
        self.prefix, self.given, self.run, self.key = prefix, given, HiddenRun(), f"_hidden_{id(self)}"

    def _pyro_sample(self, msg: dict) -> None:
        infer = dict(msg["infer"] or {})
        if not is_subsample(msg):
            if self.given is not None and not msg["is_observed"]:
                value = self.given(msg["name"], msg["fn"], bool(infer.get("is_auxiliary")))
                if value is not None:
                    self.supplied[msg["name"]] = msg["value"] = value
                    msg["done"] = True
            infer[self.key] = (msg["name"], bool(infer.get("is_auxiliary")))
        msg["infer"] = {**infer, "is_auxiliary": True, "_do_not_trace": True}
        msg["name"] = f"{self.prefix}{msg['name']}"

    def _pyro_post_sample(self, msg: dict) -> None:
        name, auxiliary = (msg["infer"] or {}).get(self.key, (None, False))
        if name is None:
            return
        # without the provenance that TraceGraph_ELBO gives it here, of a site that will not be in the trace
        msg["value"] = self.supplied[name] if name in self.supplied else detach_provenance(msg["value"])
        self.run.fns[name], self.run.values[name] = msg["fn"], msg["value"]
        self.run.frames[name] = tuple(f for f in msg["cond_indep_stack"] if f.vectorized)
        if auxiliary:
            self.run.auxiliary.add(name)


def score(
    guide: Callable, args: tuple, kwargs: Mapping[str, Any], prefix: str, values: Mapping[str, Tensor], lead: tuple
) -> HiddenRun:
    r"""Run a guide on the values of another's latents, so that its densities are those of the values.

    Latents that it draws itself take the value; auxiliary sites are solved for: ``{latent}_unconstrained``, from which
    `AutoNormal` and the guides here map to the latent's support, and the vector of Pyro's `AutoContinuous`.

    Args:
        lead: Batch shape of a site outside all plates of the guide: that of the particles around.

    Raises:
        ModelError: The guide has an auxiliary site of another kind.
    """
    parts = [m for m in guide.modules() if isinstance(m, AutoContinuous)] if isinstance(guide, nn.Module) else []
    packed = {f"_{part._pyro_name}_latent": part for part in parts}

    def given(name: str, fn: Any, auxiliary: bool) -> Tensor | None:
        if name in values and not isinstance(_base(fn), dist.Delta):
            return values[name]
        if not auxiliary:
            return None
        if name in packed:
            return _pack(packed[name], values, lead)
        latent = name.removesuffix(ENDING)
        if latent == name or latent not in values:
            fail(
                ModelError,
                type(guide).__name__,
                f"score values by its auxiliary site {name!r}",
                got=f"{type(_base(fn)).__name__}, from which latents are computed in a way that is not known",
                because=f"only sites '<latent>{ENDING}' and the vector of AutoContinuous are solved for",
                fix="Use guides.AutoMeanField, AutoNormal or AutoMultivariateNormal, or draw the latents directly.",
            )
        return biject_to(_support(guide, latent)).inv(values[latent])

    return run_hidden(guide, args, kwargs, prefix, given)


def _support(guide: Callable, latent: str) -> Any:
    """Return the support of a latent as the guide has it."""
    for module in guide.modules() if isinstance(guide, nn.Module) else ():
        trace = getattr(module, "prototype_trace", None)
        if trace is not None and latent in trace.nodes:
            return trace.nodes[latent]["fn"].support
    fail(
        ModelError,
        type(guide).__name__,
        f"score values of {latent!r}",
        got="an auxiliary site in a guide that is no AutoGuide",
        because="its map to the latent's support is not known",
        fix=f"Draw {latent!r} by one pyro.sample from a TransformedDistribution.",
    )


def _pack(guide: Any, values: Mapping[str, Tensor], lead: tuple) -> Tensor:
    """Return the vector that Pyro's continuous guides take apart."""
    rows, count = [], max(1, torch.Size(lead).numel())
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        free = biject_to(site["fn"].support).inv(values[name])
        rows.append(free.reshape(count, -1))
    return torch.cat(rows, -1).reshape(*lead, -1)


def _base(fn: Any) -> Any:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def lead_shape(prefix: str) -> tuple[int, ...]:
    """Return the batch shape of a site here: that of the plates around the guide."""
    with _Hide(prefix, None):
        return tuple(pyro.sample("lead", dist.Delta(torch.zeros(()))).shape)
