r"""The exact posterior of a few discrete latents and of others that have one given them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from .._checks import StepError, fail, nearest
from .._pyro import scale_and_mask
from ..particles import is_subsample
from ..posterior import Posterior, Support, in_plates
from ..posterior.base import expected_log_joint
from ._outcomes import Outcomes
from ._replay import Drawn, run_hidden, score

__all__ = ["MAX_SWITCHES", "SwitchingPosterior", "frames_of"]

MAX_SWITCHES = 64


class SwitchingPosterior(Posterior):
    r"""$p(c,z\mid x)=p(c\mid x)\,p(z\mid c,x)$ with $p(c\mid x)\propto p(x,c)$, the evidence of the model given c.

    The discrete latents c lie in no plate; or all latents lie in the same plates, and each datum has its own c, with
    the evidence of its part of the model: $\log p(x_n,c)=\log p(x_n,z_n,c)-\log p(z_n\mid c,x_n)$ at any $z_n$.

    Args:
        model, args, kwargs: The model and its data.
        switches: Names of the discrete latents.
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
        self.model, self.args, self.kwargs = model, args, kwargs
        self.frames = sorted(frames_of(self.latents[switches[0]]), key=lambda frame: frame.dim)
        self.shape = self.latents[switches[0]]["fn"].batch_shape
        self.parts = [solve(poutine.condition(model, data=data)) for data in self._each()]
        found = [self._rows(part, data) for part, data in zip(self.parts, self._each(), strict=True)]
        like = next(node["value"] for n, node in self.latents.items() if n not in switches)
        rows, rest = torch.stack([row for row, _ in found], -1), [rest for _, rest in found]
        if max(rest) - min(rest) > 1e-6 * (1 + abs(rest[0])):
            _refuse(
                switches[0], "an observed site outside the plates of the latents, which they move", "data are apart"
            )
        self.log_evidence = float(rows.logsumexp(-1).sum()) + rest[0]
        self.log_weights = rows.log_softmax(-1).to(like)

    def _each(self) -> list[dict[str, Tensor]]:
        """Return the values of the discrete latents by joint outcome."""
        digits = torch.cartesian_prod(*[torch.arange(size) for size in self.sizes]).reshape(-1, len(self.sizes))
        each = [{n: self.values[n][i] for n, i in zip(self.switches, row, strict=True)} for row in digits]
        return [{n: x.expand(self.latents[n]["fn"].shape()) for n, x in data.items()} for data in each]

    @torch.no_grad()
    def _rows(self, part: Any, data: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        """Return the log evidence of each datum at one joint outcome, and what is of no datum: nats."""
        if not self.frames:
            return torch.tensor(part.log_evidence, dtype=torch.float64), 0.0
        drawn = poutine.trace(part.sample).get_trace()
        values = {name: node["value"] for name, node in drawn.iter_stochastic_nodes()}
        at = poutine.trace(poutine.condition(self.model, data={**data, **values})).get_trace(*self.args, **self.kwargs)
        total, rest = torch.zeros(self.shape, dtype=torch.float64), 0.0
        for trace, sign in ((at, 1.0), (drawn, -1.0)):
            for node in trace.nodes.values():
                if node["type"] != "sample" or is_subsample(node):
                    continue
                row = scale_and_mask(node["fn"].log_prob(node["value"]), 1.0, node["mask"]).double()
                if {frame.name for frame in self.frames} <= {frame.name for frame in frames_of(node)}:
                    total = total.to(row.device) + sign * self._of_data(row)
                else:
                    rest += sign * float(row.sum())
        return total, rest

    def _of_data(self, row: Tensor) -> Tensor:
        """Sum a log density over all plates but those of the latents."""
        keep = {frame.dim for frame in self.frames}
        others = [d for d in range(-row.dim(), 0) if d not in keep]
        row = row.sum(others, keepdim=True) if others else row
        return row.reshape(row.shape[row.dim() - len(self.shape) :])

    # Draws ----------------------------------------------------------------------------------------------------------

    def sample(self, plates: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        made = dict(plates or {})
        values, place = self._draw_switches(made)
        prefix, names = "_switch_", [n for n in self.latents if n not in self.switches]
        runs = [run_hidden(part.sample, (), {}, f"{prefix}{j}_") for j, part in enumerate(self.parts)]
        if any(run.auxiliary for run in runs):
            _refuse(names[0], "latents that depend on each other across a plate", "draws of them have no own density")
        drawn: dict[str, Drawn] = {}
        for name in names:
            node = self.latents[name]
            event_dim = node["fn"].event_dim
            which = place.reshape(place.shape + (1,) * event_dim)
            drawn[name] = Drawn(_pick([run.values[name] for run in runs], which), event_dim)
            with in_plates(frames_of(node), {}, made, None, node["mask"]):
                values[name] = pyro.sample(name, drawn[name])
        scored = [score(part.sample, (), {}, f"{prefix}{j}_", values, ()) for j, part in enumerate(self.parts)]
        for name, fn in drawn.items():
            fn.density[0] = _pick([run.log_prob(name) for run in scored], place)
        return {name: values[name] for name in self.latents}

    def _draw_switches(self, made: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """Draw the discrete latents one given those before; return their values and the place of the joint outcome."""
        values: dict[str, Tensor] = {}
        rest, place = self.log_weights, 0
        for i, name in enumerate(self.switches):
            rest = rest.unflatten(-1, (self.sizes[i], -1))
            fn = Outcomes(self.values[name], rest.logsumexp(-1))
            with in_plates(self.frames, {}, made):
                values[name] = pyro.sample(name, fn)
            index = fn.index(values[name])
            wide = index.reshape(*index.shape, 1, 1)
            rest = rest.expand(*index.shape, *rest.shape[-2:]).gather(-2, wide.expand(*index.shape, 1, rest.shape[-1]))
            rest, place = rest.squeeze(-2), place * self.sizes[i] + index
        return values, place

    # What an M-step or a user asks ----------------------------------------------------------------------------------

    def marginal(self, site: str) -> Any:
        """Return the distribution of one latent: a mixture for one that is not discrete."""
        if site in self.switches:
            others = [i for i, name in enumerate(self.switches) if name != site]
            table = self.log_weights.unflatten(-1, self.sizes)
            others = [i - len(self.sizes) for i in others]
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
        if self.frames:
            support = self.support(num_particles)
            lacking = {n: support.num_plates - len(node["fn"].batch_shape) for n, node in self.latents.items()}
            return expected_log_joint(self.model, self.args, self.kwargs, support, False, lacking)
        terms = [part.expected_log_joint(num_particles) for part in self.parts]
        return sum(float(w) * term for w, term in zip(self.log_weights.exp(), terms, strict=True) if float(w) > 0)

    def support(self, num_particles: int = 1) -> Support:
        """Return the nodes of all outcomes in turn; `StepError` if the discrete latents are in no plate."""
        if not self.frames:
            _refuse(self.switches[0], "a statistic of discrete and other latents", "nodes are listed for one kind only")
        found = [part.support(num_particles) for part in self.parts]
        nesting = found[0].num_plates
        pad = (1,) * (nesting - len(self.shape))
        values: dict[str, list[Tensor]] = {name: [] for name in self.latents}
        log_weights = [
            part.log_weights + w.reshape(*pad, *self.shape)
            for part, w in zip(found, self.log_weights.unbind(-1), strict=True)
        ]
        for part, data in zip(found, self._each(), strict=True):
            own = {
                n: x.reshape(1, *pad, *x.shape).expand(len(part.log_weights), *pad, *x.shape) for n, x in data.items()
            }
            for name, rows in values.items():
                rows.append(own[name] if name in own else part.values[name])
        joined = {name: torch.cat(rows) for name, rows in values.items()}
        return Support(joined, torch.cat(log_weights), nesting, found[0].scale, found[0].mask)


def frames_of(node: Mapping[str, Any]) -> list:
    """Return the vectorized plates of a site."""
    return [frame for frame in node["cond_indep_stack"] if frame.vectorized]


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
