r"""Independent von Mises distributions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from .._registry import Traits, register
from ._maps import flat, parts
from ._supports import base_of
from .base import Family

__all__ = ["VonMises"]

ROUNDS = 6
PROPOSALS = 4


@dataclass(frozen=True)
class VonMises(Family):
    r"""Independent von Mises distributions, for angles.

    $$q(z\mid c)=\prod_i\frac{\exp(c_i\cos z_i+c_{n+i}\sin z_i)}{2\pi I_0(\kappa_i)},\qquad
    \kappa_i=\sqrt{c_i^2+c_{n+i}^2}.$$

    The context holds the natural parameters: those of the cosines, then those of the sines. So all that is smooth in
    the angle is smooth in them, and no encoder has to jump somewhere on the circle. At context zero: uniform.

    When to use: von Mises sites, and uniform ones from -pi to pi; draws are from -pi to pi. Not reparameterised
    (``has_rsample`` is False, as torch's): estimators by score, such as ``"leave_one_out"``.

    Quantiles are counted counterclockwise from the antipode of the mean direction, so that the median is the mean
    direction; an interval between two of them is an arc, which may pass pi.

    Numerics: draws are made in float64 from 24 proposals, of which 2 in 3 are accepted or more; that all fail has a
    probability below 1e-11, and then the mean direction stands in. There is no loop that depends on data.

    Shape: context ``(*batch, 2 n)`` -> batch shape ``batch``, event shape of n entries.

    Source: Best and Fisher 1979, "Efficient simulation of the von Mises distribution". Differs: a fixed number of
    proposals.

    Example:
        >>> fn = VonMises().distribution(torch.tensor([0.0, 2.0]), torch.Size([]))
        >>> round(fn.mean.item(), 4), round(fn.log_prob(torch.tensor(0.0)).item(), 4), fn.has_rsample
        (1.5708, -2.6619, False)
    """

    traits: ClassVar[Traits] = Traits(support="circle")

    def num_features(self, event_shape: torch.Size) -> int:
        return 2 * math.prod(event_shape)

    def distribution(self, context: Tensor, event_shape: torch.Size) -> Any:
        return NaturalVonMises(*parts(context, event_shape, 2)).to_event(len(event_shape))

    def start(self, value: Tensor, event_shape: torch.Size) -> Tensor:
        angle = flat(value, event_shape)
        return torch.cat([angle.cos(), angle.sin()], -1)

    def quantile(self, fn: Any, level: Tensor) -> Tensor:
        from scipy.stats import vonmises

        fn = base_of(fn)
        arrays = (tensor.detach().double().cpu().numpy() for tensor in (level, fn.concentration))
        return _wrapped(fn.mean + torch.as_tensor(vonmises.ppf(*arrays)).to(fn.mean))


class NaturalVonMises(TorchDistribution):
    r"""The von Mises distribution by its natural parameters, whose gradients are finite at zero too.

    Args:
        cosine, sine: $\kappa\cos\mu$ and $\kappa\sin\mu$.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"cosine": constraints.real, "sine": constraints.real}
    support = constraints.real
    has_rsample = False

    def __init__(self, cosine: Tensor, sine: Tensor, validate_args: bool | None = None) -> None:
        self.cosine, self.sine = torch.broadcast_tensors(cosine, sine)
        super().__init__(self.cosine.shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> NaturalVonMises:
        return NaturalVonMises(self.cosine.expand(batch_shape), self.sine.expand(batch_shape), validate_args=False)

    @property
    def concentration(self) -> Tensor:
        r"""$\kappa$; at zero its gradient is taken as zero, as that of $\log I_0(\kappa)$ is."""
        flat = (self.cosine == 0) & (self.sine == 0)
        return torch.where(flat, 0.0, torch.hypot(torch.where(flat, 1.0, self.cosine), self.sine))

    @property
    def mean(self) -> Tensor:
        """The mean direction."""
        return torch.atan2(self.sine.detach(), self.cosine.detach())

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        kappa = self.concentration
        aligned = self.cosine * value.cos() + self.sine * value.sin() - kappa
        return aligned - torch.special.i0e(kappa).log() - math.log(2 * math.pi)

    @torch.no_grad()
    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        kappa, mean = self.concentration.double(), torch.atan2(self.sine.double(), self.cosine.double())
        angle = _angles(kappa.expand(shape))
        return _wrapped((angle + mean).to(self.cosine.dtype))


def _angles(kappa: Tensor) -> Tensor:
    """Return draws around the angle zero: the last accepted one of a fixed number of proposals."""
    kappa = kappa.clamp(min=1e-5)
    tau = 1 + (1 + 4 * kappa.square()).sqrt()
    rho = (tau - (2 * tau).sqrt()) / (2 * kappa)
    r = (1 + rho.square()) / (2 * rho)
    angle = torch.zeros_like(kappa)
    for _ in range(ROUNDS):
        u = torch.rand((3, PROPOSALS, *kappa.shape), dtype=kappa.dtype, device=kappa.device)
        z = (math.pi * u[0]).cos()
        f = (1 + r * z) / (r + z)
        c = kappa * (r - f)
        accepted = (c * (2 - c) > u[1]) | ((c / u[1]).log() + 1 - c >= 0)
        proposed = (u[2] - 0.5).sign() * f.clamp(-1, 1).acos()
        for one, new in zip(accepted, proposed, strict=True):
            angle = torch.where(one, new, angle)
    return angle


def _wrapped(angle: Tensor) -> Tensor:
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


register(
    "family",
    "von_mises",
    VonMises,
    aliases=("vonmises",),
    summary="independent von Mises distributions, for angles",
    source="Best & Fisher 1979",
)
