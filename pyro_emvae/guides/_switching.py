r"""The exact posterior of a few discrete latents and of others that have one given them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from .._checks import StepError, fail, nearest
from ..particles import is_subsample
from ..posterior import Posterior, Support, in_plates
from ._outcomes import Outcomes
from ._replay import Drawn, run_hidden, score

__all__ = ["MAX_SWITCHES", "SwitchingPosterior"]

MAX_SWITCHES = 64


class SwitchingPosterior(Posterior):
    r"""$p(c,z\mid x)=p(c\mid x)\,p(z\mid c,x)$ with $p(c\mid x)\propto p(x,c)$, the evidence of the model given c.

    Args:
        model, args, kwargs: The model and its data.
        switches: Names of the discrete latents, which lie in no plate.
        solve: Called with a model in which they are observed; returns the exact posterior of the others.

    Raises:
        StepError: A latent has a scale; the others have no exact posterior, or one that needs auxiliary sites.

    Example:
        >>> from pyro_emvae.posterior import solve_quadratic
        >>> def model():
        ...     k = pyro.sample("k", dist.Bernoulli(0.5))
        ...     z = pyro.sample("z", dist.Normal(2.0 * k, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
        >>> posterior = SwitchingPosterior(model, (), {}, ["k"], lambda m: solve_quadratic("example", m, (), {}))
        >>> posterior.marginal("k").mean, posterior.marginal("z").mean
        (tensor(0.5000), tensor(1.))
    """

    kind = "switching"
    is_exact = True

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        switches: list[str],
        solve: Callable[[Callable], Any],
    ) -> None:
        with torch.no_grad():
            trace = poutine.trace(model).get_trace(*args, **kwargs)
        self.latents = {name: node for name, node in trace.iter_stochastic_nodes() if not is_subsample(node)}
        self.switches, self.batch = switches, {}
        for name, node in self.latents.items():
            if float(torch.as_tensor(node["scale"]).max()) != 1.0 or (name in switches and node["mask"] is not None):
                _refuse(name, "a scale or a mask", "weights of outcomes are compared as they are")
        self.values = {n: _outcomes(self.latents[n]["fn"]) for n in switches}
        self.sizes = [len(self.values[n]) for n in switches]
        self.parts = [solve(poutine.condition(model, data=data)) for data in self._each()]
        evidence = torch.tensor([part.log_evidence for part in self.parts], dtype=torch.float64)
        self.log_evidence = float(evidence.logsumexp(0))
        like = next(node["value"] for n, node in self.latents.items() if n not in switches)
        self.log_weights = (evidence - self.log_evidence).to(like)

    def _each(self) -> list[dict[str, Tensor]]:
        """Return the values of the discrete latents by joint outcome."""
        digits = torch.cartesian_prod(*[torch.arange(size) for size in self.sizes]).reshape(-1, len(self.sizes))
        return [{n: self.values[n][i] for n, i in zip(self.switches, row, strict=True)} for row in digits]

    # Draws ----------------------------------------------------------------------------------------------------------

    def sample(self, plates: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        values, place = self._draw_switches()
        prefix, names = "_switch_", [n for n in self.latents if n not in self.switches]
        runs = [run_hidden(part.sample, (), {}, f"{prefix}{j}_") for j, part in enumerate(self.parts)]
        if any(run.auxiliary for run in runs):
            _refuse(names[0], "latents that depend on each other across a plate", "draws of them have no own density")
        drawn: dict[str, Drawn] = {}
        made = dict(plates or {})
        for name in names:
            node = self.latents[name]
            event_dim = node["fn"].event_dim
            which = place.reshape(place.shape + (1,) * event_dim)
            drawn[name] = Drawn(_pick([run.values[name] for run in runs], which), event_dim)
            frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized]
            with in_plates(frames, {}, made, None, node["mask"]):
                values[name] = pyro.sample(name, drawn[name])
        scored = [score(part.sample, (), {}, f"{prefix}{j}_", values, ()) for j, part in enumerate(self.parts)]
        for name, fn in drawn.items():
            fn.density[0] = _pick([run.log_prob(name) for run in scored], place)
        return {name: values[name] for name in self.latents}

    def _draw_switches(self) -> tuple[dict[str, Tensor], Tensor]:
        """Draw the discrete latents one given those before; return their values and the place of the joint outcome."""
        values: dict[str, Tensor] = {}
        table, indices = self.log_weights.reshape(self.sizes), []
        for i, name in enumerate(self.switches):
            later = tuple(range(i + 1, len(self.sizes)))
            logits = (table.logsumexp(later) if later else table)[tuple(indices)]
            values[name] = pyro.sample(name, Outcomes(self.values[name], logits))
            indices.append(Outcomes(self.values[name], logits).index(values[name]))
        strides = [math.prod(self.sizes[i + 1 :]) for i in range(len(self.sizes))]
        return values, sum(i * stride for i, stride in zip(indices, strides, strict=True))

    # What an M-step or a user asks ----------------------------------------------------------------------------------

    def marginal(self, site: str) -> Any:
        """Return the distribution of one latent: a mixture for one that is not discrete."""
        if site in self.switches:
            others = [i for i, name in enumerate(self.switches) if name != site]
            table = self.log_weights.reshape(self.sizes)
            return Outcomes(self.values[site], table.logsumexp(others) if others else table)
        if site not in self.latents:
            fail(
                StepError,
                "SwitchingPosterior",
                f"give the marginal of {site!r}",
                got="no such latent",
                because="it has those of the model",
                fix=nearest(site, self.latents),
            )
        return _mixed([part.marginal(site) for part in self.parts], self.log_weights)

    def expected_log_joint(self, num_particles: int = 1) -> Tensor:
        terms = [part.expected_log_joint(num_particles) for part in self.parts]
        return sum(float(w) * term for w, term in zip(self.log_weights.exp(), terms, strict=True) if float(w) > 0)

    def support(self, num_particles: int = 1) -> Support:
        """Raise `StepError`: the nodes of the outcomes are not listed together."""
        _refuse(self.switches[0], "a statistic of discrete and other latents", "nodes are listed for one kind only")


def _pick(rows: list[Tensor], place: Tensor) -> Tensor:
    result = rows[0]
    for j, other in enumerate(rows[1:], 1):
        result = torch.where(place == j, other, result)
    return result


def _outcomes(fn: Any) -> Tensor:
    found = fn.enumerate_support(expand=False)
    return found.reshape(len(found), *fn.event_shape)


def _mixed(fns: list[Any], log_weights: Tensor) -> Any:
    """Return a mixture of distributions of one kind."""
    kind, first = type(fns[0]), fns[0]
    if any(type(fn) is not kind for fn in fns) or kind not in (dist.Normal, dist.Gamma, dist.Beta):
        fail(
            StepError,
            "SwitchingPosterior",
            "give a marginal",
            got=f"a mixture of {kind.__name__}",
            because="marginals are given of Normal, Gamma and Beta latents",
            fix="Draw from the guide with pyro.infer.Predictive.",
        )
    stacked = {name: torch.stack([getattr(fn, name) for fn in fns], -1) for name in first.arg_constraints}
    choice = dist.Categorical(logits=log_weights.expand(*first.batch_shape, len(fns)))
    return dist.MixtureSameFamily(choice, kind(**stacked))


def _refuse(site: str, got: str, because: str) -> None:
    fail(
        StepError,
        "AutoExact",
        f"integrate site {site!r} out",
        got=got,
        because=because,
        fix="Use guides.AutoMeanField(model).",
    )
