r"""`AutoMixture`: several guides for one posterior, of which each draw takes one."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoCallable, AutoGuide
from torch import Tensor, nn

from .._checks import EmvaeError, ModelError, fail, nearest, require_data
from ..particles import quiet
from ._global import bare, give_models
from ._replay import Drawn, HiddenRun, lead_shape, run_hidden, score
from ._tables import TableReader

__all__ = ["AutoMixture"]


class AutoMixture(AutoGuide):
    r"""A mixture of guides with its own density, for posteriors of several modes.

    $$q(z)=\sum_j\pi_j\,q_j(z),\qquad\log q(z)=\log\sum_j e^{\log\pi_j+\log q_j(z)},\qquad\pi=\mathrm{softmax}(\ell).$$

    An auxiliary site ``{name}_component`` draws j, and guide j the latents; the density of what was drawn is taken
    under *every* component, so that the ELBO is that of the mixture and not the mean of the components'.

    **Gradients.** With $f=\log p(x,z)-\log q(z)$,

    $$\nabla E_q[f]=E\big[\nabla_zf\,\nabla z-\nabla\log q(z)+f\,\nabla(\log\pi_j+\log q_j^{\neg}(z))\big],$$

    pathwise through the draws of component j, and a score function at the auxiliary site for what has no path: the
    weights, and sites of components without a reparameterised sampler ($q_j^{\neg}$). The auxiliary site has the
    log density zero, for it is no latent, and its gradient is that of this score. That is unbiased in `Trace_ELBO`,
    `TraceGraph_ELBO` and `MonteCarloELBO`; for less noise give the auxiliary site ``estimator="leave_one_out"``.

    When to use: several modes, at the price of 2K runs of K small guides. Components that start alike stay alike: give
    them other starting values (``init_loc_fn=``).

    Args:
        guides: Two guides or more, each for all latents: Pyro's `AutoNormal`, `AutoMultivariateNormal`, ..., those
            here, or functions that draw the latents directly.
        model: The model; by default that of the first guide.
        plate: A plate in which all latents lie: each of its elements then draws a component of its own, and minibatches
            are possible. Without, one component is drawn for everything.
        name: Of the auxiliary site, ``f"{name}_component"``.
        create_plates: As in `pyro.infer.autoguide.AutoGuide`.

    Shape: ``logits`` (K,), the same for all elements of a plate.

    Raises:
        EmvaeError: Fewer than two guides.
        ModelError: At the first call: components with other sites, a point mass, an auxiliary site that cannot be
            solved for, a minibatch without ``plate=``, a latent outside `plate`.

    Source: Jaakkola and Jordan 1998; Morningstar et al. 2021, "Automatic differentiation variational inference with
    mixtures". Differs: a component is drawn, in place of one draw from each.

    Example:
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> guide = AutoMixture([AutoNormal(model), AutoNormal(model)])
        >>> guide()["z"].shape, guide.weights
        (torch.Size([]), tensor([0.5000, 0.5000]))
    """

    def __init__(
        self,
        guides: Sequence[Callable],
        model: Callable | None = None,
        *,
        plate: str | None = None,
        name: str = "mixture",
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        guides = list(guides)
        if len(guides) < 2 or (model is None and not isinstance(guides[0], AutoGuide)):
            fail(
                EmvaeError,
                "AutoMixture",
                "be made",
                got=f"{len(guides)} guides" + ("" if len(guides) < 2 else " without a model"),
                because="a mixture has two components or more, and looks at the model",
                fix="Write AutoMixture([AutoNormal(model, ...), AutoNormal(model, ...)]), or pass model=.",
            )
        reader = TableReader("AutoMixture")
        super().__init__(reader(guides[0].model if model is None else model), create_plates=create_plates)
        self.plate, self.name, self._reader = plate, name, reader
        for j, guide in enumerate(guides):
            setattr(self, f"component_{j}", guide if isinstance(guide, AutoGuide) else AutoCallable(self.model, guide))
        self.num_components = len(guides)
        self.logits: nn.Parameter | None = None

    @property
    def components(self) -> list[AutoGuide]:
        """The guides."""
        return [getattr(self, f"component_{j}") for j in range(self.num_components)]

    @property
    def weights(self) -> Tensor:
        r"""The weights $\pi$; known after the first call."""
        return self.logits.detach().softmax(-1)

    # The guide ----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw a component and from it every latent; takes the arguments of the model.

        Returns:
            Values by site name.
        """
        self._prepare(args, kwargs)
        plates = self._create_plates(*args, **kwargs)
        log_weights, lead = self.logits.log_softmax(-1), lead_shape(f"_{self.name}_")
        component = _Component(log_weights.detach())
        with self._within(self.plate, plates):
            infer = {"is_auxiliary": True, "is_density_free": True}
            chosen = pyro.sample(f"{self.name}_component", component, infer=infer)
        runs = [run_hidden(g, args, kwargs, f"_{self.name}_{j}_") for j, g in enumerate(self.components)]
        values = {name: self._pick([run.values[name] for run in runs], chosen, name) for name in self._latents}
        component.score[0] = self._score(chosen, log_weights, runs)
        emitted = {name: Drawn(value, self._event_dim(name)) for name, value in values.items()}
        values = {name: self._emit(name, fn, plates) for name, fn in emitted.items()}
        scored = [score(g, args, kwargs, f"_{self.name}_{j}_", values, lead) for j, g in enumerate(self.components)]
        densities = torch.broadcast_tensors(*(self._total(run, run.fns) for run in scored))
        log_q = (torch.stack(densities, -1) + log_weights).logsumexp(-1)
        first = next(iter(emitted))
        emitted[first].density[0] = log_q / self._num_elements(first, values[first])
        return values

    def _event_dim(self, name: str) -> int:
        return self._latents[name]["fn"].event_dim

    def _within(self, plate: str | None, plates: Mapping[str, Any]) -> Any:
        return plates[plate] if plate else contextlib.nullcontext()

    def _pick(self, drawn: list[Tensor], chosen: Tensor, name: str) -> Tensor:
        """Return the values of the components that were chosen."""
        which = chosen.reshape(chosen.shape + (1,) * self._event_dim(name))
        value = drawn[0]
        for j, other in enumerate(drawn[1:], 1):
            value = torch.where(which == j, other, value)
        return value

    def _score(self, chosen: Tensor, log_weights: Tensor, runs: list[HiddenRun]) -> Tensor:
        """Return zeros whose gradient is the score of what has no path: the weights, and draws without a sampler."""
        result: Any = None
        for j, run in enumerate(runs):
            without = [name for name, fn in run.fns.items() if not fn.has_rsample]
            own = log_weights[j] + self._total(run, without) if without else log_weights[j]
            result = own if result is None else torch.where(chosen == j, own, result)
        return (result - result.detach()).expand(chosen.shape)

    def _emit(self, name: str, fn: Drawn, plates: Mapping[str, Any]) -> Tensor:
        with contextlib.ExitStack() as stack:
            for frame in self._latents[name]["cond_indep_stack"]:
                stack.enter_context(plates[frame.name])
            return pyro.sample(name, fn)

    def _total(self, run: HiddenRun, names: Any) -> Tensor:
        """Sum log densities over all dims of plates but the mixture's own; particles' dims stay too."""
        total: Any = 0.0
        for name in names:
            row = run.log_prob(name)
            dims = [d for d in range(-min(self._nesting, row.dim()), 0) if d != self._dim]
            total = total + (row.sum(dims, keepdim=True) if dims else row)
        while total.dim() and total.shape[0] == 1:
            total = total.squeeze(0)
        return total

    def _num_elements(self, name: str, value: Tensor) -> int:
        """Return over how many elements of a latent's plates one density is spread."""
        batch = value.shape[: value.dim() - self._event_dim(name)]
        frames = self._latents[name]["cond_indep_stack"]
        return math.prod(batch[f.dim] for f in frames if f.name != self.plate)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Raise `EmvaeError`: quantiles of a mixture are not those of its components."""
        self.quantiles([0.5])

    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Raise `EmvaeError`: quantiles of a mixture are not those of its components."""
        fail(
            EmvaeError,
            "AutoMixture",
            "give medians and quantiles",
            got="a mixture of guides",
            because="its distribution function is not known",
            fix="Draw from the guide with pyro.infer.Predictive and take empirical quantiles.",
        )

    # Set-up -------------------------------------------------------------------------------------------------------

    def _prepare(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        require_data("AutoMixture", args, kwargs)
        if self.prototype_trace is None:
            try:
                self._setup_prototype(*args, **kwargs)
            except BaseException:
                self.prototype_trace = None
                raise

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with quiet(), torch.no_grad():
            super()._setup_prototype(*args, **kwargs)
        for name in ("_INPUT", "_RETURN"):
            self.prototype_trace.remove_node(name)
        self._check_plates()
        with poutine.block():
            if self.master is None:
                self._create_plates(*args, **kwargs)
            for j, guide in enumerate(self.components):
                self._check_component(j, guide, args, kwargs)
        if self.logits is None:
            value = next(iter(self._latents.values()))["value"]
            like = value if value.is_floating_point() else value.to(torch.get_default_dtype())
            self.logits = nn.Parameter(like.new_zeros(self.num_components))

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self.master is not None or self.create_plates is not None:
            return super()._create_plates(*args, **kwargs)
        model, last = self._model and self.model, list(self._latents)[-1]
        self.plates = self._reader.plates(model, self._prototype_frames, last, args, kwargs)
        return self.plates

    def _check_prototype(self, part_trace: Any) -> None:
        """Called by a component that has looked at its model; `_check_component` compares what it draws."""

    @property
    def _latents(self) -> dict[str, Any]:
        return dict(self.prototype_trace.iter_stochastic_nodes())

    @property
    def _nesting(self) -> int:
        return max([-frame.dim for frame in self._prototype_frames.values()], default=0)

    @property
    def _dim(self) -> int | None:
        return self._prototype_frames[self.plate].dim if self.plate else None

    def _check_plates(self) -> None:
        for name, node in self._latents.items():
            frames = {frame.name: frame for frame in node["cond_indep_stack"]}
            if self.plate is not None and self.plate not in frames:
                known = sorted({n for f in self._latents.values() for n in (x.name for x in f["cond_indep_stack"])})
                fail(
                    ModelError,
                    "AutoMixture",
                    f"draw a component for each element of plate {self.plate!r}",
                    got=f"latent {name!r} in plates {sorted(frames)}",
                    because="all latents of a component have to lie in the plate",
                    fix=f"Leave plate= out, or name another plate. {nearest(self.plate, known)}"
                    if known
                    else "Leave plate= out.",
                )
            for frame in frames.values():
                if frame.full_size is not None and frame.full_size != frame.size and self.plate is None:
                    fail(
                        ModelError,
                        "AutoMixture",
                        f"weigh components by the density of {name!r}",
                        got=f"{frame.size} of {frame.full_size} data in plate {frame.name!r}",
                        because="one component is drawn for all data, whose density a minibatch does not give",
                        fix=f"Write AutoMixture(guides, plate={frame.name!r}), or give all data.",
                    )

    @torch.no_grad()
    def _check_component(self, j: int, guide: AutoGuide, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Draw from a component, and find the same sites and density again from the latents' values."""
        lead, prefix = lead_shape(f"_{self.name}_"), f"_{self.name}_{j}_"
        run = run_hidden(guide, args, kwargs, prefix)
        own = set(run.fns) - run.auxiliary
        if own != set(self._latents):
            self._refuse(j, f"sites {sorted(own)}", f"each component draws all latents, {sorted(self._latents)}")
        if not any(run.is_drawn(name) for name in run.fns):
            self._refuse(j, "point masses", "log q(z) of a mixture needs densities")
        if self.plate is not None:
            for name, frames in run.frames.items():
                if run.is_drawn(name) and self.plate not in [frame.name for frame in frames]:
                    self._refuse(j, f"site {name!r} outside plate {self.plate!r}", "its elements are to be independent")
        with quiet():
            again = score(guide, args, kwargs, prefix, {name: run.values[name] for name in self._latents}, lead)
        for name in run.fns:
            tolerance = 1e-3 if run.values[name].dtype == torch.float32 else 1e-6
            one, two = run.log_prob(name), again.log_prob(name)
            same = torch.allclose(one, two, rtol=tolerance, atol=tolerance * (1 + float(one.abs().max())))
            if not same or not torch.allclose(run.values[name], again.values[name], rtol=tolerance, atol=tolerance):
                self._refuse(
                    j, f"another density of {name!r} at the same values", "components score each other's draws"
                )

    def _refuse(self, j: int, got: str, because: str) -> None:
        fail(
            ModelError,
            "AutoMixture",
            f"use component {j} ({type(self.components[j]).__name__})",
            got=got,
            because=because,
            fix="Use AutoNormal, AutoMultivariateNormal, guides.AutoMeanField or guides.AutoExact as components.",
        )

    # Copies -------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the model; unlike in Pyro, this guide keeps it."""
        model, master = self._model, self.master
        try:
            state = dict(super().__getstate__())
        finally:
            self._model, self.master = model, master
        parts = {n: bare(m) if isinstance(m, AutoGuide) else m for n, m in state["_modules"].items()}
        return {**state, "_modules": parts, "_reader": self._reader.copy(), "plates": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoMixture:
        result = memo[id(self)] = self.__class__.__new__(self.__class__)
        result.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        give_models(self, result)
        result._reader = self._reader
        return result


class _Component(dist.Categorical):
    """The component drawn: a Categorical without a density of its own, whose gradient is a score, known later."""

    has_enumerate_support = False

    def __init__(self, log_weights: Tensor, score: list[Tensor] | None = None) -> None:
        super().__init__(logits=log_weights, validate_args=False)
        self.score = [log_weights.new_zeros(())] if score is None else score

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Component:
        return _Component(self.logits.expand(torch.Size(batch_shape) + self.logits.shape[-1:]), self.score)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.score[0].expand(value.shape)
