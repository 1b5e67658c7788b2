r"""Mixtures of other families."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Categorical

from .._checks import EmvaeError, fail
from .._registry import Traits, create, register
from .base import Family

__all__ = ["Mixture"]

SPREAD = 0.5
BISECTIONS = 60
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Mixture(Family):
    r"""Mixtures of families that serve the same sites.

    $$q(z\mid c)=\sum_k\pi_k\,q_k(z\mid c_k),\qquad \pi=\mathrm{softmax}(c_0).$$

    The context holds the K logits, then the contexts of the components. At context zero the weights are equal, and each
    component has fixed offsets to its own context, normal scores of size 0.5: equal components would have equal
    gradients, and stay equal for ever.

    When to use: posteriors of several modes. Not reparameterised, for the component is drawn; estimators by score, such
    as ``"leave_one_out"``. Cost: a draw of each component, and each one's density. Of a constrained site, whose draw is
    an auxiliary site, the gradient of Pyro's `Trace_ELBO` is biased: its score function leaves log densities of
    auxiliary sites out. `TraceGraph_ELBO`, `TraceEnum_ELBO` and `MonteCarloELBO` have them.

    Args:
        components: Registered names or instances, two at least.

    Shape: context ``(*batch, K + features of the components)`` -> batch shape ``batch``, event shape of n entries.

    Raises:
        EmvaeError: If there are fewer than two components, they do not draw in the same support, or some are point
            masses and some are not.

    Source: Morningstar et al. 2021, "Automatic differentiation variational inference with mixtures". Differs: drawn,
    not stratified.

    Example:
        >>> family = Mixture(["normal", "student_t"])
        >>> family.num_features(torch.Size([1]))
        7
        >>> family.distribution(torch.zeros(3, 7), torch.Size([1])).batch_shape
        torch.Size([3])
    """

    components: Sequence[str | Family] = ("normal", "normal")

    def __post_init__(self) -> None:
        given = (self.components,) if isinstance(self.components, str) else tuple(self.components)
        families = tuple(create("family", part) for part in given)
        object.__setattr__(self, "components", families)
        if len(families) < 2 or not all(isinstance(part, Family) for part in families):
            self._fail(f"components {given!r:.80}", "it takes two families at least", 'Write Mixture(["normal"] * 3).')
        if len({(part.traits.support, part.direct) for part in families}) > 1:
            supports = {type(part).__name__: part.traits.support for part in families}
            self._fail(
                f"components with supports {supports}",
                "all components draw in the same support",
                'Write Mixture(["normal", "student_t"]), or others that have one support.',
            )

    @property
    def traits(self) -> Traits:
        """Those of the components."""
        return Traits(support=self.components[0].traits.support)

    @property
    def direct(self) -> bool:
        return self.components[0].direct

    def for_site(self, name: str, fn: Any, support: Any = None) -> Mixture:
        super().for_site(name, fn, support)
        bound = tuple(part.for_site(name, fn, support) for part in self.components)
        return dataclasses.replace(self, components=bound)

    def num_features(self, event_shape: torch.Size) -> int:
        return len(self.components) + sum(part.num_features(event_shape) for part in self.components)

    def distribution(self, context: Tensor, event_shape: torch.Size) -> Any:
        logits, *rest = context.split(self._widths(event_shape), -1)
        parts = [
            part.distribution(own + _offsets(k, len(rest), own), event_shape)
            for k, (part, own) in enumerate(zip(self.components, rest, strict=True))
        ]
        return MixtureOf(logits, parts)

    def start(self, value: Tensor, event_shape: torch.Size) -> Tensor:
        starts = [part.start(value, event_shape) for part in self.components]
        return torch.cat([torch.zeros_like(starts[0][..., :1].expand(*starts[0].shape[:-1], len(starts))), *starts], -1)

    def quantile(self, fn: Any, level: Tensor) -> Tensor:
        """Return the marginal quantiles, by bisection between the least and the greatest of the components'."""
        pairs = list(zip(self.components, fn.parts, strict=True))
        each = torch.stack(torch.broadcast_tensors(*(family.quantile(part, level) for family, part in pairs)))
        low, high = each.amin(0), each.amax(0)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            below = self.cdf(fn, middle) < level
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def cdf(self, fn: Any, value: Tensor) -> Tensor:
        weights = fn.logits.exp().reshape(*fn.logits.shape[:-1], *[1] * len(fn.event_shape), -1)
        pairs = zip(self.components, fn.parts, strict=True)
        return (weights * torch.stack([family.cdf(part, value) for family, part in pairs], -1)).sum(-1)

    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(module for part in self.components for module in part.modules())

    def _widths(self, event_shape: torch.Size) -> list[int]:
        return [len(self.components), *(part.num_features(event_shape) for part in self.components)]

    def _fail(self, got: str, because: str, fix: str) -> None:
        fail(EmvaeError, "Mixture", "mix its components", got=got, because=because, fix=fix)


class MixtureOf(TorchDistribution):
    r"""A mixture of distributions of the same shape, of any kinds.

    Args:
        logits: ``(*batch, K)``.
        parts: K distributions of batch shape ``batch``.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, logits: Tensor, parts: Sequence[Any]) -> None:
        self.logits, self.parts = logits - logits.logsumexp(-1, keepdim=True), tuple(parts)
        super().__init__(logits.shape[:-1], parts[0].event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.parts[0].support

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> MixtureOf:
        batch = torch.Size(batch_shape)
        return MixtureOf(self.logits.expand(*batch, -1), [part.expand(batch) for part in self.parts])

    def log_prob(self, value: Tensor) -> Tensor:
        densities = torch.stack([part.log_prob(value) for part in self.parts], -1)
        return (self.logits + densities).logsumexp(-1)

    @torch.no_grad()
    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        chosen = Categorical(logits=self.logits).sample(torch.Size(sample_shape))
        chosen = chosen.reshape(chosen.shape + (1,) * len(self.event_shape))
        value = self.parts[0].sample(sample_shape)
        for k, part in enumerate(self.parts[1:], 1):
            value = torch.where(chosen == k, part.sample(sample_shape), value)
        return value

    @property
    def mean(self) -> Tensor:
        weights = self.logits.exp().reshape(*self.logits.shape[:-1], *[1] * len(self.event_shape), -1)
        return (weights * torch.stack([part.mean for part in self.parts], -1)).sum(-1)


def _offsets(k: int, count: int, like: Tensor) -> Tensor:
    """Return component k's offsets: at each feature the components are spread evenly over a normal distribution."""
    feature = torch.arange(like.shape[-1], dtype=torch.float64, device=like.device)
    level = ((k + 0.5) / count + GOLDEN * feature) % 1
    return SPREAD * torch.special.ndtri(level.clamp(1e-3, 1 - 1e-3)).to(like.dtype)


register(
    "family",
    "mixture",
    Mixture,
    Traits(support="continuous"),
    summary="mixtures of other families",
    source="Morningstar et al. 2021",
)
