r"""A guide that draws the latents from the model's own prior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro import poutine

__all__ = ["Prior"]


class Prior:
    r"""The prior $p_\theta(z)$ of a model as a guide: importance weights under it are likelihoods $p_\theta(x_n|z)$.

    Args:
        model: A Pyro callable; it is run with its observed sites hidden.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x): pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)
        >>> list(poutine.trace(Prior(model)).get_trace(torch.tensor(1.0)).stochastic_nodes)
        ['z']
    """

    def __init__(self, model: Callable) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with poutine.block(hide_fn=lambda msg: msg["type"] == "sample" and msg["is_observed"]):
            self.model(*args, **kwargs)
