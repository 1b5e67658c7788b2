r"""The E-step by draws from the posterior."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import EmvaeError, fail, nearest, positive_int
from .._registry import Traits, register
from ..convergence import Ascent
from ..engine import Engine, State
from ..particles import ModuleWatch, quiet
from ..posterior import Posterior, SampledSite, SamplesPosterior, Support
from .base import HalfStep, Info
from .samplers import SAMPLERS, Draws, Facts, Sampler, Target, check_same_data, fingerprint, gather, look, scatter

__all__ = ["MonteCarlo"]


class MonteCarlo(HalfStep):
    r"""Draws from the posterior at the present theta, $z_{sn}$ with weights $w_{sn}$ per datum.

    $$E[\log p_\theta(x,z)\,|\,x]\approx\sum_n\sum_sw_{sn}\log p_\theta(x_n,z_{sn}).$$

    | sampler | draws | latents | needs |
    |---|---|---|---|
    | ``"prior"`` | from the prior, weighted by the likelihood | any | |
    | ``"importance"`` | from the guide, weighted | any | a guide |
    | ``"hmc"`` | chains per datum, all data at once | continuous | |
    | ``"nuts"`` | one chain over all latents | continuous | all data |
    | ``"gibbs"`` | chains per datum, a site at a time | discrete | |

    Units that have weights and chains of their own are the elements of the plates that all latents share: the data.
    With a latent outside of them there is one unit.

    The model is run in evaluation mode, its buffers are left alone. Chains are the step's own state, by datum. A
    minibatch says which data it holds by the plate (``subsample_size=`` or ``subsample=``), or by an argument
    ``index=`` of step and model, one row number per datum.

    Args:
        sampler: A name of the table, or an instance such as ``samplers.HMC(num_leapfrog=5)``.
        num_particles: S, draws per datum: weighted ones, or chains of which each gives one. By default that of the
            sampler, 100 for independent draws and 10 for chains. It may be raised between iterations.
        growth: A `convergence.Ascent`: after each M-step the gain of the expected log joint is estimated, with its
            standard error, from the E-step's draws. A step that may not have gone up is made again with more draws
            than `num_particles`; gains below its `tol` end the run as CONVERGED. For all data, and M-steps that
            maximise. The draws per datum are the history's ``num_particles``, and part of the step's own state.
        options: The sampler's arguments, such as ``num_leapfrog=5``.

    `infer`, that is `EM.posterior` and the guide of an EM without one, starts fresh chains from a fixed seed: theta and
    data determine the draws. They are kept until one of both changes.

    In an annealed run the draws are from $q_\beta\propto p_\theta(x,z)^\beta$.

    Objective: with weights, the lower bound of importance sampling (its estimate is ``-Info.loss``). Chains have none:
    what is recorded is $Q=E[\log p_\theta(x,z)]$, labelled so (``objective_kind``), and the ELBO is NaN.

    Raises:
        EmvaeError: An unknown sampler or option.
        StepError: The sampler does not take a latent; a minibatch that cannot be placed; no guide for importance.
        NonFiniteError: A weight is not finite, or all of a datum's are zero.

    Source: Wei and Tanner 1990 for Monte Carlo EM; Caffo, Jank and Jones 2005 for its number of draws; Kingma and
    Welling 2013, appendix D, with HMC.

    Example:
        >>> MonteCarlo("hmc", num_particles=5, num_leapfrog=10)
        MonteCarlo(HMC(num_leapfrog=10, num_moves=1, num_warmup=50, target_acceptance=0.8), num_particles=5)
    """

    traits: ClassVar[Traits] = Traits(slots=("E",), needs_guide=True, tempers=True)

    def __init__(
        self,
        sampler: str | Sampler = "importance",
        num_particles: int | None = None,
        growth: Ascent | None = None,
        **options: Any,
    ) -> None:
        self.sampler = _sampler(sampler, options)
        count = self.sampler.num_particles if num_particles is None else num_particles
        self.growth = _growth(growth)
        self.num_particles = positive_int("steps.MonteCarlo", "num_particles", count, 1 if growth is None else 2)
        needs = {"latents": self.sampler.latents, "needs_guide": self.sampler.needs_guide}
        self.traits = dataclasses.replace(type(self).traits, **needs)
        self._known: dict[Callable, Facts] = {}
        self._memo: tuple[Any, ...] | None = None

    def __repr__(self) -> str:
        growth = "" if self.growth is None else f", growth={self.growth!r}"
        return f"MonteCarlo({self.sampler!r}, num_particles={self.num_particles}{growth})"

    def init(self, problem: Engine, state: State, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self.growth is None:
            return {}
        return {"size": torch.tensor(self.num_particles), "stops": torch.tensor(0), "unclear": torch.tensor(0)}

    def expect(self, problem: Engine, state: State, *args: Any, **kwargs: Any) -> tuple[State, Posterior, Info]:
        own = state.steps.get("E", {})
        target = self.look(problem.model, args, kwargs, problem.guide)
        if problem.beta is not None:
            target = dataclasses.replace(target, beta=float(problem.beta))
        count, groups = int(own["size"]) if "size" in own else self.num_particles, None
        with _evaluation():
            if not self.sampler.persistent:
                draws, _ = self.sampler.sample(target, None, count)
            else:
                draws, own = self._continue(target, own, count)
                groups = own.get("origin", _batches(count))
                state = state.with_own("E", own)
            posterior = self._posterior(target, draws, groups)
            info = self._info(draws, posterior)
        return state, posterior, info

    def _info(self, draws: Draws, posterior: SamplesPosterior) -> Info:
        """Return the diagnostics, and the objective: of draws without log q it is Q, at one run of the model."""
        found = {"ess": draws.ess, "acceptance": draws.acceptance, "khat": draws.khat}
        count = len(next(iter(draws.values.values())))
        if not math.isnan(draws.log_evidence):
            return Info(loss=-draws.log_evidence, num_particles=count, **found)
        with torch.no_grad():
            expected = float(posterior.expected_log_joint())
        return Info(loss=-expected, kind="Q", num_particles=count, **found)

    def infer(
        self, model: Callable, args: tuple, kwargs: Mapping[str, Any], guide: Callable | None = None
    ) -> SamplesPosterior:
        with quiet(train=False) as watch:
            target = self._look(model, args, kwargs, guide)
            memo = _Memo.of(self, target, [*target.params.values(), *_tensors(watch)])
            if self._memo is None or not memo.same(self._memo[0]):
                torch.manual_seed(0)
                draws, _ = self.sampler.sample(target, None, self.num_particles)
                self._memo = (memo, self._posterior(target, draws))
        return self._memo[1]

    def look(self, model: Callable, args: tuple, kwargs: Mapping[str, Any], guide: Callable | None) -> Target:
        """Return the posterior that is drawn from, with its units and the batch, from a run of the model."""
        with _evaluation():
            return self._look(model, args, kwargs, guide)

    def _look(self, model: Callable, args: tuple, kwargs: Mapping[str, Any], guide: Callable | None) -> Target:
        with torch.no_grad():
            return self.sampler.prepare(look(model, args, kwargs, self._known, guide))

    def _continue(self, target: Target, own: Mapping[str, Tensor], count: int) -> tuple[Draws, dict[str, Tensor]]:
        """Draw, going on from the chains of the batch's data.

        Chains that begin where others are depend on these at first: ``origin`` is the chain that each comes from.
        """
        rows = target.rows(target.kwargs.get("index"))
        print_ = fingerprint(target.args, target.kwargs) if rows is None else None
        if rows is None:
            check_same_data(own, print_)
        chains = gather(own, rows, math.prod(target.sizes))
        draws, chains = self.sampler.sample(target, chains, count)
        new = scatter(own, rows, chains) | {name: own[name] for name in ("size", "stops", "unclear") if name in own}
        if self.growth is not None and chains.position.shape[1] == count:
            origin = own.get("origin", torch.arange(count))
            new["origin"] = origin[torch.arange(count) % len(origin)]
        return draws, new if print_ is None else new | {"data": print_}

    def _posterior(self, target: Target, draws: Draws, groups: Tensor | None = None) -> SamplesPosterior:
        first = next(iter(target.latents.values()))
        mask = first["mask"] if isinstance(first["mask"], Tensor) else None
        sites = {n: SampledSite(target.frames(n), m["fn"].event_dim) for n, m in target.latents.items()}
        return SamplesPosterior(
            target.model,
            target.args,
            target.kwargs,
            Support(draws.values, draws.log_weights, target.nesting, first["scale"], mask),
            sites,
            target.units,
            kind=self.sampler.name,
            batch=target.batch,
            vectorize=target.facts.vectorize,
            log_evidence=draws.log_evidence,
            entropy=draws.entropy,
            groups=groups,
        )


def _batches(count: int) -> Tensor:
    """Return the number of the batch of each draw of one chain: about as many batches as draws in each."""
    number = max(math.isqrt(count), 2)
    return torch.arange(count) * number // count


def _growth(growth: Any) -> Ascent | None:
    if growth is not None and not isinstance(growth, Ascent):
        fail(
            EmvaeError,
            "steps.MonteCarlo",
            "let its number of draws grow",
            got=f"growth={growth!r}",
            because="a rule judges each step",
            fix="Write growth=convergence.Ascent(tol=1e-3).",
        )
    return growth


@contextlib.contextmanager
def _evaluation() -> Iterator[None]:
    """Run modules in evaluation mode; modes and buffers are as before when it ends."""
    with ModuleWatch(train=False) as watch:
        try:
            yield
        finally:
            watch.restore()


@dataclasses.dataclass(frozen=True)
class _Memo:
    """What determines the draws of `infer`: data by identity and version, theta and buffers by value."""

    fixed: list[Any]
    data: list[tuple[Any, int]]
    values: list[Tensor]

    @classmethod
    def of(cls, step: MonteCarlo, target: Target, values: list[Tensor]) -> _Memo:
        data = [*target.args, *target.kwargs.items()]
        flat = [x for item in data for x in (item if isinstance(item, tuple) else (item,))]
        versions = [(x, x._version if isinstance(x, Tensor) else 0) for x in flat]
        fixed = [target.model, target.guide, step.num_particles, target.batch]
        return cls(fixed, versions, [value.detach().clone() for value in values])

    def same(self, other: _Memo) -> bool:
        fixed = self.fixed[:3] == other.fixed[:3] and _equal(list(self.fixed[3].items()), list(other.fixed[3].items()))
        data = len(self.data) == len(other.data) and all(
            (a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)) and v == w
            for (a, v), (b, w) in zip(self.data, other.data, strict=True)
        )
        return fixed and data and _equal(list(enumerate(self.values)), list(enumerate(other.values)))


def _equal(one: list[tuple[Any, Tensor]], two: list[tuple[Any, Tensor]]) -> bool:
    return len(one) == len(two) and all(
        k == m and a.shape == b.shape and torch.equal(a, b) for (k, a), (m, b) in zip(one, two, strict=True)
    )


def _tensors(watch: ModuleWatch) -> list[Tensor]:
    """Return the parameters and buffers of all modules that were called."""
    found = [t for module in watch.saved for t in (*module._parameters.values(), *module._buffers.values())]
    return [t for t in found if t is not None]


def _sampler(sampler: str | Sampler, options: Mapping[str, Any]) -> Sampler:
    if isinstance(sampler, Sampler) and not options:
        return sampler
    if not isinstance(sampler, str):
        fail(
            EmvaeError,
            "steps.MonteCarlo",
            "make its sampler",
            got=f"{sampler!r} with options {sorted(options)}",
            because="a sampler is a name with options, or an instance without",
            fix='Write MonteCarlo("hmc", num_leapfrog=5).',
        )
    if sampler not in SAMPLERS:
        fail(
            EmvaeError,
            "steps.MonteCarlo",
            f"use sampler={sampler!r}",
            got="an unknown name",
            because="no sampler has that name",
            fix=nearest(sampler, SAMPLERS),
        )
    known = [field.name for field in dataclasses.fields(SAMPLERS[sampler])]
    for name in options:
        if name not in known:
            fail(
                EmvaeError,
                "steps.MonteCarlo",
                f"give sampler {sampler!r} the option {name!r}",
                got="an unknown name",
                because="options are the sampler's arguments",
                fix=nearest(name, known),
            )
    return SAMPLERS[sampler](**options)


register(
    "step",
    "monte_carlo",
    MonteCarlo,
    summary="draws from the posterior: prior, importance, hmc, nuts, gibbs",
    source="Wei and Tanner 1990; Kingma and Welling 2013, appendix D",
)
