r"""Where starts begin."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import EmvaeError, ModelError, fail, nearest
from ..engine import Engine
from ..parameters import assign

__all__ = ["Initial", "check", "read", "values_of", "write"]

KINDS = ("mixed", "noise")
NOISE_EVERY = 4  # of the mixed starts that an M-step finds from the data, every fourth is noise

Leaves = dict[str, Tensor]


class Initial:
    r"""Initial values of the starts of a search.

    Start 0 has the present values. The others, ``"mixed"``: what the M-step finds from the data (``start(seed, params,
    *args, **kwargs)``; those of the ready mixtures take k-means, k-means++ and random data in turn), and every fourth
    is noise; all are noise for an M-step that knows no start, and for ``"noise"``. Noise is added to the unconstrained
    present values: normal, with the standard deviation ``max(1, root mean square)`` of each parameter; of the weights
    of networks, whose scale belongs to their width, the root mean square alone.

    Args:
        engine: Has the parameters.
        init: ``"mixed"``, ``"noise"``, or a function of the seed, ``init(seed)``, or of seed and data,
            ``init(seed, *args, **kwargs)``, that returns constrained values by name; those not returned stay as they
            are. The data are passed to a function that has other parameters without a default.
        args, kwargs: The data.
        start: The M-step's start, or None.

    Raises:
        EmvaeError: Another `init`; one that returns no mapping.
        ModelError: It returns unknown names, wrong shapes or values outside their constraint.

    Source: Arthur and Vassilvitskii 2007; Baudry and Celeux 2015, for mixing kinds of starts.
    """

    def __init__(
        self, engine: Engine, init: Any, args: tuple, kwargs: Mapping[str, Any], start: Callable | None = None
    ) -> None:
        check(init)
        self.engine, self.init, self.args, self.kwargs = engine, init, args, dict(kwargs)
        self.start = start if init == "mixed" else None

    def kind(self, number: int, seed: int) -> str:
        """Return how a start begins: ``"given"``, ``"present"``, ``"noise"``, or what the M-step calls it."""
        if callable(self.init):
            return "given"
        if not number:
            return "present"
        if self.start is None or not number % NOISE_EVERY:
            return "noise"
        kinds = getattr(self.start, "kinds", ("data",))
        return kinds[seed % len(kinds)]

    def __call__(self, number: int, seed: int, noise: float, present: Leaves) -> Leaves:
        """Return the unconstrained values of a start, given the present ones; the engine has them afterwards."""
        kind = self.kind(number, seed)
        write(self.engine, present)
        if kind == "given":
            assign(self.engine.parameters, values_of(self.init, seed, self.args, self.kwargs))
        elif kind == "noise":
            write(self.engine, self._noisy(seed, noise, present))
        elif kind != "present":
            params = self.engine.parameters.constrained()
            assign(self.engine.parameters, self.start(seed, params, *self.args, **self.kwargs))
        return read(self.engine)

    def _noisy(self, seed: int, noise: float, present: Leaves) -> Leaves:
        generator, owners = torch.Generator().manual_seed(seed), self.engine.parameters.owners
        found = {}
        for name, leaf in present.items():
            drawn = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
            size = leaf.square().mean().sqrt() if leaf.numel() else leaf.new_zeros(())
            in_network = any(map(_is_layer, (module for module, _ in owners.get(name, ()))))
            found[name] = leaf + noise * drawn * (size if in_network else size.clamp(min=1.0))
        return found


def check(init: Any) -> None:
    """Refuse an `init` that is neither a known name nor a function."""
    if not callable(init) and init not in KINDS:
        fail(
            EmvaeError,
            "run",
            f"start from init={init!r}",
            got="an unknown choice",
            because=f"init is one of {KINDS}, or a function of the seed that returns initial values",
            fix=nearest(str(init), KINDS),
        )


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch's layers."""
    return any(c.__module__.startswith("torch.nn.modules.") and c is not nn.Module for c in type(module).__mro__)


def values_of(init: Callable, seed: int, args: tuple, kwargs: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return what the user's function gives for a seed; the data are passed if it has parameters for them."""
    try:
        parameters = list(inspect.signature(init).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    takes = any(p.kind is p.VAR_POSITIONAL or p.default is p.empty for p in parameters[1:] if p.kind != p.VAR_KEYWORD)
    found = init(seed, *args, **kwargs) if takes else init(seed)
    if not isinstance(found, Mapping):
        fail(
            ModelError,
            "run",
            "start from what init returned",
            got=type(found).__name__,
            because="it returns initial values by parameter name",
            fix='Write init=lambda seed: {"means": ...}.',
        )
    return found


def read(engine: Engine) -> Leaves:
    """Return copies of all unconstrained parameters."""
    return {row.name: row.leaf.detach().clone() for row in engine.parameters.rows}


def write(engine: Engine, leaves: Mapping[str, Tensor]) -> None:
    """Write unconstrained parameters in place."""
    with torch.no_grad():
        for row in engine.parameters.rows:
            row.leaf.copy_(leaves[row.name])
