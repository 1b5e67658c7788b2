r"""The handlers that runs are made of.

One `Recorder` stands in for Pyro's trace, replay and parameter capture. It is the outermost handler, so that it sees a
message after every plate, scale and mask of the program, and its change of a value before any of them does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution
from torch import Tensor

from .._checks import EstimatorError, ModelError, fail
from .._pyro import Messenger

__all__ = [
    "PARTICLE_PLATE",
    "Recorder",
    "config_estimators",
    "hold_batch",
    "is_computed",
    "is_subsample",
    "plates_of",
    "with_own_mask",
]

PARTICLE_PLATE = "num_particles_vectorized"


class Recorder(Messenger):
    """Record every sample statement and parameter; replay given values; treat drawn values by name.

    `treat(msg)` returns ``"attach"``, ``"detach"`` or ``"cut"`` for a freshly drawn value; cut values are leaves of
    their own, so that gradients through values and direct gradients come apart. ``"probe"`` cuts values that no
    parameter moves, too. ``"hold"`` makes a detached value a leaf by which the model can be differentiated.
    `sampler(msg)` draws in place of the distribution, where it does not return None.
    """

    def __init__(
        self,
        values: Mapping[str, Any] | None = None,
        treat: Callable[[dict], str] | None = None,
        sampler: Callable[[dict], Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self.values = values or {}
        self.treat = treat
        self.sampler = sampler
        self.messages: dict[str, dict] = {}
        self.cuts: list[tuple[Tensor, Tensor]] = []
        self.held: list[Tensor] = []
        self.masses: dict[str, Tensor] = {}
        self.params: dict[str, Tensor] = {}
        self.constraints: dict[str, Any] = {}
        self.ignored: list[str] = []
        self.subsampled: list[str] = []

    def _pyro_sample(self, msg: dict) -> None:
        if is_subsample(msg) and msg["value"] is None and (msg["fn"].subsample_size or math.inf) < msg["fn"].size:
            self.subsampled.append(msg["name"])
        if msg["is_observed"]:
            return
        if msg["name"] not in self.values:
            self._draw(msg)
            return
        msg["value"], infer = self.values[msg["name"]]
        msg["done"] = True
        if infer is not None:
            if "estimator" in (msg["infer"] or {}) and "estimator" not in infer:
                self.ignored.append(msg["name"])
            msg["infer"] = infer

    def _draw(self, msg: dict) -> None:
        value = None if self.sampler is None or msg["value"] is not None or is_subsample(msg) else self.sampler(msg)
        if value is not None:
            msg["value"], msg["done"] = value, True
        elif msg["value"] is None and type(msg["fn"]) is Delta and not (msg["args"] or msg["kwargs"]):
            msg["value"], msg["done"] = msg["fn"](), True
            self.masses[msg["name"]] = msg["value"]

    def _pyro_post_sample(self, msg: dict) -> None:
        if msg["infer"] and msg["infer"].get("_do_not_trace"):
            return
        name = msg["name"]
        if name in self.messages:
            fail(
                ModelError,
                "Particles",
                f"record site {name!r}",
                got="a second sample statement of that name",
                because="names tell the sites apart",
                fix="Give every pyro.sample its own name.",
            )
        if msg["value"] is not self.masses.get(name):  # given by a handler outside of this one
            self.masses.pop(name, None)
        if self.treat is not None and not msg["is_observed"] and not is_subsample(msg):
            self._treat(msg)
        self.messages[name] = with_own_mask(msg.copy())

    def _treat(self, msg: dict) -> None:
        how = self.treat(msg)
        value = msg["value"]
        if how == "hold":
            msg["value"] = value.detach().requires_grad_()
            self.held.append(msg["value"])
            return
        probe = how == "probe" and value.is_floating_point()
        if how == "attach" or not (value.requires_grad or probe):
            return
        msg["value"] = value.detach()
        if how == "cut" or probe:
            self.cuts.append((value, msg["value"].requires_grad_()))

    def _pyro_post_param(self, msg: dict) -> None:
        value = msg["value"]
        if value is not None:
            leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
            self.params[msg["name"]] = leaf
            self.constraints[msg["name"]] = msg["kwargs"].get("constraint")


def with_own_mask(msg: dict) -> dict:
    """Move the mask inside a distribution (``dist.Normal(0, 1).mask(keep)``) to where `poutine.mask` puts it.

    So a latent has a density of its own wherever it is masked, which counts only where it is not.
    """
    while isinstance(msg["fn"], MaskedDistribution) and (msg["fn"]._mask is not False or not msg["is_observed"]):
        mask, outer = _unexpanded(msg["fn"]._mask), msg["mask"]
        msg["fn"], msg["mask"] = msg["fn"].base_dist, mask if outer is None else mask & outer
    return msg


def _unexpanded(mask: Any) -> Any:
    """Return a mask without leading dims that repeat it, such as that of particles."""
    while isinstance(mask, Tensor) and mask.dim() and mask.stride(0) == 0:
        mask = mask[0]
    return mask


def is_computed(msg: Mapping[str, Any]) -> bool:
    """Whether a value was computed: by `pyro.deterministic`, or by `pyro.infer.reparam` from other sites."""
    fn = msg["fn"]
    masked = msg["is_observed"] and isinstance(fn, MaskedDistribution) and fn._mask is False
    return bool((msg["infer"] or {}).get("_deterministic")) or (masked and isinstance(fn.base_dist, Delta))


def is_subsample(msg: Mapping[str, Any]) -> bool:
    """Whether a message is a plate's draw of indices."""
    return type(msg["fn"]).__name__ == "_Subsample"


@dataclass(unsafe_hash=True, slots=True)
class Plate:
    """A vectorized plate, as Pyro's frame says, which compares and hashes slowly; alike in model and guide."""

    name: str
    dim: int
    size: int
    counter: int
    full_size: int | None = field(compare=False)


def plates_of(msg: Mapping[str, Any]) -> tuple[Plate, ...]:
    """Return the vectorized plates of a message, without that of the particles."""
    return tuple(
        Plate(f.name, f.dim, int(f.size), f.counter, None if f.full_size is None else int(f.full_size))
        for f in msg["cond_indep_stack"]
        if f.dim is not None and f.name != PARTICLE_PLATE
    )


class _Hold(Messenger):
    def __init__(self, indices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.indices = indices

    def _pyro_sample(self, msg: dict) -> None:
        if is_subsample(msg) and msg["value"] is None and msg["name"] in self.indices:
            msg["value"], msg["done"] = self.indices[msg["name"]], True


def config_estimators(guide: Callable, config: Callable[[Mapping[str, Any]], Any] | Mapping[str, Any]) -> Callable:
    r"""Annotate many sites of a guide with estimators; annotations that are there already win.

    Args:
        guide: A Pyro callable.
        config: A mapping from site to estimator, or a function of the site's message (a dict with ``"name"``,
            ``"fn"``, ...) that returns an estimator or None.

    Returns:
        The guide as a callable whose sites have ``infer={"estimator": ...}``.

    Source: `pyro.infer.config_enumerate`, for the pattern.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def guide(): pyro.sample("k", dist.Bernoulli(0.3))
        >>> guide = config_estimators(guide, {"k": "leave_one_out"})
        >>> poutine.trace(guide).get_trace().nodes["k"]["infer"]["estimator"]
        'leave_one_out'
    """

    if not (isinstance(config, Mapping) or callable(config)):
        fail(
            EstimatorError,
            "config_estimators",
            "annotate the guide",
            got=repr(config),
            because="config says which site gets which estimator",
            fix=f'Write {{"z": {config!r}}}, or lambda msg: {config!r} for all sites.',
        )

    def annotate(msg: Mapping[str, Any]) -> dict[str, Any]:
        chosen = config.get(msg["name"]) if isinstance(config, Mapping) else config(msg)
        return {} if chosen is None or "estimator" in msg["infer"] else {"estimator": chosen}

    return poutine.infer_config(guide, annotate)


def hold_batch(indices: Mapping[str, Tensor]) -> Messenger:
    """Return a context in which plates that subsample at random use these indices, by plate."""
    return _Hold(indices)
