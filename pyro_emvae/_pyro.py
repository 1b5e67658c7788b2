r"""The one list of non-public Pyro names that the package uses; `tests/test_pyro_names.py` checks their signatures."""

from __future__ import annotations

from typing import Any

import pyro
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = ["Messenger", "constraint_of", "get_trace", "leaf_of", "scale_and_mask"]

get_trace = Trace_ELBO._get_trace


def constraint_of(name: str) -> Any:
    """Return the constraint under which the parameter store keeps `name`, or None (``ParamStoreDict._constraints``)."""
    return pyro.get_param_store()._constraints.get(name)


def leaf_of(name: str) -> Tensor | None:
    """Return the unconstrained leaf of `name` in the parameter store, or None (``ParamStoreDict._params``)."""
    return pyro.get_param_store()._params.get(name)
