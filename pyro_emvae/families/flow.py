r"""Normalizing flows: any of zuko's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.transforms import AffineTransform
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to

from .._checks import EmvaeError, ModelError, fail, positive_int
from .._registry import Traits, register
from ._maps import flat, scale
from ._normals import reshaped
from ._supports import base_of, support_of
from .base import Family

__all__ = ["Flow"]


@dataclass(frozen=True)
class Flow(Family):
    r"""A normalizing flow of `zuko`, conditional on the context, shifted and scaled.

    $$z=a+s\odot u,\qquad u\sim\text{flow}(h).$$

    The context holds a, then s as in `Normal`, then h, which the flow reads; flows begin near a standard normal and
    know little of what is far from it, so that place and size are not theirs to learn. At context zero: the flow's own
    distribution at h = 0, with its random initial weights.

    When to use: posteriors that are bent, skewed or of several modes. Reparameterised, if the flow is. Its weights are
    parameters beside the context's, shared by all data; the guide registers them.

    Args:
        flow: A function of (features, context) that returns a flow, such as the class ``zuko.flows.MAF`` or a
            `functools.partial` of it: each site has its own. Or a flow, as is; given for several sites, they share its
            weights. None: ``zuko.flows.NSF`` with three coupling transforms.
        context: The width of h; 0 for an unconditional flow.

    Shape: context ``(*batch, 2 n + context)`` -> batch shape ``batch``, event shape of n entries.

    Importing zuko switches torch's validation of distributions off for the whole process. If this class is the first to
    import it, the switch is put back as it was.

    Raises:
        EmvaeError: If zuko is missing; the flow is used before `for_site` made it; its dtype is not the context's.
        ModelError: If a given flow does not fit the site's size or the context's width.

    Source: Rozet et al. 2022, "Zuko"; Durkan et al. 2019, "Neural spline flows". Differs: shifted and scaled.

    Example:
        >>> family = Flow(context=4).for_site("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> fn = family.distribution(torch.zeros(5, family.num_features(torch.Size([2]))), torch.Size([2]))
        >>> fn.batch_shape, fn.event_shape, fn.has_rsample, len(family.modules())
        (torch.Size([5]), torch.Size([2]), True, 1)
    """

    flow: Callable[[int, int], nn.Module] | nn.Module | None = field(default=None, repr=False)
    context: int = 8
    traits: ClassVar[Traits] = Traits(support="continuous")

    def __post_init__(self) -> None:
        positive_int("Flow", "context", self.context, minimum=0)

    def for_site(self, name: str, fn: Any, support: Any = None) -> Flow:
        super().for_site(name, fn, support)
        size = math.prod(biject_to(support_of(fn, support)).inverse_shape(fn.event_shape))
        made = self
        if not isinstance(self.flow, nn.Module):
            make = _coupling if self.flow is None else self.flow
            made = dataclasses.replace(self, flow=make(size, self.context).to(_like(fn)))
        made._check(name, size)
        return made

    def num_features(self, event_shape: torch.Size) -> int:
        return 2 * math.prod(event_shape) + self.context

    def distribution(self, context: Tensor, event_shape: torch.Size) -> Any:
        n = math.prod(event_shape)
        loc, raw, given = context.split([n, n, self.context], -1)
        law = Wrapped(self._law(given))
        return reshaped(dist.TransformedDistribution(law, [AffineTransform(loc, scale(raw, 1.0), 1)]), event_shape)

    def start(self, value: Tensor, event_shape: torch.Size) -> Tensor:
        zeros = super().start(value, event_shape)
        loc = flat(value, event_shape)
        return torch.cat([loc, zeros[..., loc.shape[-1] :]], -1)

    def modules(self) -> tuple[nn.Module, ...]:
        return (self.flow,) if isinstance(self.flow, nn.Module) else ()

    def _law(self, given: Tensor) -> Distribution:
        """Return the flow's distribution at a context."""
        if not isinstance(self.flow, nn.Module):
            fail(
                EmvaeError,
                "Flow",
                "make a distribution",
                got="a flow without weights",
                because="they are made for a site, whose size has to be known",
                fix='Call family = family.for_site("z", fn) first.',
            )
        weight = next(self.flow.parameters(), given)
        if (weight.dtype, weight.device) != (given.dtype, given.device):
            fail(
                EmvaeError,
                "Flow",
                "read its context",
                got=f"{given.dtype} on {given.device}",
                because=f"the flow's weights are {weight.dtype} on {weight.device}",
                fix="Move the flow, as in flow.to(x), before the guide is made; or the guide, as in guide.to(x).",
            )
        return self.flow(given) if self.context else self.flow().expand(given.shape[:-1])

    def _check(self, name: str, size: int) -> None:
        """Raise `ModelError` if the flow cannot score values of the site's size."""
        like = next(self.flow.parameters(), torch.zeros(()))
        try:
            with torch.no_grad():
                law = self._law(like.new_zeros(self.context))
                law.log_prob(like.new_zeros(size))
            found = math.prod(law.event_shape)
            cause = None
        except (RuntimeError, ValueError, IndexError) as error:
            found, cause = None, error
        if found != size:
            fail(
                ModelError,
                "Flow",
                f"serve site {name!r}",
                got=f"a flow that {cause}" if found is None else f"a flow of {found} features",
                because=f"the site has {size} unconstrained entries, and the flow's context is {self.context} wide",
                fix=f"Write Flow(zuko.flows.NSF({size}, {self.context}), context={self.context}).",
                cause=cause,
            )


class Wrapped(TorchDistribution):
    """A distribution of zuko's with the methods of Pyro's.

    Args:
        law: The distribution.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(self, law: Distribution) -> None:
        self.law = law
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return self.law.has_rsample

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Wrapped:
        return Wrapped(self.law.expand(torch.Size(batch_shape)))

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return self.law.rsample(torch.Size(sample_shape))

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        with torch.no_grad():
            return self.law.sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.law.log_prob(value)


def _coupling(features: int, context: int) -> nn.Module:
    """Return the flow that is used if none is given."""
    before = vars(Distribution)["_validate_args"]
    try:
        import zuko
    except ImportError as cause:
        fail(
            EmvaeError,
            "Flow",
            "make a flow",
            got="no package zuko",
            because="flows are zuko's",
            fix="Install it: pip install 'pyro_emvae[flows]'.",
            cause=cause,
        )
    finally:
        Distribution.set_default_validate_args(before)
    return zuko.flows.NSF(features, context, passes=2, hidden_features=(64, 64))


def _like(fn: Any) -> Tensor:
    """Return a floating tensor of a distribution, for its dtype and device."""
    tensors = (v for v in vars(base_of(fn)).values() if isinstance(v, Tensor) and v.is_floating_point())
    return next(tensors, torch.zeros(()))


register(
    "family",
    "flow",
    Flow,
    aliases=("normalizing_flow",),
    summary="normalizing flows of zuko, shifted and scaled",
    source="Rozet et al. 2022",
)
