r"""The approximate E-step by the posterior's mode and the curvature there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import EmvaeError, fail, positive_int
from .._registry import Traits, register
from ..engine import Engine, State
from ..particles import keep_buffers, quiet
from ..posterior import GaussianPosterior, Posterior, find_mode
from .base import HalfStep, Info

__all__ = ["Laplace"]


class Laplace(HalfStep):
    r"""Laplace's approximation of the posterior, in unconstrained coordinates u of the latents.

    $$q(u_n)=N(\hat u_n,\Lambda_n^{-1}),\qquad\hat u_n=\arg\max f_n(u),\qquad\Lambda_n=-\nabla^2f_n(\hat u_n),$$

    where $f_n(u)=\log p_\theta(x_n,z_n(u))+\log|dz/du|$. Each mode is found by Newton steps that never lower f_n, from
    where the last E-step on the same data ended.

    When to use: latents with a posterior of one mode and many data each; generalised linear mixed models. Exact where
    f is quadratic. It is no bound: the objective of the history is minus $\hat f-\tfrac12\log|\Lambda/2\pi|$, Laplace's
    approximation of log p(x), and may fall from one iteration to the next.

    Args:
        max_iter: Newton steps at most; a warning says what is left if they do not suffice.
        tol: Nats per datum that the last Newton step may promise.

    Raises:
        StepError: The Hessian at the end is not negative definite (names the datum); a latent is discrete, or masked
            where a site that depends on it is not.

    Source: Tierney and Kadane 1986; Steele 1996 for EM.

    Example:
        >>> Laplace(max_iter=20)
        Laplace(max_iter=20, tol=1e-10)
    """

    traits: ClassVar[Traits] = Traits(slots=("E",), latents="continuous", stateful=True, deterministic=True)

    def __init__(self, max_iter: int = 50, tol: float = 1e-10) -> None:
        self.max_iter = positive_int("steps.Laplace", "max_iter", max_iter)
        if not isinstance(tol, int | float) or not tol > 0:
            fail(
                EmvaeError,
                "steps.Laplace",
                "use tol",
                got=repr(tol),
                because="it is a number of nats above 0",
                fix="Write tol=1e-10.",
            )
        self.tol = float(tol)
        self._vectorize: dict[Callable, bool] = {}

    def __repr__(self) -> str:
        return f"Laplace(max_iter={self.max_iter}, tol={self.tol:g})"

    def infer(self, model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Posterior:
        with quiet():
            return self._mode(model, args, kwargs, {})

    def expect(self, problem: Engine, state: State, *args: Any, **kwargs: Any) -> tuple[State, Posterior, Info]:
        with keep_buffers():
            posterior = self._mode(problem.model, args, kwargs, state.steps.get("E", {}))
        own = {"data": _fingerprint(posterior), **posterior.joint.join(posterior.mean)}
        return state.with_own("E", own), posterior, Info(loss=-posterior.log_evidence, kind="approximation")

    def _mode(
        self, model: Callable, args: tuple, kwargs: Mapping[str, Any], last: Mapping[str, Tensor]
    ) -> GaussianPosterior:
        def start(joint: Any) -> Any:
            same = last.keys() - {"data"} == joint.latents.keys() and torch.equal(last["data"], _fingerprint(joint))
            return joint.split(last) if same else None

        options = {"max_iter": self.max_iter, "tol": self.tol, "start": start, "vectorize": self._vectorize}
        return find_mode(type(self).__name__, model, args, kwargs, **options)


def _fingerprint(found: Any) -> Tensor:
    """Return numbers that tell data apart, of all tensors in the arguments and of the minibatch: ``(tensors, 2)``."""
    tensors = list(_tensors([found.args, found.kwargs, found.batch]))
    return torch.tensor([_two_sums(x.detach().double().flatten()) for x in tensors] or [[0.0, 0.0]])


def _two_sums(x: Tensor) -> list[float]:
    place = torch.arange(len(x), dtype=x.dtype, device=x.device)
    return [float(len(x)), float((x.nan_to_num() * place.cos()).sum())]


def _tensors(tree: Any) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


register(
    "step",
    "laplace",
    Laplace,
    summary="Gaussian at the mode of the posterior",
    source="Tierney and Kadane 1986; Steele 1996",
)
