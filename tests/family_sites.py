r"""Sites of a model that each kind of family serves, by its trait `support`; and the family made for one."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_emvae._registry import create, entries
from pyro_emvae.families import Family

CATEGORIES = 3

SITES = {
    "continuous": lambda shape: dist.Normal(torch.zeros(shape), 1.0),
    "positive": lambda shape: dist.Gamma(torch.ones(shape), 1.0),
    "unit_interval": lambda shape: dist.Beta(torch.ones(shape), 1.0),
    "circle": lambda shape: dist.VonMises(torch.zeros(shape), 1.0),
    "simplex": lambda shape: dist.Dirichlet(torch.ones(*shape, CATEGORIES)),
    "binary": lambda shape: dist.Bernoulli(torch.full(shape, 0.5)),
    "categorical": lambda shape: dist.Categorical(torch.ones(*shape, CATEGORIES)),
    "one_hot": lambda shape: dist.OneHotCategorical(torch.ones(*shape, CATEGORIES)),
}
DISCRETE = ("binary", "categorical", "one_hot")
FAMILIES = [entry.name for entry in entries("family")]
SUPPORT = {entry.name: entry.traits.support for entry in entries("family")}


def site(support: str, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Any:
    """Return a site's distribution without batch dims."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return SITES[support](torch.Size(shape)).to_event(len(shape))
    finally:
        torch.set_default_dtype(before)


def bound(
    part: str | Family, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
) -> tuple[Family, torch.Size]:
    """Return the family made for a site, and the shape of the values that it draws."""
    family = create("family", part)
    fn = site(family.traits.support, shape, dtype)
    return family.for_site("z", fn), fn.event_shape


def draw(fn: Any, shape: tuple[int, ...] = ()) -> Tensor:
    return fn.rsample(torch.Size(shape)) if fn.has_rsample else fn.sample(torch.Size(shape))
