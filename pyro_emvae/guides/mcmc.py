r"""`AutoMCMC`: the draws of a Markov chain behind the guide interface."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from .._checks import EmvaeError, ModelError, fail, nearest, positive_int, require_data
from .._pyro import Messenger, draws_of
from ..particles import keep_buffers
from ..posterior import EnumeratedPosterior, SampledSite, SamplesPosterior, Support, plate_nesting
from ._base import ModelGuide, refuse_hidden_data
from ._plate import signature

__all__ = ["AutoMCMC"]

KERNELS: dict[str, Callable[..., Any]] = {"nuts": NUTS, "hmc": HMC}


class AutoMCMC(ModelGuide):
    r"""Draws from the posterior by a Markov chain, for whatever takes a guide and needs no log q.

    $$z\sim\frac1S\sum_s\delta_{z_s},\qquad z_1,z_2,\dots\ \text{a chain of stationary density}\ p_\theta(z\mid x).$$

    The first call runs the chain on its data at the present theta; each call then draws one of the joint draws at
    random. Later calls keep the draws whatever they are called with, so that `Predictive` can be given new inputs;
    `run` makes new ones.

    A draw has no density that could be computed: log q is NaN, so that `Trace_ELBO` warns and `MonteCarloELBO` refuses
    it, and `log_evidence` weighs draws from a proposal of its own instead. `to_arviz` writes the chains themselves,
    ``(chain, draw)`` in their order, so that ``r_hat`` and ``ess`` mean what they say.

    When to use: as the reference that a guide is compared with; with `Predictive` after EM or SVI over theta. Latents
    that Pyro sums out in the chain (finite discrete ones) are drawn from their exact conditional given the others.

    Args:
        model: A Pyro model.
        sampler: ``"nuts"``, ``"hmc"``, a kernel of Pyro's for this model, or a `pyro.infer.MCMC`, run or not.
        num_samples, num_warmup: Of each chain; of an `MCMC` they are its own.
        num_chains: Run one after another; of an `MCMC` its own.
        create_plates: As in `pyro.infer.autoguide.AutoGuide`.

    Shape: `draws` are ``(chains, samples, *plates, *event)`` by site.

    Raises:
        EmvaeError: Unknown sampler.
        ModelError: A plate is subsampled; the sampler left latents out; data of another size than the draws.
        DataError: The data are empty.

    Source: Hoffman and Gelman 2014 for NUTS, as in Pyro.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = AutoMCMC(model, num_samples=50, num_warmup=20)
        >>> guide(torch.tensor(1.0))["z"].shape, guide.draws["z"].shape
        (torch.Size([]), torch.Size([1, 50]))
    """

    is_exact = False
    has_density = False

    def __init__(
        self,
        model: Callable,
        sampler: Any = "nuts",
        *,
        num_samples: int = 1000,
        num_warmup: int = 500,
        num_chains: int = 1,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, create_plates=create_plates)
        if sampler not in KERNELS and (isinstance(sampler, type) or not hasattr(sampler, "diagnostics")):
            fail(
                EmvaeError,
                "AutoMCMC",
                "use its sampler",
                got=f"{sampler!r:.60}",
                because="it is a name, a kernel or an MCMC of Pyro's",
                fix=nearest(str(sampler), KERNELS),
            )
        self.sampler: Any = sampler
        self.num_samples = positive_int("AutoMCMC", "num_samples", num_samples)
        self.num_warmup = positive_int("AutoMCMC", "num_warmup", num_warmup, 0)
        self.num_chains = positive_int("AutoMCMC", "num_chains", num_chains)
        self.draws: dict[str, Tensor] = {}
        self._sampled: dict[str, SampledSite] = {}
        self._known: set[Any] = set()
        self._cursor: int | None = None

    # The chain ----------------------------------------------------------------------------------------------------

    def run(self, *args: Any, **kwargs: Any) -> AutoMCMC:
        """Run the chain on these data at the present theta, in place of the draws that are there; return the guide."""
        require_data("AutoMCMC", args, kwargs)
        self._setup_prototype(*args, **kwargs)
        self._look()
        with poutine.block(), keep_buffers(), torch.enable_grad():
            chains = [mcmc.get_samples(group_by_chain=True) for mcmc in self._chains(args, kwargs)]
        draws = {name: torch.cat([chain[name] for chain in chains]).detach() for name in chains[0]}
        self.draws = self._completed(draws, args, kwargs)
        self.num_chains, self._known = len(next(iter(self.draws.values()))), set()
        return self

    def _chains(self, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[MCMC]:
        if isinstance(self.sampler, MCMC):
            if draws_of(self.sampler) is None:
                self.sampler.run(*args, **kwargs)
            yield self.sampler
            return
        for _ in range(self.num_chains):
            kernel = KERNELS[self.sampler](self.model) if isinstance(self.sampler, str) else self.sampler
            mcmc = MCMC(kernel, self.num_samples, self.num_warmup, disable_progbar=True)
            mcmc.run(*args, **kwargs)
            yield mcmc

    def _completed(self, draws: dict[str, Tensor], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the draws of all latents, in the model's order; draw those that the chain has summed out."""
        latents = dict(self.prototype_trace.iter_stochastic_nodes())
        missing = [name for name in latents if name not in draws]
        strange = [name for name in draws if name not in latents]
        if strange or any(not latents[name]["fn"].has_enumerate_support for name in missing):
            fail(
                ModelError,
                "AutoMCMC",
                f"take the draws of {(strange or missing)[0]!r}",
                got=f"draws of {sorted(draws)} for latents {list(latents)}",
                because="a draw has a value for each latent of the model, and for nothing else",
                fix="Run the MCMC on the model of the guide, without save_params.",
            )
        if missing:
            draws = draws | self._conditional(draws, missing, args, kwargs)
        return {name: draws[name] for name in latents}

    def _conditional(
        self, draws: Mapping[str, Tensor], missing: list[str], args: tuple, kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Draw finite discrete latents from their posterior given each draw of the others."""
        nesting = plate_nesting(self.model, args, kwargs)
        flat = {name: value.flatten(0, 1) for name, value in draws.items()}
        rows: dict[str, list[Tensor]] = {name: [] for name in missing}
        with poutine.block(), torch.no_grad():
            for s in range(len(next(iter(flat.values())))):
                given = poutine.condition(self.model, data={name: value[s] for name, value in flat.items()})
                with keep_buffers():
                    values = EnumeratedPosterior(given, args, kwargs, nesting).sample()
                for name in missing:
                    rows[name].append(values[name])
        lead = next(iter(draws.values())).shape[:2]
        return {name: torch.stack(found).unflatten(0, lead) for name, found in rows.items()}

    def diagnostics(self) -> dict[str, dict[str, Tensor]]:
        """Return, by site, ``r_hat`` (split, Gelman-Rubin) and ``ess`` of each coordinate; NaN below 4 draws."""
        found = {}
        for name, value in self.draws.items():
            value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
            enough = value.shape[1] >= 4
            nothing = torch.full(value.shape[2:], math.nan)
            found[name] = {
                "r_hat": split_gelman_rubin(value) if enough else nothing,
                "ess": effective_sample_size(value) if enough else nothing,
            }
        return found

    # The guide ----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent; takes the arguments of the model.

        Returns:
            Values by site name, of one joint draw.
        """
        self._prepare(args, kwargs)
        with torch.no_grad(), _Places(self) if self._cursor is not None else contextlib.nullcontext():
            return self._posterior().sample(self._given_plates(args, kwargs))

    def _prepare(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        if not self.draws:
            if self.master is not None:
                refuse_hidden_data("AutoMCMC", self.model, args, kwargs)
            self.run(*args, **kwargs)
        key = signature((args, kwargs))
        if key not in self._known:
            self._setup_prototype(*args, **kwargs)
            self._require_size()
            self._look()
            self._known.add(key)

    def _require_size(self) -> None:
        for name, node in self.prototype_trace.iter_stochastic_nodes():
            have = tuple(self.draws[name].shape[2:]) if name in self.draws else None  # new data are latents to a model
            if have not in (None, tuple(node["value"].shape)):
                fail(
                    ModelError,
                    "AutoMCMC",
                    f"draw site {name!r}",
                    got=f"a value of shape {tuple(node['value'].shape)} in the model",
                    because=f"the chain was run on other data and has draws of shape {have}",
                    fix="Call guide.run(...) with these data.",
                )

    def _look(self) -> None:
        """Note each latent's plates, and refuse minibatches."""
        for name, node in self.prototype_trace.iter_stochastic_nodes():
            frames = tuple(f for f in node["cond_indep_stack"] if f.vectorized)
            self._sampled[name] = SampledSite(frames, node["fn"].event_dim)
            for frame in frames:
                if frame.full_size is not None and frame.full_size != frame.size:
                    fail(
                        ModelError,
                        "AutoMCMC",
                        f"draw site {name!r}",
                        got=f"{frame.size} of {frame.full_size} data in plate {frame.name!r}",
                        because="a chain moves all latents on all data",
                        fix="Give all data, or use guides.AutoMeanField(model) with minibatches.",
                    )

    def _posterior(self) -> SamplesPosterior:
        sites = {name: self._sampled[name] for name in self.draws}
        nesting = max([-f.dim for site in sites.values() for f in site.frames], default=0)
        values = {}
        for name, site in sites.items():
            value = self.draws[name].flatten(0, 1)
            batch = value.dim() - 1 - site.event_dim
            values[name] = value.reshape(len(value), *(1,) * (nesting - batch), *value.shape[1:])
        count = len(next(iter(values.values())))
        weights = torch.zeros(count, *(1,) * nesting, device=next(iter(values.values())).device)
        return SamplesPosterior(self.model, (), {}, Support(values, weights, nesting), sites, kind="mcmc")

    @contextlib.contextmanager
    def in_order(self) -> Iterator[int]:
        """Let the guide give its draws one after another, chain by chain; yields their number."""
        self._cursor = 0
        try:
            yield math.prod(next(iter(self.draws.values())).shape[:2])
        finally:
            self._cursor = None

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of each coordinate over all draws, by site name."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        r"""Return quantiles of each coordinate over all draws: the least draw that so many are not above.

        Args:
            quantiles: Probabilities, Q of them.
            args, kwargs: The arguments of the model.

        Returns:
            By site name, ``(Q, *plates, *event)``.
        """
        self._prepare(args, kwargs)
        result = {}
        for name, value in self.draws.items():
            ordered = value.flatten(0, 1).sort(0).values
            places = (torch.as_tensor(quantiles, dtype=torch.float64) * len(ordered)).ceil().long() - 1
            result[name] = ordered[places.clamp(0, len(ordered) - 1).to(ordered.device)]
        return result

    # Copies -------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with the draws, without the sampler once it has run."""
        kept = self.sampler if isinstance(self.sampler, str) or not self.draws else "nuts"
        return {**super().__getstate__(), "prototype_trace": None, "_sampled": {}, "_known": set(), "sampler": kept}

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return what `state_dict` keeps: the draws."""
        return dict(self.draws)

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over the draws of a `state_dict`."""
        self.draws, self._known = dict(state), set()
        if self.draws:
            self.num_chains = len(next(iter(self.draws.values())))


class _Places(Messenger):
    """Replace the draws' places by consecutive ones, whatever the plates around the guide."""

    def __init__(self, guide: AutoMCMC) -> None:
        super().__init__()
        self.guide = guide

    def _pyro_post_sample(self, msg: dict) -> None:
        if msg["name"] == "_particle":
            value, start = msg["value"], self.guide._cursor
            count = len(next(iter(self.guide.draws.values())).flatten(0, 1))
            msg["value"] = (start + torch.arange(value.numel(), device=value.device).reshape(value.shape)) % count
            self.guide._cursor = start + value.numel()
