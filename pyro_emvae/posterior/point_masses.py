r"""A model whose global latents a guide holds at points, so that the E-step has the others to itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
from pyro import poutine
from torch import Tensor

from .._checks import ModelError, fail

__all__ = ["AtPointMasses"]


class AtPointMasses:
    r"""A model in which the latents of a guide are held at its point masses $\hat\theta$: $p(x,z,\hat\theta)$.

    The guide's parameters are then the model's, with the latents' priors as a penalty: EM finds the mode of
    $p(\theta\,|\,x)$, with all other latents summed or integrated out.

    When to use: a model with priors on its global latents and an `AutoDelta` guide for these, as in Pyro's tutorial on
    Gaussian mixtures, in an EM whose E-step needs no guide: ``EM(AtPointMasses(model, guide), optim=optim,
    e_step="enumerated")``. With one gradient update per M-step its iterates are those of SVI with `TraceEnum_ELBO`.

    Args:
        model, guide: Pyro callables of the same arguments.

    Raises:
        ModelError: The guide has a latent that is no point mass.

    Source: Dempster, Laird and Rubin 1977, section 3, for EM on a posterior's mode.

    Example:
        >>> import pyro, torch
        >>> from pyro.infer.autoguide import AutoDelta, init_to_value
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         k = pyro.sample("k", dist.Bernoulli(0.5))
        ...         pyro.sample("x", dist.Normal(loc * (2 * k - 1), 1.0), obs=x)
        >>> start = init_to_value(values={"loc": torch.tensor(1.0)})
        >>> guide = AutoDelta(poutine.block(model, expose=["loc"]), init_loc_fn=start)
        >>> sorted(AtPointMasses(model, guide).values(torch.tensor([2.0, -2.0])))
        ['loc']
    """

    def __init__(self, model: Callable, guide: Callable) -> None:
        self.model, self.guide = model, guide

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with poutine.condition(data=self.values(*args, **kwargs)):
            return self.model(*args, **kwargs)

    def values(self, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        """Return the guide's points, attached to its parameters."""
        with poutine.block(hide_types=["sample"]), poutine.trace() as run:
            self.guide(*args, **kwargs)
        sites = {name: site for name, site in run.trace.nodes.items() if site["type"] == "sample"}
        latents = {n: s for n, s in sites.items() if not s["is_observed"] and type(s["fn"]).__name__ != "_Subsample"}
        for name, site in latents.items():
            if not isinstance(site["fn"], dist.Delta):
                fail(
                    ModelError,
                    "AtPointMasses",
                    f"hold {name!r} at a point",
                    got=f"{type(site['fn']).__name__}{tuple(site['fn'].shape())} in the guide",
                    because="the E-step stands for all latents that are no point masses",
                    fix=f"Leave {name!r} out of the guide: AutoDelta(poutine.block(model, hide=[{name!r}])).",
                )
        return {name: site["value"] for name, site in latents.items()}
