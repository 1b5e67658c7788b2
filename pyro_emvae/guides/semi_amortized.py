r"""`AutoSemiAmortized`: an encoder's answer, improved for each datum by gradient steps."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from .._checks import EmvaeError, ModelError, RecordingError, fail, number
from ..families import Family
from ..particles import vectorizable
from ._base import state_of
from ._draw import Call
from ._refine import Refiner, refuse_undrawn
from .amortized import AutoAmortized

__all__ = ["AutoSemiAmortized"]


class AutoSemiAmortized(AutoGuide):
    r"""An amortized guide whose answer is improved for each datum by a few gradient steps.

    $$h_n^{(0)}=f_\phi(x_n),\qquad h_n^{(j+1)}=h_n^{(j)}+\alpha_{nj}\,\hat g_{nj}\big/\sqrt{\hat v_{nj}},\qquad
    \hat g_n\approx\nabla_{h_n}E_{q(z_n\mid h_n)}[\log p(x_n,z_n)-\log q(z_n\mid h_n)],$$

    and $q(z_n\mid h_n^{(k)})$ is the guide; $\hat v$ is a running mean of squares. A datum keeps a step only if that
    raised its ELBO by more than the noise of other draws, the same before and after, and all steps together only if
    they did; its step size grows after a step that was kept, and shrinks after another. So it lies below the encoder's
    answer by chance alone: where that is the best member of the family already, by 1e-4 nats per datum in the mean
    (linear-Gaussian model, 20 steps).

    The gradient leaves out the direct derivative of log q (sticking the landing), so that it has no noise where q is
    the posterior. Its draws are the same in every call: for given data and parameters the guide is one distribution.

    When to use: the encoder is the bottleneck, as with small encoders, hard data or few epochs. Cost: each step runs
    the model three times forward and once backward, on all draws at a time if it can be vectorized. What the steps gain
    is the amortization gap, see `amortized` and `pyro_emvae.elbo_gap`.

    By default no gradient passes through the steps: the model is trained at the refined contexts, and the encoder gets
    the gradient by the refined context in place of that by its own. With ``differentiable=True`` it passes through all
    of them, which takes second derivatives; then the guide depends on the model's parameters, so that `EM` cannot tell
    them apart, while joint SVI can. Contexts of sites without a reparameterised sampler, such as discrete ones, stay
    those of the encoder.

    Args:
        model, encoder, family, amortize, encoder_input: As for `AutoAmortized`.
        dependence, global_guide, create_plates: Likewise.
        num_refinements: k; 0 is `AutoAmortized`. It can be changed at any time: ``guide.num_refinements = 100``.
        step_size: The first step, in units of the context.
        num_particles: Draws per step, 2 at least.
        differentiable: Whether gradients pass through the steps.
        seed: Of the steps' draws.

    The steps cannot be recorded: they rewind the generator. With latents outside the data plate, which the contexts
    then follow, several vectorized particles are refined one by one. In an `AutoGuideList` the latents of other guides
    are drawn from their prior during the steps; better give them by ``global_guide=``.

    Attributes:
        amortized: The guide without refinement, of the same parameters.

    Raises:
        EmvaeError: A number of refinements below zero, a step size or number of particles that is not positive.
        ModelError: As `AutoAmortized`; no site with a reparameterised sampler; a latent that the guide does not draw,
            such as one that the model enumerates.
        NonFiniteError: The ELBO is finite for no datum.

    Source: Kim et al. 2018, "Semi-amortized variational autoencoders"; Krishnan et al. 2018; Roeder et al. 2017 for the
    gradient. Differs: steps are scaled by coordinate, and kept by datum.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z @ torch.ones(2, 3), 1.0).to_event(1), obs=x)
        >>> guide = AutoSemiAmortized(model, nn.Linear(3, 4), num_refinements=3)
        >>> guide(torch.randn(6, 3))["z"].shape, guide.amortized(torch.randn(6, 3))["z"].shape
        (torch.Size([6, 2]), torch.Size([6, 2]))
    """

    amortized: AutoAmortized

    def __init__(
        self,
        model: Callable,
        encoder: nn.Module | None = None,
        family: str | Family | Mapping[str, Any] | None = None,
        amortize: str | None = None,
        encoder_input: Callable[..., Any] | None = None,
        *,
        num_refinements: int = 5,
        step_size: float = 0.1,
        num_particles: int = 8,
        differentiable: bool = False,
        seed: int = 0,
        dependence: str | Collection[str] = "none",
        global_guide: Any = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model)
        self.num_refinements, self.num_particles = num_refinements, num_particles
        self.step_size, self.differentiable, self.seed = step_size, differentiable, seed
        self._vectorize: bool | None = None
        self._check()
        inner = AutoAmortized(
            model,
            encoder,
            family,
            amortize,
            encoder_input,
            dependence=dependence,
            global_guide=global_guide,
            create_plates=create_plates,
        )
        super(AutoGuide, self).__setattr__("amortized", inner)  # it opens its own plates, so that it works alone too

    def _check(self) -> None:
        _whole("num_refinements", self.num_refinements, 0)
        _whole("num_particles", self.num_particles, 2)
        number("AutoSemiAmortized", "step_size", self.step_size, "above 0", lambda x: x > 0, 0.1)

    def _contexts(self, args: tuple, kwargs: dict) -> tuple[Call, dict[str, Tensor]]:
        """Return the call and its refined contexts; gradients reach the encoder as if the steps were constants."""
        self._check()
        if self._model is None and self.num_refinements:
            _refuse_without_model()
        if self._vectorize is None and self.num_refinements:
            self._look(args, kwargs)
        call = self.amortized.begin(args, kwargs)
        if not self.num_refinements:
            return call, dict(call.contexts)
        refined = self._refined(call)
        if not self.differentiable:
            refined = {n: c + (refined[n] - c).detach() for n, c in call.contexts.items()}
        return call, refined

    def _refined(self, call: Call) -> dict[str, Tensor]:
        refine, calls = self._refiner(call), _particles(call, self.amortized)
        try:
            found = [refine(one) for one in calls]
        except RuntimeError as cause:
            if "tracing tensor" in str(cause) or "data-dependent" in str(cause).lower():
                _refuse_recording(self.num_refinements, cause)
            raise
        return found[0] if len(calls) == 1 else _stack(found, self.amortized.nesting)

    def _look(self, args: tuple, kwargs: dict) -> None:
        """See whether the guide draws all latents, and whether the model takes several draws in one run."""
        self.amortized.prepare(args, kwargs)
        for name in self.amortized.enumerated:
            refuse_undrawn(name)
        with poutine.block():
            self._vectorize = vectorizable(self.model, self.amortized, args, kwargs)[0]

    def _refiner(self, call: Call) -> Refiner:
        found = [(s, s.family.distribution(call.contexts[s.name], s.event_shape)) for s in self.amortized.local_sites]
        sites = [site for site, fn in found if fn.has_rsample]
        if not sites:
            fail(
                ModelError,
                "AutoSemiAmortized",
                "refine",
                got=f"sites {[site.name for site in self.amortized.local_sites]} without a reparameterised sampler",
                because="a step follows the gradient through a draw",
                fix="Use AutoAmortized.",
            )
        how = (self.num_refinements, self.step_size, self.num_particles, self.differentiable, self.seed)
        return Refiner(self.amortized, sites, *how, bool(self._vectorize))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every site; takes the arguments of the model.

        Returns:
            Values by site name.
        """
        call, contexts = self._contexts(args, kwargs)
        return self.amortized.draw(call, contexts)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of each coordinate for the rows in use, by site name."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles of each coordinate for the rows in use, as `AutoAmortized.quantiles`."""
        _, contexts = self._contexts(args, kwargs)
        return self.amortized.levels(torch.as_tensor(quantiles).tolist(), args, kwargs, contexts)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the model; unlike in Pyro, this guide keeps it."""
        return state_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.amortized.master = None
        if self.amortized.global_guide is not None:
            self.amortized.global_guide._update_master(weakref.ref(self.amortized))

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoSemiAmortized:
        result = memo[id(self)] = self.__class__.__new__(self.__class__)
        result.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        result._model = self._model
        return result

    def extra_repr(self) -> str:
        return f"num_refinements={self.num_refinements}, step_size={self.step_size:g}"


def _refuse_without_model() -> None:
    fail(
        ModelError,
        "AutoSemiAmortized",
        "refine",
        got="a guide that was unpickled, without its model",
        because="a step follows the gradient of the model's density",
        fix="Make the guide anew from the model and load its state: guide(*args); guide.load_state_dict(state).",
    )


def _refuse_recording(steps: int, cause: BaseException) -> None:
    fail(
        RecordingError,
        "AutoSemiAmortized",
        "be recorded",
        got=f"num_refinements={steps}",
        because="each of its steps rewinds the generator, to be judged by the same draws, and a recording cannot",
        fix='Write backend="eager"; or record AutoAmortized, with num_refinements=0 until the encoder is trained.',
        cause=cause,
    )


def _particles(call: Call, guide: AutoAmortized) -> list[Call]:
    """Return the call of each vectorized particle that the latents outside the data plate have."""
    counts = {n: len(v) for n, v in call.values.items() if v.dim() - guide.event_dim(n) > guide.nesting}
    most = max(counts.values(), default=1)
    if most == 1:
        return [call]
    values = [{n: v[k] if counts.get(n, 1) > 1 else v for n, v in call.values.items()} for k in range(most)]
    return [replace(call, values=own) for own in values]


def _stack(found: list[dict[str, Tensor]], nesting: int) -> dict[str, Tensor]:
    """Return contexts with the particles at the dim left of all plates."""
    stacked = {n: torch.stack([contexts[n] for contexts in found]) for n in found[0]}
    return {n: c.reshape(len(c), *[1] * (nesting - c.dim() + 2), *c.shape[1:]) for n, c in stacked.items()}


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        fail(
            EmvaeError,
            "AutoSemiAmortized",
            f"use {name}",
            got=repr(value),
            because=f"it has to be a whole number of at least {least}",
            fix=f"Write {name}={max(least, 5)}.",
        )
