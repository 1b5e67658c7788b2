r"""Guides that keep their model: a quiet set-up, copies that share the model, pickles that hold it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from .._checks import ModelError, fail
from ..particles import quiet

__all__ = ["ModelGuide", "indices_of", "refuse_hidden_data", "state_of"]


class ModelGuide(AutoGuide):
    r"""A guide whose rule is computed from the model in every call: abstract.

    Set-up changes no generator, buffer or mode. A copy shares the model, a pickle holds it: unlike Pyro's autoguides,
    which are their parameters, this one is nothing without its model. The model has to be picklable then, as a function
    of a module or an `nn.Module` is.
    """

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with quiet(), torch.no_grad():
            super()._setup_prototype(*args, **kwargs)
        for name in ("_INPUT", "_RETURN"):
            self.prototype_trace.remove_node(name)

    def _given_plates(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the plates that a list of guides or the user has stated; none otherwise."""
        if self.master is None and self.create_plates is None:
            return {}
        return self._create_plates(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with the model and without what only a call needs."""
        return {**state_of(self), "_model": self._model, "plates": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelGuide:
        result = memo[id(self)] = self.__class__.__new__(self.__class__)
        result.__setstate__(copy.deepcopy({**self.__getstate__(), "_model": None}, memo))
        result._model = self._model
        return result


def state_of(guide: AutoGuide) -> dict[str, Any]:
    """Return what Pyro's autoguides pickle, without the model; unlike theirs, this guide keeps it."""
    model, master = guide._model, guide.master
    try:
        return dict(AutoGuide.__getstate__(guide))
    finally:
        guide._model, guide.master = model, master


def indices_of(plates: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the indices of the plates that hold a minibatch, by name."""
    return {name: plate.indices for name, plate in plates.items() if len(plate.indices) < plate.size}


def refuse_hidden_data(obj: str, model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
    r"""Refuse a part of a model that observes nothing, when it belongs to a list of guides.

    Raises:
        ModelError: The part has no observed site.
    """
    with quiet(), torch.no_grad(), poutine.block():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    if not trace.observation_nodes:
        fail(
            ModelError,
            obj,
            "be the guide of a part of the model",
            got="a part without observed sites",
            because="poutine.block(model, expose=[...]) hides the data as well, and what is left is the prior",
            fix="Hide the other latents by name: poutine.block(model, hide=[...]).",
        )
