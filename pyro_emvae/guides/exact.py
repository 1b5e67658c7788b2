r"""`AutoExact`: the exact posterior behind the guide interface, found from the model in every call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from .._checks import ModelError, StepError, fail, require_data
from .._pyro import Messenger, mask_of
from ..particles import hold_batch, is_subsample, keep_buffers, quiet
from ..posterior import EnumeratedPosterior, Posterior, plate_nesting, solve_conjugate, solve_quadratic
from ._base import ModelGuide, indices_of, refuse_hidden_data
from ._outcomes import Product, base_of, is_finite, num_outcomes
from ._quantiles import quantile
from ._switching import MAX_SWITCHES, SwitchingPosterior, frames_of

__all__ = ["AutoExact"]

GIVEN = "given discrete latents, "


class AutoExact(ModelGuide):
    r"""The exact posterior of the model as a guide, so that every single draw gives the evidence.

    $$q(z)=p_\theta(z\mid x),\qquad\log p_\theta(x,z)-\log q(z)=\log p_\theta(x)\quad\text{for every }z.$$

    | latents | how |
    |---|---|
    | finite and discrete, all of them | enumeration, at a cost linear in the length of a chain |
    | real, with a quadratic log joint: linear-Gaussian models | one Newton step, in blocks over the data |
    | conjugate to their likelihood: Beta, Gamma, Normal, Dirichlet, Normal-Gamma | from derivatives of the log joint |

    A few discrete latents (64 joint outcomes) may come first: the others are then solved for given each. They are
    outside plates, or in the same plates as all other latents, such as a mixture of factor models.

    Which row applies is found in the first call, and verified in every one, as the half-steps `steps.Enumerated`,
    `steps.Gaussian` and `steps.Conjugate` do it. The first call also verifies that the posterior is the same when
    the generator is in another state. The guide has no parameters, and follows data and theta by itself.

    **Gradients.** The posterior at the present theta is held while theta is differentiated, as in the M-step of EM:
    neither draws nor log q carry a gradient. By Fisher's identity the expected gradient of the ELBO is then

    $$E_q[\nabla_\theta\log p_\theta(x,z)]=\nabla_\theta\log p_\theta(x),$$

    and nothing is missing: the ELBO is at its maximum over q, where its derivative by q is zero. Differentiated too,
    log q would give `Trace_ELBO` a score term of size log p(x) at discrete sites, for no gain in the mean. The ELBO has
    no noise, its gradient has that of the complete-data score; ``guide.posterior(x).expected_log_joint()`` has the
    same gradient without any.

    When to use: to check a loss or an estimator, to fit theta by `Trace_ELBO` without a gap, as one guide of an
    `AutoGuideList` or `AutoMixture`. Cost: a few runs of the model per call; see the half-steps.

    Args:
        model: A Pyro model.
        create_plates: As in `pyro.infer.autoguide.AutoGuide`.

    `Predictive` and `AutoGuideList` work. A minibatch has an exact posterior of its own where every latent lies in the
    plate. A copy shares the model, a pickle holds it.

    Raises:
        ModelError: The posterior is not found exactly: says which site and why. At the first call: the model draws
            random numbers that are no latents and move the posterior.
        DataError: The data are empty.

    Source: Dempster, Laird and Rubin 1977 for the gradient (their eq. 2.13 is Fisher's identity).

    Example:
        >>> import pyro
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.tensor([1.0, 2.0])
        >>> guide = AutoExact(model)
        >>> guide.median(x)["z"]
        tensor([0.5000, 1.0000])
        >>> evidence = -dist.Normal(0.0, 2**0.5).log_prob(x).sum()
        >>> bool((pyro.infer.Trace_ELBO().loss(model, guide, x) - evidence).abs() < 1e-5)
        True
    """

    is_exact = True
    has_density = True

    def __init__(self, model: Callable, *, create_plates: Callable[..., Any] | None = None) -> None:
        super().__init__(model, create_plates=create_plates)
        self.kind: str | None = None
        self._nesting = 0

    def posterior(self, *args: Any, **kwargs: Any) -> Posterior:
        """Return the exact posterior for these data at the present theta."""
        return self._posterior(args, kwargs, {})

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent; takes the arguments of the model.

        Returns:
            Values by site name.
        """
        self._prepare(args, kwargs)
        plates = self._given_plates(args, kwargs)
        posterior = self._posterior(args, kwargs, indices_of(plates))
        with torch.no_grad():
            return posterior.sample(plates)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the posterior median of each coordinate, by site name."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        r"""Return marginal posterior quantiles of each coordinate.

        Args:
            quantiles: Probabilities, Q of them.
            args, kwargs: The arguments of the model.

        Returns:
            By site name, ``(Q, *plates, *event)``.

        Raises:
            EmvaeError: A site has none, as a one-hot vector.
        """
        found = self.posterior(*args, **kwargs)
        return {n: quantile("AutoExact", n, found.marginal(n), quantiles) for n in posterior_sites(found)}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state; the model is looked at anew."""
        return {**super().__getstate__(), "prototype_trace": None, "kind": None}

    # The posterior ------------------------------------------------------------------------------------------------

    def _prepare(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        require_data("AutoExact", args, kwargs)
        if self.kind is None:
            if self.prototype_trace is None:
                self._setup_prototype(*args, **kwargs)
            if self.master is not None:
                refuse_hidden_data("AutoExact", self.model, args, kwargs)
            self._nesting = plate_nesting(self.model, args, kwargs)
            self.kind = self._choose(args, kwargs)

    def _posterior(self, args: tuple, kwargs: Mapping[str, Any], batch: Mapping[str, Tensor]) -> Posterior:
        self._prepare(args, kwargs)
        try:
            with poutine.block(), hold_batch(batch), keep_buffers():
                return self._solve(self.kind, args, kwargs)
        except StepError as cause:
            self._refuse(args, kwargs, cause)

    def _solve(self, kind: str, args: tuple, kwargs: Mapping[str, Any]) -> Posterior:
        if kind == "enumerated":
            return EnumeratedPosterior(self._plain, args, kwargs, self._nesting)
        solve = {"gaussian": solve_quadratic, "conjugate": solve_conjugate}[kind.removeprefix(GIVEN)]
        if kind.startswith(GIVEN):
            given = lambda model: solve("AutoExact", model, args, kwargs)  # noqa: E731
            return SwitchingPosterior(self._plain, args, kwargs, self._finite(), given)
        return solve("AutoExact", self._plain, args, kwargs)

    def _finite(self) -> list[str]:
        """Return the latents whose outcomes can be listed."""
        return [name for name, node in self.prototype_trace.iter_stochastic_nodes() if is_finite(node["fn"])]

    def _can_switch(self) -> bool:
        """Whether the discrete latents are few, and in no plate or in the same ones as all: others are solved for."""
        nodes = [self.prototype_trace.nodes[name] for name in self._finite()]
        plates = [{frame.name for frame in frames_of(node)} for node in nodes]
        if any(plates):
            plates += [{f.name for f in frames_of(node)} for _, node in self.prototype_trace.iter_stochastic_nodes()]
        if any(own != plates[0] for own in plates):
            return False
        return math.prod(num_outcomes(node["fn"]) for node in nodes) <= MAX_SWITCHES

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model as `Plain` makes it."""
        with Plain():
            return self.model(*args, **kwargs)

    def _choose(self, args: tuple, kwargs: Mapping[str, Any]) -> str:
        latents, finite = dict(self.prototype_trace.iter_stochastic_nodes()), self._finite()
        kinds = ["enumerated"] if finite and len(finite) == len(latents) else ["gaussian", "conjugate"]
        if finite and len(finite) < len(latents) and self._can_switch():
            kinds = [GIVEN + kind for kind in kinds]
        cause: StepError | None = None
        for kind in kinds:
            try:
                self._verify(kind, args, kwargs)
            except StepError as found:
                cause = cause or found
            else:
                return kind
        self._refuse(args, kwargs, cause)

    def _verify(self, kind: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Solve twice, with different random numbers: the two have to give the same draws the same density."""
        with poutine.block(), torch.no_grad():
            with quiet(seed=0):
                one = self._solve(kind, args, kwargs)
                drawn = poutine.trace(one.sample).get_trace()
            with quiet(seed=1), hold_batch(_batch(one)):
                two = self._solve(kind, args, kwargs)
                again = poutine.trace(poutine.replay(two.sample, drawn)).get_trace()
        for name, log_q in _densities(drawn).items():
            other = _densities(again)[name]
            if not torch.allclose(log_q, other, rtol=torch.finfo(log_q.dtype).eps ** 0.5, atol=1e-3):
                fail(
                    ModelError,
                    "AutoExact",
                    f"find the posterior of site {name!r}",
                    got=f"log densities of one draw that differ by {float((log_q - other).abs().max()):.3g} nats when "
                    "the random numbers are others",
                    because="the model may draw nothing but its latents: dropout and latents hidden by poutine.block "
                    "make another posterior in each call",
                    fix="Call .eval(), and give AutoExact all latents that its data depend on.",
                )

    # Refusals -----------------------------------------------------------------------------------------------------

    def _refuse(self, args: tuple, kwargs: Mapping[str, Any], cause: StepError | None) -> None:
        latents = {name: node["fn"] for name, node in self.prototype_trace.iter_stochastic_nodes()}
        finite = [name for name, fn in latents.items() if is_finite(fn)]
        others = [name for name in latents if name not in finite]
        act, fix = "find the posterior", "Use guides.AutoMeanField(model), the nearest guide that fits any model."
        if finite and others:
            act = f"integrate site {others[0]!r} out"
            got = f"{_named(latents[others[0]])} beside the discrete {', '.join(map(repr, finite))}"
            got += f"; given them, {_got(cause)}" if self._can_switch() else ""
            fix += ' Or sum the discrete latents out: infer={"enumerate": "parallel"} at them, TraceEnum_ELBO, and a '
            fix += f"guide of poutine.block(model, hide={finite})."
        else:
            site, why = _blame(self._plain, latents, self.prototype_trace, args, kwargs) or (None, "")
            act = act if site is None else f"integrate its latents out of site {site!r}"
            got = why or _got(cause)
            if got.startswith("scales"):
                fix = "Give all data in place of a minibatch. " + fix
        fail(
            ModelError,
            "AutoExact",
            act,
            got=got,
            because="a posterior is exact here if all latents are finite and discrete, or the log joint is quadratic "
            "in them, or each is conjugate to its likelihood, if need be given few discrete ones, outside plates or "
            "in the same plates as all",
            fix=fix,
            cause=cause,
        )


class Plain(Messenger):
    """Make the mask of a distribution that of its site, and list the joint outcomes of finite sites with event dims."""

    def _pyro_sample(self, msg: dict) -> None:
        fn = msg["fn"]
        if isinstance(fn, dist.MaskedDistribution):
            mask = torch.as_tensor(mask_of(fn))
            msg["fn"] = fn.base_dist
            msg["mask"] = mask if msg["mask"] is None else mask & msg["mask"]
        fn = msg["fn"]
        if not (msg["is_observed"] or is_subsample(msg) or fn.has_enumerate_support) and is_finite(fn):
            msg["fn"] = Product(fn)


def posterior_sites(posterior: Posterior) -> list[str]:
    """Return the names of the latents of an exact posterior."""
    joint = getattr(posterior, "joint", posterior)
    return list(joint.latents)


def _batch(posterior: Posterior) -> dict[str, Tensor]:
    return getattr(posterior.batch, "indices", posterior.batch)


def _densities(trace: poutine.Trace) -> dict[str, Tensor]:
    trace.compute_log_prob()
    return {name: node["log_prob"] for name, node in trace.iter_stochastic_nodes()}


def _named(fn: Any) -> str:
    return type(base_of(fn)).__name__


def _got(cause: BaseException | None) -> str:
    """Return what an error of the house says that it got."""
    return str(cause).partition(": got ")[2].partition(". This is because")[0] or str(cause)


def _blame(
    model: Callable, latents: Mapping[str, Any], trace: poutine.Trace, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[str, str] | None:
    """Return the first site that makes the posterior no known one, and why."""
    for name, fn in latents.items():
        if fn.support.is_discrete:
            many = "more than 4096 joint outcomes" if base_of(fn).has_enumerate_support else "infinitely many outcomes"
            return name, f"{_named(fn)}, of {many}"
        if not _is_real(fn.support):
            return name, f"{_named(fn)}, of support {fn.support}, to which the likelihood is not conjugate"
    start = {name: trace.nodes[name]["value"] for name in latents}
    runs = []
    for t in range(4):
        with quiet(seed=0), torch.no_grad(), poutine.block():
            values = {name: value + t * torch.randn_like(value) for name, value in start.items()}
            run = poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs)
            run.compute_log_prob()
        runs.append({n: float(node["log_prob_sum"]) for n, node in run.nodes.items() if "log_prob_sum" in node})
    for name in runs[0]:
        a, b, c, d = (run[name] for run in runs)
        third, size = abs(d - 3 * c + 3 * b - a), abs(d) + 3 * abs(c) + 3 * abs(b) + abs(a)
        if not third <= 1e-3 * size:
            return name, f"{_named(run.nodes[name]['fn'])}, whose log density is not quadratic in the latents"
    return None


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return isinstance(support, type(constraints.real)) or support is constraints.real_vector
