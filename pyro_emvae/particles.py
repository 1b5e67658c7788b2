r"""Run the guide, replay the model: values, log p and log q per site.

One `Recorder` stands in for Pyro's trace, replay and parameter capture. It is the outermost handler, so that it sees a
message after every plate, scale and mask of the program, and its change of a value before any of them does.
"""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor, fx, nn

from ._checks import ModelError, fail, nearest
from ._pyro import Messenger, scale_and_mask

__all__ = ["ModuleWatch", "Particles", "Site", "draw", "hold_batch", "quiet", "reduce_to", "replay", "vectorizable"]

PARTICLE_PLATE = "num_particles_vectorized"


@dataclass(frozen=True)
class Site:
    r"""One sample statement of one run.

    Args:
        name: The site's name.
        fn: Its distribution, batch shape ``(particles?, *plates)``.
        value: The value in use: drawn, replayed or observed.
        log_prob: log density of the value, *unscaled and unmasked*, in nats; plate dims from the right, particles
            at ``-1 - max_plate_nesting``.
        scale, mask: What the program's handlers multiply by and keep.
        frames: The vectorized plates, without the particle plate.
        infer: The site's annotations.
        is_observed: Whether the value was given (``obs=``, ``factor``, ``deterministic``).
    """

    name: str
    fn: Any
    value: Tensor
    log_prob: Tensor = field(repr=False)
    scale: Any
    mask: Any
    frames: tuple
    infer: Mapping[str, Any] = field(repr=False)
    is_observed: bool

    @property
    def scaled(self) -> Tensor:
        """log density times scale where the mask is true, else 0."""
        if self.mask is None and isinstance(self.scale, float) and self.scale == 1.0:
            return self.log_prob
        return scale_and_mask(self.log_prob, self.scale, self.mask)

    @property
    def is_deterministic(self) -> bool:
        return bool(self.infer.get("_deterministic"))


@dataclass(frozen=True)
class Particles:
    r"""Draws of the guide and the model replayed on them.

    Args:
        num_particles: K.
        max_plate_nesting: Number of plate dims; particles are at dim ``-1 - max_plate_nesting`` if K > 1.
        guide: The guide's sites in order of execution.
        model: The model's sites in order of execution.
        params: Unconstrained leaves met, by name, for each of the two runs.
        result: What the model returned.
        ignored: Model sites whose ``infer={"estimator": ...}`` the guide's replay replaced.
        constraints: What the parameter statements declared, by name.
        subsample: Indices that plates drew at random, by plate.
        cuts: Per run, the pairs of a value as drawn and the leaf that stands for it downstream, in order.
    """

    num_particles: int
    max_plate_nesting: int
    guide: dict[str, Site]
    model: dict[str, Site]
    params: dict[str, dict[str, Tensor]] = field(repr=False)
    result: Any = field(default=None, repr=False)
    cuts: tuple[tuple[tuple[Tensor, Tensor], ...], ...] = field(default=(), repr=False)
    ignored: tuple[str, ...] = ()
    constraints: dict[str, Any] = field(default_factory=dict, repr=False)
    subsample: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def latents(self) -> dict[str, Site]:
        """The model's unobserved sites."""
        return {name: site for name, site in self.model.items() if not site.is_observed}

    @property
    def observed(self) -> dict[str, Site]:
        """The model's observed sites, without deterministic ones."""
        return {n: s for n, s in self.model.items() if s.is_observed and not s.is_deterministic}

    def rows(self, tensor: Tensor) -> Tensor:
        """Return a log density with all dims spelled out: ``(particles, *plates)``; a missing dim has size 1."""
        return tensor.reshape((1,) * (self.max_plate_nesting + 1 - tensor.dim()) + tensor.shape)

    def values(self, name: str) -> Tensor:
        """Return a site's value, particles first: ``(particles, *plates, *event)`` with the site's own plates."""
        site = self.guide[name] if name in self.guide else self.model[name]
        event_dim = site.fn.event_dim
        value = site.value
        batch = value.shape[: value.dim() - event_dim]
        event = value.shape[value.dim() - event_dim :]
        nest = self.max_plate_nesting
        full = (1,) * (nest + 1 - len(batch)) + tuple(batch)
        keep = {frame.dim for frame in site.frames}
        plates = tuple(n for i, n in enumerate(full[1:]) if (i - nest) in keep or n != 1)
        return value.reshape((full[0], *plates, *event)).expand((self.num_particles, *plates, *event))

    def total(self, sites: Iterable[Site]) -> Tensor:
        """Return the scaled and masked log density of `sites`, summed over plates: ``(particles,)``, nats."""
        terms = [self.rows(site.scaled).flatten(1).sum(1) for site in sites]
        if not terms:
            return torch.zeros(self.num_particles)
        return torch.stack([term.expand(self.num_particles) for term in terms]).sum(0)

    @property
    def log_p(self) -> Tensor:
        """log p(x, z) per particle: ``(particles,)``, nats."""
        return self.total(self.model.values())

    @property
    def log_q(self) -> Tensor:
        """log q(z) per particle: ``(particles,)``, nats."""
        return self.total(self.guide.values())

    def first_non_finite(self) -> str | None:
        """Return a description of the first site whose value or log density is not finite."""
        for run in ("guide", "model"):
            for site in getattr(self, run).values():
                bad_value = site.value.is_floating_point() and not bool(torch.isfinite(site.value).all())
                if bad_value or not bool(torch.isfinite(site.scaled).all()):
                    what = "value" if bad_value else "log density"
                    return f"a non-finite {what} at the {run}'s site {site.name!r}"
        return None


class Recorder(Messenger):
    """Record every sample statement and parameter; replay given values; treat drawn values by name.

    `treat(msg)` returns ``"attach"``, ``"detach"`` or ``"cut"`` for a freshly drawn value; cut values are leaves of
    their own, so that gradients through values and direct gradients come apart. ``"probe"`` cuts values that no
    parameter moves, too.
    """

    def __init__(self, values: Mapping[str, Any] | None = None, treat: Callable[[dict], str] | None = None) -> None:
        super().__init__()
        self.values = values or {}
        self.treat = treat
        self.messages: dict[str, dict] = {}
        self.cuts: list[tuple[Tensor, Tensor]] = []
        self.params: dict[str, Tensor] = {}
        self.constraints: dict[str, Any] = {}
        self.ignored: list[str] = []
        self.subsampled: list[str] = []

    def _pyro_sample(self, msg: dict) -> None:
        if is_subsample(msg) and msg["value"] is None and (msg["fn"].subsample_size or math.inf) < msg["fn"].size:
            self.subsampled.append(msg["name"])
        if msg["is_observed"] or msg["name"] not in self.values:
            return
        msg["value"], infer = self.values[msg["name"]]
        msg["done"] = True
        if infer is not None:
            if "estimator" in (msg["infer"] or {}) and "estimator" not in infer:
                self.ignored.append(msg["name"])
            msg["infer"] = infer

    def _pyro_post_sample(self, msg: dict) -> None:
        if msg["infer"] and msg["infer"].get("_do_not_trace"):
            return
        name = msg["name"]
        if name in self.messages:
            fail(
                ModelError,
                "Particles",
                f"record site {name!r}",
                got="a second sample statement of that name",
                because="names tell the sites apart",
                fix="Give every pyro.sample its own name.",
            )
        if self.treat is not None and not msg["is_observed"] and not is_subsample(msg):
            self._treat(msg)
        self.messages[name] = msg.copy()

    def _treat(self, msg: dict) -> None:
        how = self.treat(msg)
        value = msg["value"]
        probe = how == "probe" and value.is_floating_point()
        if how == "attach" or not (value.requires_grad or probe):
            return
        msg["value"] = value.detach()
        if how == "cut" or probe:
            self.cuts.append((value, msg["value"].requires_grad_()))

    def _pyro_post_param(self, msg: dict) -> None:
        value = msg["value"]
        if value is not None:
            leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
            self.params[msg["name"]] = leaf
            self.constraints[msg["name"]] = msg["kwargs"].get("constraint")


def is_subsample(msg: Mapping[str, Any]) -> bool:
    """Whether a message is a plate's draw of indices."""
    return type(msg["fn"]).__name__ == "_Subsample"


def draw(
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_particles: int = 1,
    vectorize: bool = False,
    max_plate_nesting: int | None = None,
    treat: Callable[[dict], str] | None = None,
    values: Mapping[str, Any] | None = None,
) -> Particles:
    r"""Run the guide and replay the model on its draws.

    Args:
        model, guide: Pyro callables of the same arguments.
        args, kwargs: The data.
        num_particles: K.
        vectorize: One run under an outermost plate (True) or K runs (False).
        max_plate_nesting: Number of plate dims; needed to vectorize more than one particle.
        treat: See `Recorder`.
        values: Values (with annotations or None) of sites that are replayed and not drawn, the same in every run.

    Returns:
        The particles. With K > 1 every log density has its particles at dim ``-1 - max_plate_nesting``.

    Source: Pyro's vectorized particle plate (`pyro.infer.ELBO`); differs: a loop is stacked into the same layout.
    """
    kwargs = kwargs or {}
    if num_particles == 1 or vectorize:
        wrap = _plate_wrapper(num_particles, max_plate_nesting)
        return _pair(wrap(model), wrap(guide), args, kwargs, num_particles, max_plate_nesting, treat, values)
    return _stack(
        [_pair(model, guide, args, kwargs, 1, max_plate_nesting, treat, values) for _ in range(num_particles)]
    )


def replay(
    model: Callable,
    guide: Callable,
    values: Mapping[str, Tensor],
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_particles: int = 1,
    max_plate_nesting: int | None = None,
) -> Particles:
    """Score given values of the guide's sites, in the layout of `draw`, under guide and model in one run."""
    given = {name: (value, None) for name, value in values.items()}
    return draw(
        model,
        guide,
        args,
        kwargs,
        num_particles=num_particles,
        vectorize=True,
        max_plate_nesting=max_plate_nesting,
        values=given,
    )


def _plate_wrapper(num_particles: int, nesting: int | None) -> Callable[[Callable], Callable]:
    if num_particles == 1:
        return lambda fn: fn
    return lambda fn: pyro.plate(PARTICLE_PLATE, num_particles, dim=-1 - nesting)(fn)


def _pair(model, guide, args, kwargs, num_particles, nesting, treat, values) -> Particles:
    messenger = poutine.unwrap(guide)
    guide_run = Recorder(values, treat)
    if isinstance(messenger, Messenger):
        with guide_run:
            result = guide(*args, **kwargs)
        model_msgs, guide_msgs = _split_messenger_guide(guide_run.messages)
        model_params, ignored, constraints = {}, [], guide_run.constraints
        subsample = {n: guide_run.messages[n]["value"] for n in guide_run.subsampled}
    else:
        with guide_run:
            guide(*args, **kwargs)
        guide_msgs = guide_run.messages
        given = {n: (m["value"], m["infer"]) for n, m in guide_msgs.items() if not m["is_observed"]}
        _check_not_observed(given, guide_msgs)
        with Recorder({**(values or {}), **given}) as model_run:
            result = model(*args, **kwargs)
        model_msgs, model_params, ignored = model_run.messages, model_run.params, model_run.ignored
        constraints = guide_run.constraints | model_run.constraints
        subsample = {n: run.messages[n]["value"] for run in (model_run, guide_run) for n in run.subsampled}
    if nesting is None:
        nesting = _nesting([*guide_msgs.values(), *model_msgs.values()])
    return Particles(
        num_particles,
        nesting,
        {n: _site(m) for n, m in guide_msgs.items() if not is_subsample(m)},
        {n: _site(m) for n, m in model_msgs.items() if not is_subsample(m)},
        {"guide": guide_run.params, "model": model_params},
        result,
        (tuple(guide_run.cuts),),
        tuple(ignored),
        constraints,
        subsample,
    )


def _split_messenger_guide(messages: dict[str, dict]) -> tuple[dict, dict]:
    """Split the single run of an effect-handler guide: the prior is kept in its annotations."""
    model, guide = {}, {}
    for name, msg in messages.items():
        prior = (msg["infer"] or {}).get("prior")
        if msg["is_observed"] or is_subsample(msg):
            model[name] = msg
        elif prior is None:
            guide[name] = msg
        else:
            guide[name] = msg
            model[name] = {**msg, "fn": prior}
    return model, guide


def _check_not_observed(given: Mapping[str, Any], guide_msgs: Mapping[str, dict]) -> None:
    for name in given:
        if guide_msgs[name]["value"] is None:
            fail(
                ModelError,
                "Particles",
                f"replay site {name!r}",
                got="no value",
                because="the guide has to draw every latent",
                fix=f"Write pyro.sample({name!r}, ...) in the guide without a handler that hides its value.",
            )


def _nesting(messages: Iterable[dict]) -> int:
    dims = [f.dim for m in messages for f in m["cond_indep_stack"] if f.vectorized and f.name != PARTICLE_PLATE]
    return -min(dims) if dims else 0


def _site(msg: dict) -> Site:
    fn, value = msg["fn"], msg["value"]
    try:
        log_prob = fn.log_prob(value, *msg["args"], **msg["kwargs"])
    except ValueError as cause:
        shape = tuple(getattr(value, "shape", ()))
        fail(
            ModelError,
            "Particles",
            f"score site {msg['name']!r}",
            got=f"a value of shape {shape} under {type(fn).__name__} with shape {tuple(fn.shape())}",
            because=f"its distribution refuses the value ({cause})",
            fix="Let the data fit the plates, the event shape and the support of the site.",
            cause=cause,
        )
    frames = tuple(f for f in msg["cond_indep_stack"] if f.vectorized and f.name != PARTICLE_PLATE)
    infer = msg["infer"] or {}
    return Site(msg["name"], fn, value, log_prob, msg["scale"], msg["mask"], frames, infer, msg["is_observed"])


def _stack(runs: list[Particles]) -> Particles:
    """Stack runs of one particle each into the layout of the vectorized plate."""
    nesting = max(run.max_plate_nesting for run in runs)
    params = {
        side: {name: leaf for run in runs for name, leaf in run.params[side].items()} for side in ("guide", "model")
    }
    sides = {}
    for side in ("guide", "model"):
        names = list(getattr(runs[0], side))
        if any(list(getattr(run, side)) != names for run in runs):
            fail(
                ModelError,
                "Particles",
                f"stack {len(runs)} runs of the {side}",
                got="runs with different sites",
                because="more than one particle needs the same sites in every run",
                fix="Use num_particles=1 for a model whose structure changes.",
            )
        sides[side] = {n: _stack_site([getattr(run, side)[n] for run in runs], nesting) for n in names}
    results, cuts = [run.result for run in runs], tuple(cut for run in runs for cut in run.cuts)
    return replace(
        runs[0],
        num_particles=len(runs),
        max_plate_nesting=nesting,
        guide=sides["guide"],
        model=sides["model"],
        params=params,
        result=results,
        cuts=cuts,
    )


def _stack_site(sites: list[Site], nesting: int) -> Site:
    first = sites[0]

    def stack(tensors: list[Tensor], event_dim: int = 0) -> Tensor:
        padded = [t.reshape((1,) * (nesting + event_dim - t.dim()) + t.shape) for t in tensors]
        return torch.stack(padded)

    event_dim = first.fn.event_dim
    scale = _stack_handler([s.scale for s in sites], stack)
    mask = _stack_handler([s.mask for s in sites], stack)
    return replace(
        first,
        value=stack([s.value for s in sites], event_dim),
        log_prob=stack([s.log_prob for s in sites]),
        scale=scale,
        mask=mask,
    )


def _stack_handler(values: list[Any], stack: Callable) -> Any:
    first = values[0]
    if not isinstance(first, Tensor):
        if all(v is first or v == first for v in values):
            return first
        values = [torch.as_tensor(v) for v in values]
    elif all(v is first for v in values):
        return first
    return stack(list(values))


def reduce_to(term: Tensor, frames: Iterable, target: Iterable) -> Tensor:
    r"""Sum a log density over the plates that `target` does not have, keeping dims.

    Source: Rao-Blackwellization over plates (`pyro.infer.util.MultiFrameTensor`).
    """
    target = set(target)
    for frame in frames:
        if frame not in target and term.dim() >= -frame.dim and term.shape[frame.dim] != 1:
            term = term.sum(frame.dim, keepdim=True)
    return term


# What only looks: generators forked, buffers and modes restored -------------------------------------------------


@contextlib.contextmanager
def quiet(*, seed: int | None = None, train: bool | None = None, validate: bool | None = None) -> Iterator[None]:
    r"""Run code that only measures: generators, buffers, modes and validation are as before when it ends.

    Args:
        seed: Seed of the forked torch, numpy and Python generators; None goes on from their present state.
        train: Mode of every module that is called meanwhile: True, False, or None for its own.
        validate: Pyro's validation meanwhile, or None for its own.

    Modules are found by a forward hook, so that buffers of networks that no one registered are restored too.
    """
    states = (random.getstate(), np.random.get_state())
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    validation = pyro.validation_enabled(validate) if validate is not None else contextlib.nullcontext()
    with ModuleWatch(train) as watch:
        try:
            with torch.random.fork_rng(devices), validation:
                if seed is not None:
                    torch.manual_seed(seed)
                    random.seed(seed)
                    np.random.seed(seed % 2**32)
                yield
        finally:
            watch.restore()
            random.setstate(states[0])
            np.random.set_state(states[1])


class ModuleWatch:
    """Note every module that is called, with its mode and copies of its buffers as they were before."""

    def __init__(self, train: bool | None = None) -> None:
        self.train = train
        self.saved: dict[nn.Module, tuple[bool, dict[str, Tensor]]] = {}

    def __enter__(self) -> ModuleWatch:
        self.handle = nn.modules.module.register_module_forward_pre_hook(self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()

    def _note(self, module: nn.Module, _: Any) -> None:
        if module not in self.saved and not isinstance(module, fx.GraphModule):
            buffers = {n: b.clone() for n, b in module._buffers.items() if b is not None}
            self.saved[module] = (module.training, buffers)
            if self.train is not None:
                module.training = self.train

    def restore(self) -> None:
        """Put modes and buffers back."""
        with torch.no_grad():
            for module, (training, buffers) in self.saved.items():
                module.training = training
                for name, value in buffers.items():
                    if not torch.equal(module._buffers[name], value):
                        module._buffers[name].copy_(value)


class _Hold(Messenger):
    def __init__(self, indices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.indices = indices

    def _pyro_sample(self, msg: dict) -> None:
        if is_subsample(msg) and msg["value"] is None and msg["name"] in self.indices:
            msg["value"], msg["done"] = self.indices[msg["name"]], True


def hold_batch(indices: Mapping[str, Tensor]) -> Messenger:
    """Return a context in which plates that subsample at random use these indices, by plate."""
    return _Hold(indices)


def vectorizable(
    model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any], rtol: float | None = None
) -> tuple[bool, int, str]:
    r"""Replay two particles vectorized and one by one and compare log p and log q per site.

    Returns:
        Whether they agree, the number of plate dims, and otherwise what disagreed first.

    A model with ``z - z.mean()`` passes every shape check and gives wrong numbers when vectorized; this finds it.
    """
    with quiet(train=False, validate=False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = _pair(model, guide, args, kwargs, 1, None, None, None)
        nesting = first.max_plate_nesting
        indices = _subsample_values(model, guide, args, kwargs)
        loops = [_pair(model, guide, args, kwargs, 1, nesting, None, indices) for _ in range(2)]
        looped = _stack(loops)
        given = {n: (s.value, None) for n, s in looped.guide.items() if not s.is_observed} | indices
        try:
            together = draw(
                model, guide, args, kwargs, num_particles=2, vectorize=True, max_plate_nesting=nesting, values=given
            )
        except Exception as error:  # any failure of the user's code under an extra dim is the answer
            return False, nesting, f"{type(error).__name__} in the vectorized run: {error}"
        for side in ("guide", "model"):
            for name, site in getattr(looped, side).items():
                other = getattr(together, side).get(name)
                if other is None or not _same(site, other, looped, rtol):
                    return False, nesting, f"log density of the {side}'s site {name!r}"
    return True, nesting, ""


def _same(site: Site, other: Site, particles: Particles, rtol: float | None) -> bool:
    one, two = particles.rows(site.scaled), particles.rows(other.scaled)
    if one.dim() != two.dim():
        return False
    tolerance = rtol or (1e-4 if one.dtype == torch.float32 else 1e-8)
    try:
        one, two = torch.broadcast_tensors(one, two)
    except RuntimeError:
        return False
    scale = one.abs().amax().clamp(min=1.0) if one.numel() else torch.ones(())
    return bool(torch.allclose(one, two, rtol=tolerance, atol=tolerance * float(scale), equal_nan=True))


def _subsample_values(model, guide, args, kwargs) -> dict[str, Any]:
    """Draw the plates' indices once, to be shared by both ways of running."""
    with Recorder() as run:
        guide(*args, **kwargs)
    given = {n: (m["value"], m["infer"]) for n, m in run.messages.items() if not m["is_observed"]}
    with Recorder(given) as model_run:
        model(*args, **kwargs)
    both = {**run.messages, **model_run.messages}
    return {n: (m["value"], m["infer"]) for n, m in both.items() if is_subsample(m)}


def check_match(particles: Particles) -> None:
    r"""Raise unless model and guide have the same latents, of the same shape.

    Raises:
        ModelError: Naming the first site that one of them lacks or whose event dims differ.
    """
    guide = {n: s for n, s in particles.guide.items() if not s.is_observed and not s.infer.get("is_auxiliary")}
    latents = particles.latents
    enumerated = {n for n, s in latents.items() if s.infer.get("_enumerate_dim") is not None}
    for name in guide:
        if name not in latents:
            where = "observed in the model" if name in particles.model else "a site that the model lacks"
            fail(
                ModelError,
                "guide",
                f"draw site {name!r}",
                got=where,
                because="every guide site is a latent of the model, or auxiliary",
                fix=f"Rename it ({nearest(name, latents)}), or mark it infer={{'is_auxiliary': True}}.",
            )
    for name, site in latents.items():
        if name not in particles.guide and name not in enumerated:
            fail(
                ModelError,
                "guide",
                f"draw site {name!r}",
                got="no such site in the guide",
                because="every latent of the model needs a value",
                fix=f"Add pyro.sample({name!r}, ...) to the guide, or observe it in the model with obs=.",
            )
        if name in guide and guide[name].fn.event_dim != site.fn.event_dim:
            fail(
                ModelError,
                "guide",
                f"draw site {name!r}",
                got=f"event_dim {guide[name].fn.event_dim} in the guide and {site.fn.event_dim} in the model",
                because="both have to agree on what one value is",
                fix="Use .to_event() in the same way in both.",
            )
        if name in guide:
            _check_shapes(name, guide[name], site)


def _check_shapes(name: str, guide: Site, model: Site) -> None:
    one, two = tuple(guide.fn.shape()), tuple(model.fn.shape())
    if one != two and {f.name for f in guide.frames} != {f.name for f in model.frames}:
        fail(
            ModelError,
            "guide",
            f"draw site {name!r}",
            got=f"shape {one} in the guide and {two} in the model",
            because="both have to draw the same values in the same plates",
            fix="Put the site into the same pyro.plate in both.",
        )
