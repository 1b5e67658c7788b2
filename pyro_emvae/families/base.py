r"""The contract of a family: a context, one row per value, becomes a distribution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._checks import EmvaeError, ModelError, fail
from .._registry import Traits
from ._charts import Chart
from ._quantiles import quantile
from ._supports import base_of, names_for, serves, support_of

__all__ = ["Family"]


class Family(ABC):
    r"""How a site of the guide is distributed, given a context.

    A context of zeros stands for the family's initial distribution, so that encoders and free parameters that start
    near zero start there. Families hold settings only and are never changed by use. Whatever the context, the
    distribution is a valid one, and gradients are finite: that is tested for contexts up to 1000.

    A guide asks once per site ``family = family.for_site(name, fn)`` with the model's distribution there, and from
    then on uses what it got. ``traits.support`` says which sites a family can serve and where it draws:

    * ``"continuous"``: any site with a bijection to the reals. The family draws *unconstrained* values; the guide puts
      the bijection around them.
    * ``"positive"``, ``"unit_interval"``, ``"simplex"``, ``"circle"``; ``"binary"``, ``"categorical"``, ``"one_hot"``:
      sites of this support, in which the family draws itself, see `direct`.
    * ``"any"``, ``"discrete"``: as they say; a family of this kind draws unconstrained values unless it sets `direct`.

    Only `num_features` and `distribution` are required.
    """

    traits: ClassVar[Traits]

    @abstractmethod
    def num_features(self, event_shape: torch.Size) -> int:
        """Return the number of context entries that one value of shape `event_shape` needs."""

    @abstractmethod
    def distribution(self, context: Tensor, event_shape: torch.Size) -> Any:
        r"""Return the distribution of the values: unconstrained ones, or those of the site if `direct`.

        Args:
            context: ``(*batch, num_features)``.
            event_shape: Shape of one value.

        Returns:
            A Pyro distribution with batch shape ``batch`` and event shape `event_shape`, on the context's device and
            in its dtype. It says by ``has_rsample`` whether it is reparameterised.
        """

    @property
    def direct(self) -> bool:
        """Whether values are drawn in the site's own support, without a bijection around the family."""
        return self.traits.support not in ("any", "continuous", "discrete")

    def fits(self, fn: Any, support: Any = None) -> bool:
        """Return whether a site of the model with distribution `fn` can be served; `support` replaces its support."""
        return serves(self.traits.support, fn, support)

    def for_site(self, name: str, fn: Any, support: Any = None) -> Family:
        r"""Return the family that knows what it has to of a site: itself, or a copy with the number of categories.

        Args:
            name: The site's name, for errors.
            fn: The model's distribution there.
            support: In place of ``fn.support``, such as the support of one datum.

        Raises:
            ModelError: If the support does not fit; names the families that do.
        """
        if not self.fits(fn, support):
            self._refuse(name, fn, support)
        return self

    def start(self, value: Tensor, event_shape: torch.Size) -> Tensor:
        r"""Return a context whose distribution sits at a value: zeros, if the family has no location.

        Args:
            value: ``(*batch, *event_shape)``, where `distribution` draws.
        """
        batch = value.shape[: value.dim() - len(event_shape)]
        return value.new_zeros(*batch, self.num_features(event_shape))

    def chart(self, context: Tensor, event_shape: torch.Size) -> Chart | None:
        r"""Return the family as an exponential family about the members of a context, if it is one.

        With it, a guide of free parameters can take steps by natural gradients.

        Args:
            context: ``(*batch, num_features)``.
            event_shape: Shape of one value.
        """
        return None

    def modules(self) -> tuple[nn.Module, ...]:
        """Return modules with parameters of the family's own, such as a flow's; the guide registers them."""
        return ()

    def quantile(self, fn: Any, level: Tensor) -> Tensor:
        r"""Return the marginal quantiles of each coordinate.

        Args:
            fn: What `distribution` returned.
            level: Probabilities that broadcast against ``(*batch, *event)``.

        By default those of the distribution's kind.
        """
        found = quantile(fn, level)
        if found is None:
            self._lacks("give medians and quantiles", "the inverse distribution function")
        return found

    def cdf(self, fn: Any, value: Tensor) -> Tensor:
        r"""Return the marginal distribution function of each coordinate: the inverse of `quantile`.

        Args:
            fn: What `distribution` returned.
            value: What broadcasts against ``(*batch, *event)``.
        """
        self._lacks("give probabilities", "the distribution function")

    def _lacks(self, act: str, what: str) -> None:
        fail(
            EmvaeError,
            type(self).__name__,
            act,
            got=f"a family without {what}",
            because="they need it for each coordinate",
            fix="Draw from the guide with pyro.infer.Predictive and take empirical ones.",
        )

    def _refuse(self, name: str, fn: Any, support: Any) -> None:
        fitting = [f'"{name}"' for name in names_for(fn, support)]
        by_hand = "Write its part of the guide by hand, and add both to a pyro.infer.autoguide.AutoGuideList."
        fail(
            ModelError,
            type(self).__name__,
            f"serve site {name!r}",
            got=f"{type(base_of(fn)).__name__} with support {support_of(fn, support)}",
            because=f"the support of its values is {self.traits.support}",
            fix=f"Write family={', or '.join(fitting)}." if fitting else by_hand,
        )
