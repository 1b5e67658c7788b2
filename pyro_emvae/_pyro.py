r"""The one list of non-public Pyro names that the package uses; `tests/test_pyro_names.py` checks their signatures."""

from __future__ import annotations

from typing import Any

import pyro
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = [
    "Messenger",
    "constraint_of",
    "draws_of",
    "get_trace",
    "leaf_of",
    "mask_of",
    "scale_and_mask",
    "waiting_state",
]

get_trace = Trace_ELBO._get_trace


def constraint_of(name: str) -> Any:
    """Return the constraint under which the parameter store keeps `name`, or None (``ParamStoreDict._constraints``)."""
    return pyro.get_param_store()._constraints.get(name)


def leaf_of(name: str) -> Tensor | None:
    """Return the unconstrained leaf of `name` in the parameter store, or None (``ParamStoreDict._params``)."""
    return pyro.get_param_store()._params.get(name)


def mask_of(fn: Any) -> Any:
    """Return the mask of a `MaskedDistribution`, a boolean or a tensor (``_mask``)."""
    return fn._mask


def draws_of(mcmc: Any) -> dict[str, Tensor] | None:
    """Return the draws of an `MCMC` by site, chains first, or None before its run (``_samples``)."""
    return mcmc._samples


def waiting_state(optim: Any) -> dict[str, Any]:
    """Return the live dictionary of state that was loaded into `optim` and waits for its parameters, by name.

    It is ``PyroOptim._state_waiting_to_be_consumed``; for anything else a new one.
    """
    return getattr(optim, "_state_waiting_to_be_consumed", {})
