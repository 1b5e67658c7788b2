r"""The contract of a posterior: the only thing that an M-step sees of an E-step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..particles import Particles

__all__ = ["Posterior"]


class Posterior(ABC):
    """A distribution over the latents given the data, as an E-step leaves it."""

    kind: str

    @abstractmethod
    def particles(self, num_particles: int) -> Particles:
        """Return draws with the densities of model and guide."""

    @abstractmethod
    def marginal(self, site: str) -> Any:
        """Return the distribution of one site."""

    @abstractmethod
    def expect(self, function: Callable[[dict[str, Tensor]], Tensor], num_particles: int = 100) -> Tensor:
        """Return the expectation of a function of the latents' values."""
