r"""Runs of the model on what a posterior of known form draws, all at once where that is right."""

from __future__ import annotations

from typing import Any

import torch

from ..particles import Particles, choose_vectorize, draw, hold_batch

__all__ = ["draws", "may_vectorize"]


def may_vectorize(posterior: Any) -> bool:
    """Whether the model may be run on many values at once; found out once for a model, and noted for its next E-step.

    Args:
        posterior: It has ``model, args, kwargs``, and in ``known`` what is known of models.
    """
    model, known = posterior.model, posterior.known
    if model not in known:
        pair = (model, _guide(posterior), posterior.args, posterior.kwargs)
        known.clear()
        known[model] = choose_vectorize(type(posterior).__name__, None, 2, None, pair, stacklevel=5)[0]
    return known[model]


def draws(posterior: Any, num_particles: int, max_plate_nesting: int) -> Particles:
    """Return draws with the densities of the model and of the posterior, on its batch."""
    with torch.no_grad(), hold_batch(posterior.batch):
        return draw(
            posterior.model,
            _guide(posterior),
            posterior.args,
            posterior.kwargs,
            num_particles=num_particles,
            vectorize=may_vectorize(posterior),
            max_plate_nesting=max_plate_nesting,
        )


def _guide(posterior: Any) -> Any:
    def guide(*args: Any, **kwargs: Any) -> None:
        posterior.sample()

    return guide
