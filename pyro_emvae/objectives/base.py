r"""The contract of an objective, and the summands that all are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..particles import Particles

__all__ = ["Objective", "Term", "summands"]


class Term(NamedTuple):
    """A summand: where it comes from, its plates, and its scaled value ``(particles?, *plates)`` in nats.

    Its kind is ``"log_p"``, ``"entropy"`` (minus log q) or ``"kl"`` (log p - log q, integrated).
    """

    site: str
    kind: str
    frames: tuple
    value: Tensor


class Objective(ABC):
    """An objective that is *maximised*; it declares what it bounds.

    ``bounds`` says what its expectation is to the log evidence: ``"lower"``, ``"upper in the limit"`` (minus the
    objective, for infinitely many particles; for fewer it may lie on either side) or ``"neither"``.
    """

    name: ClassVar[str]
    bounds: ClassVar[str]
    splits_paths: ClassVar[bool] = False
    """Whether theta climbs with other weights than the values, so that the two paths have to be told apart."""

    @abstractmethod
    def terms(self, particles: Any) -> list[Term]:
        """Return the summands of log p - log q."""

    def integrated(self, terms: list[Term], particles: Any, names: Collection[str]) -> list[Term]:
        """Return summands of the same expectation, with the KL of the named sites integrated where it can be."""
        return terms

    def bound(self, particles: Any, terms: list[Term], moves: Callable[[str, str, str], bool]) -> Any:
        """Return the objective of several particles that the summands make up; None if it is their sum."""
        return None

    def check(self, num_particles: int) -> None:  # noqa: B027
        """Raise if the objective cannot be made of so many particles."""


def summands(particles: Particles, integrated: dict[str, Tensor]) -> list[Term]:
    """Return the summands of log p - log q; of integrated sites, minus the KL that is given."""
    terms = [Term(n, "kl", particles.guide[n].frames, -kl) for n, kl in integrated.items()]
    terms += [Term(n, "log_p", s.frames, s.scaled) for n, s in particles.model.items() if n not in integrated]
    terms += [Term(n, "entropy", s.frames, -s.scaled) for n, s in particles.guide.items() if n not in integrated]
    return terms
