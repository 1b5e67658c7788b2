r"""The variational E-step by coordinate ascent over a product of factors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import StepError, choose, fail, number, positive_int
from .._registry import Traits, register
from ..engine import Engine, State
from ..particles import ModuleWatch, keep_buffers, quiet
from ..posterior import (
    Ascent,
    FactoredJoint,
    MeanFieldPosterior,
    Posterior,
    Update,
    first_ascent,
    gather_factors,
    is_local,
    scatter_factors,
)
from .base import HalfStep, Info
from .samplers import fingerprint

__all__ = ["MeanField"]

COUNT, DATA = "count", "data"
FRESH_SWEEPS, TRIAL = 1000, 5


class MeanField(HalfStep):
    r"""The best product of factors, one per latent and element of its plates, by coordinate ascent (CAVI).

    $$q(z)=\prod_jq_j(z_j),\qquad q_j(z_j)\propto\exp E_{-j}[\log p_\theta(x,z)].$$

    A sweep moves each factor to its best given the others, in the order of the model. Where the model is conjugate in
    each latent given the others, that is in closed form, and found from the model itself: the expected log joint is
    $\eta_j\cdot t_j(z_j)+c$, and its derivatives at a few values give $\eta_j$ and prove the form.

    | latent | factor |
    |---|---|
    | discrete, with a finite support | all its outcomes |
    | real, a real vector | Normal, multivariate normal with full covariance |
    | positive, a positive definite matrix | Gamma, Wishart |
    | a probability, a point of a simplex | Beta, Dirichlet |
    | a precision and a mean, where that is conjugate | one Normal-Gamma, or Normal-Wishart |

    Elements of a latent that meet in a site, such as the weights of a regression in a plate, have a factor each and are
    moved one after the other.

    When to use: local latents that depend on each other, where the exact posterior costs too much; latents that all
    data share (variational Bayes), in minibatches too. Variances come out too small where latents are correlated. It
    is exact for latents that are independent given the data. Cost: a run of the model at all combinations of nodes of
    those factors that meet in a site, per factor and sweep. They are run at once if the model allows that:
    ``Vindex(mu.unsqueeze(-2))[..., z]``; with ``mu[z]``, only the outcomes of z are.

    With latents outside a plate that draws a minibatch, a step is one of stochastic variational inference: factors
    inside the plate are moved until they settle, then the others go a part of the way in natural parameters, by
    $\rho_t=(t+\text{delay})^{-\text{forgetting}}$. The first minibatch is swept with all factors, for a start.
    Factors are the step's own state, those of a minibatch by datum; the plate says which data it holds
    (``subsample_size=`` or ``subsample=``), or ``index=`` of step and model.

    Args:
        num_sweeps: Sweeps per E-step at most; a later E-step goes on from the last one's factors.
        tol: Nats; sweeps end when one gains no more, and not more than the one before it.
        update: ``"exact"``, or ``"natural_gradient"`` for models that are not conjugate in some latents:
            $\eta\leftarrow(1-\rho)\eta+\rho\hat\eta$ with $\hat\eta=\mathrm{Cov}_q(t,t)^{-1}\mathrm{Cov}_q(t,f)$, f the
            expected log joint given the latent. For Normal factors always (on a conjugate model it is the exact update
            at rate 1), for multivariate normals of at most 7 coordinates, Gamma, Beta, and Dirichlet factors of at most
            4 categories where no exact update is known. The bound is then as good as the nodes.
        rate: $\rho$, in (0, 1], of a natural-gradient step.
        num_nodes: Nodes of a factor that is moved so: Gauss-Hermite, their products for vectors (at most 1,000), or a
            trapezoid rule.
        pairs: ``"conjugate"``, or ``"none"``: a precision and a mean have a factor each.
        delay, forgetting: Of the steps on minibatches: at least 0, and in (0.5, 1].
        init: Distributions by site at which factors start, or a function of the data that returns them. By default the
            prior, moved by noise; where `num_sweeps` is at least 10, five sweeps are tried that begin with the first
            factor, five that begin with the last, and the better ones kept.
        seed: Of that noise. A mixture has many optima, and a seed leads to one of them.

    `infer`, that is `EM.posterior`, starts anew, and sweeps until it has settled; the result is kept until theta or
    the data change. It needs no EM: where all is latent,
    ``MeanField().infer(model, args, kwargs)`` is variational Bayes, with the bound as ``elbo``.

    Raises:
        StepError: A latent that has no factor here; a model that is not conjugate in a latent given the others (says
            by how much); too many combinations of nodes; other data than before, without a plate or index that says so.

    Source: Bishop 2006, section 10.1; Hoffman et al. 2013 for minibatches; Khan and Lin 2017 for natural gradients.
        Differs: updates are found from derivatives of the model that is given.

    Example:
        >>> MeanField(num_sweeps=5)
        MeanField(num_sweeps=5, tol=1e-06)
    """

    traits: ClassVar[Traits] = Traits(
        slots=("E",), latents="mean_field", stateful=True, deterministic=True, monotone=True
    )

    def __init__(
        self,
        num_sweeps: int = 100,
        tol: float = 1e-6,
        *,
        update: str = "exact",
        rate: float = 0.5,
        num_nodes: int = 20,
        pairs: str = "conjugate",
        delay: float = 1.0,
        forgetting: float = 0.7,
        init: Mapping[str, Any] | Callable[..., Mapping[str, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        self.num_sweeps = positive_int("steps.MeanField", "num_sweeps", num_sweeps)
        self.tol = number("steps.MeanField", "tol", tol, "of nats, at least 0", lambda x: x >= 0, 1e-6)
        choose("steps.MeanField", "update", update, ("exact", "natural_gradient"))
        choose("steps.MeanField", "pairs", pairs, ("conjugate", "none"))
        rate = number("steps.MeanField", "rate", rate, "above 0 and at most 1", lambda x: 0 < x <= 1, 0.5)
        self.update = Update(update, rate, positive_int("steps.MeanField", "num_nodes", num_nodes, minimum=2))
        self.delay = number("steps.MeanField", "delay", delay, "of at least 0", lambda x: x >= 0, 1.0)
        self.forgetting = number(
            "steps.MeanField", "forgetting", forgetting, "above 0.5 and at most 1", lambda x: 0.5 < x <= 1, 0.7
        )
        self.traits = replace(type(self).traits, monotone=update == "exact")
        self.pairs, self.init_, self.seed = pairs, init, seed
        self._known: dict[Any, Any] = {}
        self._memo: tuple[_Memo, MeanFieldPosterior] | None = None

    def __repr__(self) -> str:
        how = "" if self.update.kind == "exact" else f", update={self.update.kind!r}, rate={self.update.rate:g}"
        return f"MeanField(num_sweeps={self.num_sweeps}, tol={self.tol:g}{how})"

    def gain(self, t: int) -> float:
        r"""Return $\rho_t$ of minibatch t = 0, 1, ...

        Example:
            >>> MeanField(delay=1.0, forgetting=1.0).gain(3)
            0.25
        """
        return min(1.0, max(t + self.delay, 1.0) ** -self.forgetting)

    def infer(self, model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> MeanFieldPosterior:
        with quiet() as watch:
            ascent = self._start(model, args, kwargs)
            memo = _Memo.of(ascent.joint, watch)
            if self._memo is not None and memo.same(self._memo[0]):
                return self._memo[1]
            found = self._settle(ascent, max(self.num_sweeps, FRESH_SWEEPS))
        self._memo = (memo, found)
        if not found.converged:
            warnings.warn(
                f"mean field has not settled after {found.num_sweeps} sweeps: the last one gained more than "
                f"{self.tol:g} nats. Write MeanField(num_sweeps={10 * found.num_sweeps}), or a larger tol.",
                stacklevel=2,
            )
        return found

    def expect(self, problem: Engine, state: State, *args: Any, **kwargs: Any) -> tuple[State, Posterior, Info]:
        own, index = state.steps.get("E", {}), kwargs.get("index")
        with keep_buffers():
            ascent = self._start(problem.model, args, kwargs)
            joint, said = ascent.joint, bool(ascent.joint.batch) or index is not None
            print_ = own.get(DATA, fingerprint((), {})) if said else fingerprint(args, kwargs)
            if not said:
                _check_same_data(own, print_)
            ascent.factors = gather_factors(own, joint, ascent.factors, index)
            count = int(own.get(COUNT, 0))
            later = joint.batch and count > 0
            shared = [i for i, f in enumerate(ascent.factors) if later and not is_local(joint, f)]
            found = self._settle(
                ascent, self.num_sweeps, shared, self.gain(count), fresh=not count, twice=said or not count
            )
        new = {**own, **scatter_factors(own, joint, ascent.factors, index), COUNT: torch.tensor(count + 1)}
        if not said:
            new[DATA] = print_
        return state.with_own("E", new), found, Info(loss=-found.elbo)

    def _start(self, model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Ascent:
        if any(key[1] is not model for key in self._known):
            self._known.clear()
        joint = FactoredJoint(type(self).__name__, model, args, kwargs, self._known)
        init = self.init_(*args, **kwargs) if callable(self.init_) else self.init_
        return first_ascent(joint, self.update, pairs=self.pairs, init=init, seed=self.seed)

    def _settle(
        self,
        ascent: Ascent,
        num_sweeps: int,
        shared: Sequence[int] = (),
        rate: float = 1.0,
        fresh: bool = True,
        twice: bool = True,
    ) -> MeanFieldPosterior:
        """Sweep until the bound gains no more than `tol`; then move what the data of a minibatch share a part."""
        mine = [i for i in range(len(ascent.factors)) if i not in shared]
        final = self.update.kind == "exact" and ascent.are_independent(mine)
        if fresh and not final and self.init_ is None and num_sweeps >= 2 * TRIAL:
            _begin(ascent, mine)
        last, gain, settled, count = -math.inf, math.inf, not mine, 0
        while not settled and count < num_sweeps:
            ascent.sweep(mine, twice=twice and count == 0)
            elbo, rounding = ascent.elbo()
            before, gain = gain, abs(elbo - last)
            grows = gain > max(before, rounding)  # as it does on the way from a saddle, where components are alike
            settled = final or (gain <= self.tol + rounding and not grows)
            last, count = elbo, count + 1
        for place in shared:
            ascent.move(place, rate, twice=True)
        elbo = ascent.elbo()[0] if shared else last
        return MeanFieldPosterior(ascent, elbo, count, settled)


def _begin(ascent: Ascent, places: Sequence[int]) -> None:
    """Make a few sweeps, the first one in the order of the model or in reverse, and keep what is better.

    Where components are alike but for noise, it depends on the prior whether data should first choose among components,
    or components be found from random choices of the data.
    """
    start, found = list(ascent.factors), []
    for first in (list(places), list(reversed(places))):
        ascent.factors = list(start)
        for turn in range(TRIAL):
            ascent.sweep(first if turn == 0 else places, twice=turn == 0)
        found.append((ascent.elbo()[0], ascent.factors))
    ascent.factors = max(found, key=lambda each: each[0])[1]


@dataclass(frozen=True)
class _Memo:
    """What determines the result of `infer`: data by identity and version, theta and buffers by value."""

    data: list[tuple[Any, int]]
    values: list[Tensor]

    @classmethod
    def of(cls, joint: FactoredJoint, watch: ModuleWatch) -> _Memo:
        flat = [joint.model, *joint.args, *(x for item in joint.kwargs.items() for x in item)]
        modules = [t for m in watch.saved for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        values = [*joint.params, *modules, *joint.batch.values()]
        data = [(x, x._version if isinstance(x, Tensor) else 0) for x in flat]
        return cls(data, [value.detach().clone() for value in values])

    def same(self, other: _Memo) -> bool:
        return (
            len(self.data) == len(other.data)
            and len(self.values) == len(other.values)
            and all(v == w and _is(a, b) for (a, v), (b, w) in zip(self.data, other.data, strict=True))
            and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(self.values, other.values, strict=True))
        )


def _is(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, str | int | float) and type(a) is type(b) and a == b)


def _check_same_data(own: Mapping[str, Tensor], print_: Tensor) -> None:
    if DATA in own and not torch.equal(own[DATA], print_):
        fail(
            StepError,
            "MeanField",
            "go on with its factors",
            got="other data than in the E-step before, or the same in another order",
            because="each datum has factors of its own, so a minibatch has to say which data it holds",
            fix="Let the plate subsample (pyro.plate(..., subsample_size=B) or subsample=rows), or pass index=rows to "
            "step and model.",
        )


register(
    "step",
    "mean_field",
    MeanField,
    summary="best product of factors, by coordinate ascent",
    source="Bishop 2006, section 10.1; Hoffman et al. 2013",
)
