r"""The approximate E-step by the posterior's mode and the curvature there, alone or with a quadrature about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import EmvaeError, fail, positive_int
from .._registry import Traits, register
from ..engine import Engine, State
from ..particles import keep_buffers, quiet
from ..posterior import GaussianPosterior, Posterior, QuadraturePosterior, find_mode, integrate_at_mode
from .base import HalfStep, Info

__all__ = ["Laplace"]

MAX_PER_AXIS = 100


class Laplace(HalfStep):
    r"""Laplace's approximation of the posterior, in unconstrained coordinates u of the latents.

    $$q(u_n)=N(\hat u_n,\Lambda_n^{-1}),\qquad\hat u_n=\arg\max f_n(u),\qquad\Lambda_n=-\nabla^2f_n(\hat u_n),$$

    where $f_n(u)=\log p_\theta(x_n,z_n(u))+\log|dz/du|$. Each mode is found by Newton steps that never lower f_n, from
    where the last E-step on the same data ended.

    With more nodes than one it is adaptive Gauss-Hermite quadrature: the posterior is represented by a grid of
    $n^D$ nodes $u_{sn}=\hat u_n+\Lambda_n^{-1/2}t_s$ for the D coordinates of a datum, with weights

    $$w_{sn}\propto\omega_s\,\frac{e^{f_n(u_{sn})}}{\varphi(t_s)},\qquad
      \log p(x_n)\approx\log\sum_s\omega_s\,\frac{e^{f_n(u_{sn})}}{|\Lambda_n|^{1/2}\varphi(t_s)},$$

    where $t_s,\omega_s$ are those of the Gauss-Hermite rule for the standard normal density $\varphi$; one node is
    Laplace's approximation of log p(x) (`posterior.QuadraturePosterior` has the derivation). The relative error of
    the integral is of the order $m^{-\lfloor(n+2)/3\rfloor}$ in the number m of observations that a latent has, and
    falls about geometrically in n as long as the posterior's tails are near a Gaussian's; compare the results of n and
    of more nodes. M-steps climb the approximation that the next E-step evaluates, so that with enough nodes the
    objective does not fall, and the fixed point is the maximum of the likelihood.

    When to use: latents with a posterior of one mode; generalised linear mixed models. One node for many data per
    latent, or as a start; 5 to 25 where parameters are wanted to a small part of their standard errors, for up to
    three or four coordinates that depend on each other. Exact where f is quadratic. It is no bound: the objective of
    the history is the approximation of log p(x), with one node $\hat f-\tfrac12\log|\Lambda/2\pi|$, and may fall from
    one iteration to the next.

    Args:
        max_iter: Newton steps at most; a warning says what is left if they do not suffice.
        tol: Nats per datum that the last Newton step may promise.
        num_nodes: n, nodes per coordinate, at most 100 (lme4 calls it nAGQ).

    Raises:
        EmvaeError: An argument out of range.
        StepError: The Hessian at the end is not negative definite (names the datum); a latent is discrete, or masked
            where a site that depends on it is not; a grid of more than 10,000 nodes.
        NonFiniteError: The model has no density at a node.

    Source: Tierney and Kadane 1986; Steele 1996 for EM. Nodes: Liu and Pierce 1994; Pinheiro and Bates 1995;
    Tuerlinckx et al. 2006, "Statistical inference in generalized linear mixed models: a review"; Jin and Andersson
    2020, "A note on the accuracy of adaptive Gauss-Hermite quadrature", for the order.
    Differs: latents are integrated out in EM's weights, in place of the likelihood's derivatives.

    Example:
        >>> Laplace(max_iter=20)
        Laplace(max_iter=20, tol=1e-10)
        >>> Laplace(num_nodes=9)
        Laplace(max_iter=50, tol=1e-10, num_nodes=9)
    """

    traits: ClassVar[Traits] = Traits(slots=("E",), latents="continuous", stateful=True, deterministic=True)

    def __init__(self, max_iter: int = 50, tol: float = 1e-10, num_nodes: int = 1) -> None:
        self.num_nodes = _number_of_nodes(num_nodes)
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
        nodes = "" if self.num_nodes == 1 else f", num_nodes={self.num_nodes}"
        return f"Laplace(max_iter={self.max_iter}, tol={self.tol:g}{nodes})"

    def infer(self, model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Posterior:
        with quiet():
            return self._solve(model, args, kwargs, {})

    def propose(self, model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Posterior:
        """Return the Gaussian at the mode: nodes have no density, and the guide needs none of them."""
        with quiet():
            return find_mode(type(self).__name__, model, args, kwargs, **self._options({}))

    def expect(self, problem: Engine, state: State, *args: Any, **kwargs: Any) -> tuple[State, Posterior, Info]:
        with keep_buffers():
            posterior = self._solve(problem.model, args, kwargs, state.steps.get("E", {}))
        at_mode = posterior if self.num_nodes == 1 else posterior.gaussian
        own = {"data": _fingerprint(at_mode), **at_mode.joint.join(at_mode.mean)}
        return state.with_own("E", own), posterior, Info(loss=-posterior.log_evidence, kind="approximation")

    def _solve(
        self, model: Callable, args: tuple, kwargs: Mapping[str, Any], last: Mapping[str, Tensor]
    ) -> GaussianPosterior | QuadraturePosterior:
        options = self._options(last)
        if self.num_nodes == 1:
            return find_mode(type(self).__name__, model, args, kwargs, **options)
        return integrate_at_mode(type(self).__name__, model, args, kwargs, num_nodes=self.num_nodes, **options)

    def _options(self, last: Mapping[str, Tensor]) -> dict[str, Any]:
        def start(joint: Any) -> Any:
            same = last.keys() - {"data"} == joint.latents.keys() and torch.equal(last["data"], _fingerprint(joint))
            return joint.split(last) if same else None

        return {"max_iter": self.max_iter, "tol": self.tol, "start": start, "vectorize": self._vectorize}


def _number_of_nodes(num_nodes: Any) -> int:
    if positive_int("steps.Laplace", "num_nodes", num_nodes) > MAX_PER_AXIS:
        fail(
            EmvaeError,
            "steps.Laplace",
            "use num_nodes",
            got=repr(num_nodes),
            because=f"Hermite nodes are known to be accurate for up to {MAX_PER_AXIS}",
            fix="Write num_nodes=25: a posterior that needs more is far from Gaussian; or use steps.MonteCarlo().",
        )
    return int(num_nodes)


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
    summary="Gaussian at the mode of the posterior, with num_nodes= adaptive Gauss-Hermite quadrature about it",
    source="Tierney and Kadane 1986; Steele 1996; Liu and Pierce 1994",
)
