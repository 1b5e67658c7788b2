r"""How a latent's context follows the values of earlier latents."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.nn.functional import one_hot

from ._sites import LocalSite

__all__ = ["Dependence", "Earlier", "earlier_of"]

WIDTH = 64


@dataclass(frozen=True)
class Earlier:
    r"""How the value of a latent is read by later ones.

    Args:
        name: The site's name.
        plates: The plates that it lies in.
        event_dim: Event dims of what is read.
        width: Columns.
        num_categories: The number of values of a category, else 0.
        transform: From unconstrained values to what is read, whose inverse is taken; None if it is read as it is.
        is_shared: Whether all data share it; its columns are then divided by their number.
    """

    name: str
    plates: frozenset[str]
    event_dim: int
    width: int
    num_categories: int = 0
    transform: Any = None
    is_shared: bool = False

    def columns(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a value as ``(*batch, width)``."""
        if self.transform is not None:
            value = self.transform.inv(value)
        if self.num_categories:
            value = one_hot(value.long(), self.num_categories)
        batch = value.shape[: value.dim() - self.event_dim - bool(self.num_categories)]
        value = value.reshape(*batch, self.width).to(dtype)
        return value / self.width if self.is_shared and self.width > 1 else value


def earlier_of(node: Mapping[str, Any], site: LocalSite | None) -> Earlier:
    """Return how a latent is read: a local one as its family draws it, another without its constraints."""
    fn, name = node["fn"], node["name"]
    plates = frozenset(frame.name for frame in node["cond_indep_stack"])
    if fn.support.is_discrete:
        support, base = fn.support, fn
        while isinstance(support, constraints.independent):
            support, base = support.base_constraint, getattr(base, "base_dist", base)
        logits = getattr(base, "logits", None) if isinstance(support, constraints.integer_interval) else None
        categories = logits.shape[-1] if isinstance(logits, Tensor) and logits.dim() > len(base.batch_shape) else 0
        width = fn.event_shape.numel() * max(categories, 1)
        return Earlier(name, plates, fn.event_dim, width, categories, is_shared=site is None)
    if site is not None:
        return Earlier(name, plates, len(site.event_shape), site.event_shape.numel())
    transform = biject_to(fn.support)
    shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)[len(fn.batch_shape) :]
    return Earlier(name, plates, len(shape), torch.Size(shape).numel(), 0, transform, True)


class Dependence(nn.Module):
    r"""Context of each latent, given the values of those before it.

    $$h'_s=h_s+A_s z_{<s}+f_s(h_s,z_{<s}),$$

    with $f_s$ a layer of 64 SiLU units; $A_s$ and the last layer of $f_s$ start at zero, so that the guide starts
    without dependence. A site sees those earlier ones that are read and whose plates all hold it as well.

    The n columns of a latent outside the data plate are divided by n: an optimizer such as Adam moves the weight of
    each column as much, and the contexts of all data by the sum.

    Args:
        sites: The local latents.
        earlier: All latents in the order in which they are drawn.
        read: Names of those whose values are read.
        like: A tensor of the device and dtype.

    Source: Rezende et al. 2014, "Stochastic backpropagation and approximate inference in deep generative models", for
    recognition models of several layers. Differs: the model's order, not its reverse.
    """

    def __init__(
        self, sites: Sequence[LocalSite], earlier: Sequence[Earlier], read: Collection[str], like: Tensor
    ) -> None:
        super().__init__()
        options = {"device": like.device, "dtype": like.dtype}
        names = [e.name for e in earlier]
        self.seen = {
            s.name: [e for e in earlier[: names.index(s.name)] if e.name in read and e.plates <= set(s.plates)]
            for s in sites
        }
        self.index: dict[str, int] = {}
        self.linear, self.first, self.last = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for site in sites:
            width = sum(e.width for e in self.seen[site.name])
            if width and site.width:
                self.index[site.name] = len(self.linear)
                self.linear.append(_zero(nn.Linear(width, site.width, bias=False, **options)))
                self.first.append(nn.Linear(site.width + width, WIDTH, **options))
                self.last.append(_zero(nn.Linear(WIDTH, site.width, **options)))

    def forward(self, name: str, context: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Return the context of site `name`: ``(*batch, columns)``."""
        i = self.index.get(name)
        if i is None:
            return context
        parts = [e.columns(values[e.name], context.dtype) for e in self.seen[name]]
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in (context, *parts)))
        earlier = torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)
        context = context.expand(*batch, context.shape[-1])
        hidden = nn.functional.silu(self.first[i](torch.cat([context, earlier], -1)))
        return context + self.linear[i](earlier) + self.last[i](hidden)


def _zero(layer: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    return layer
