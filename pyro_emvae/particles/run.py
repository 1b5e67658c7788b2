r"""Run the guide and replay the model, once under a particle plate or once per particle, in one layout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from .._checks import ModelError, NonFiniteError, fail
from .._pyro import Messenger
from .enumeration import Average, Enumerate, averaged, is_annotated, marginalized
from .handlers import PARTICLE_PLATE, Recorder, hold_batch, is_subsample, plates_of
from .sites import Particles, Site

__all__ = ["draw", "is_messenger", "replay", "run_model", "run_pair", "stack_runs"]


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
    score: Callable[[str, Any, Tensor], Tensor | None] | None = None,
    sampler: Callable[[dict], Tensor | None] | None = None,
    enumerate_site: Callable[[dict], bool] | None = None,
    same_batch: bool = False,
) -> Particles:
    r"""Run the guide and replay the model on its draws.

    Args:
        model, guide: Pyro callables of the same arguments.
        args, kwargs: The data.
        num_particles: K.
        vectorize: One run under an outermost plate (True) or K runs (False).
        max_plate_nesting: Number of plate dims; needed to vectorize more than one particle.
        treat, sampler: See `Recorder`.
        values: Values (with annotations or None) of sites that are replayed and not drawn, the same in every run.
        enumerate_site: Which sites of the guide are summed over and not drawn; they are drawn if `max_plate_nesting`
            is None. Sites of the model with ``infer={"enumerate": "parallel"}`` and without a value are always summed
            out: see `particles.enumeration.marginalized`.
        same_batch: Whether K runs see the minibatch of the first, as those under a plate do; else each draws its own.
        score: Returns the log density of a site, by its name, distribution and value, or None for the distribution's
            own ``log_prob``.

    Returns:
        The particles. With K > 1 every log density has its particles at dim ``-1 - max_plate_nesting``.

    Source: Pyro's vectorized particle plate (`pyro.infer.ELBO`); differs: a loop is stacked into the same layout.
    """
    kwargs = kwargs or {}
    if num_particles == 1 or vectorize:
        wrap = plate_wrapper(num_particles, max_plate_nesting)
        pair = wrap(model), wrap(guide)
        return run_pair(
            *pair, args, kwargs, num_particles, max_plate_nesting, treat, values, score, sampler, enumerate_site
        )
    one = (model, guide, args, kwargs, 1, max_plate_nesting, treat, values, score, sampler, enumerate_site)
    first = run_pair(*one)
    with hold_batch(first.subsample) if same_batch else contextlib.nullcontext():
        return stack_runs([first, *(run_pair(*one) for _ in range(num_particles - 1))])


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


def run_model(
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    values: Mapping[str, Any],
    num_particles: int,
    max_plate_nesting: int,
    latents: Set[str],
) -> dict[str, Site]:
    """Run the model alone, on values of all sites that the guide draws, in one run of so many particles.

    Where these are all latents, no plate of particles is needed: what does not depend on them has one row then.
    """
    if latents <= values.keys():
        with Recorder(values) as run:
            model(*args, **kwargs)
        sites = _sites_of(run.messages)
        if all(site.is_observed or name in values for name, site in sites.items()):
            return sites
    wrapped = plate_wrapper(num_particles, max_plate_nesting)(model)
    run, _, summed, nesting = _run_model(wrapped, args, kwargs, values, num_particles, max_plate_nesting, {}, False)
    sites = _sites_of(run.messages)
    return marginalized(sites, summed, nesting + (num_particles > 1), nesting) if summed else sites


def is_messenger(guide: Callable) -> bool:
    """Whether a guide is an effect handler around the model, so that both are one run."""
    return isinstance(poutine.unwrap(guide), Messenger)


def plate_wrapper(num_particles: int, nesting: int | None) -> Callable[[Callable], Callable]:
    if num_particles == 1:
        return lambda fn: fn
    return lambda fn: pyro.plate(PARTICLE_PLATE, num_particles, dim=-1 - nesting)(fn)


def run_pair(
    model,
    guide,
    args,
    kwargs,
    num_particles,
    nesting,
    treat,
    values,
    score=None,
    sampler=None,
    enumerate_site=None,
) -> Particles:
    keep = None if nesting is None else nesting + (num_particles > 1)
    guide_run, summed = Recorder(values, treat, sampler), None
    if is_messenger(guide):
        with guide_run:
            result = guide(*args, **kwargs)
        model_msgs, guide_msgs = split_messenger_guide(guide_run.messages)
        model_params, ignored, constraints = {}, [], guide_run.constraints
        subsample, latents = {n: guide_run.messages[n]["value"] for n in guide_run.subsampled}, []
    else:
        if enumerate_site is not None and nesting is not None:
            fixed = values or {}
            summed = Enumerate(lambda msg: enumerate_site(msg) and msg["name"] not in fixed, keep)
        with guide_run, summed or contextlib.nullcontext():
            guide(*args, **kwargs)
        guide_msgs = guide_run.messages
        given = {n: (m["value"], m["infer"]) for n, m in guide_msgs.items() if not m["is_observed"]}
        _check_not_observed(given, guide_msgs)
        given = {**(values or {}), **given}
        model_run, result, latents, nesting = _run_model(
            model, args, kwargs, given, num_particles, nesting, guide_msgs, bool(summed and summed.found)
        )
        model_msgs, model_params, ignored = model_run.messages, model_run.params, model_run.ignored
        constraints = guide_run.constraints | model_run.constraints
        subsample = {n: run.messages[n]["value"] for run in (model_run, guide_run) for n in run.subsampled}
    if nesting is None:
        nesting = _nesting([*guide_msgs.values(), *model_msgs.values()])
    keep = nesting + (num_particles > 1)
    guide_sites, model_sites = _sites_of(guide_msgs, score, guide_run.masses), _sites_of(model_msgs, score)
    if latents:
        model_sites = marginalized(model_sites, latents, keep, nesting)
    counted = {n: len(guide_sites[n].value) for n in (summed.found if summed else ())}
    if counted:
        places = {n: guide_sites[n].infer["_enumerate_dim"] for n in counted}
        average = Average(
            tuple((n, dim, guide_sites[n].log_prob, guide_sites[n].frames) for n, dim in places.items()), keep
        )
        guide_sites, model_sites = averaged(guide_sites, "guide", average), averaged(model_sites, "model", average)
    return Particles(
        num_particles,
        nesting,
        guide_sites,
        model_sites,
        {"guide": guide_run.params, "model": model_params},
        result,
        (tuple(guide_run.cuts),),
        tuple(ignored),
        constraints,
        subsample,
        enumerated=counted,
        held=tuple(guide_run.held),
    )


def _run_model(model, args, kwargs, given, num_particles, nesting, guide_msgs, go_on) -> tuple:
    """Run the model on given values; latents without one that are annotated are enumerated.

    Without a number of plate dims it is found by a run that draws those latents.

    Returns:
        The record, what the model returned, the latents that were enumerated, and the number of plate dims.
    """

    def wanted(msg: dict) -> bool:
        return msg["name"] not in given and is_annotated(msg["infer"])

    if nesting is None:
        with Recorder(given) as run:
            result = model(*args, **kwargs)
        if not any(wanted(msg) and not msg["is_observed"] for msg in run.messages.values()):
            return run, result, [], None
        nesting = _nesting([*guide_msgs.values(), *run.messages.values()])
        given = {**{n: (run.messages[n]["value"], None) for n in run.subsampled}, **given}
    with Recorder(given) as run, Enumerate(wanted, nesting + (num_particles > 1), go_on) as enumeration:
        result = model(*args, **kwargs)
    return run, result, enumeration.found, nesting


def split_messenger_guide(messages: dict[str, dict]) -> tuple[dict, dict]:
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


def _sites_of(messages: Mapping[str, dict], score: Callable | None = None, masses: Collection[str] = ()) -> dict:
    sites = {name: msg for name, msg in messages.items() if not is_subsample(msg)}
    return {name: make_site(msg, _at_its_mass if name in masses else score) for name, msg in sites.items()}


def _at_its_mass(name: str, fn: Any, value: Tensor) -> Tensor:
    """Return the log density of a point mass at the value that it gave, without comparing."""
    return fn.log_density.expand(fn.batch_shape)


def make_site(msg: dict, score: Callable[[str, Any, Tensor], Tensor | None] | None = None) -> Site:
    fn, value = msg["fn"], msg["value"]
    plain = not (msg["args"] or msg["kwargs"])
    density = fn.log_prob if plain else lambda x: fn.log_prob(x, *msg["args"], **msg["kwargs"])
    try:
        log_prob = score(msg["name"], fn, value) if score is not None and plain else None
        log_prob = density(value) if log_prob is None else log_prob
    except ValueError as cause:
        refuse_non_finite("Particles", msg["name"], value, cause)
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
    frames = plates_of(msg)
    infer = msg["infer"] or {}
    loops = tuple(f for f in msg["cond_indep_stack"] if not f.vectorized and f.full_size not in (None, f.size))
    own = (msg["scale"], msg["mask"], frames, infer, msg["is_observed"])
    return Site(msg["name"], fn, value, log_prob, *own, loops=loops, density=density)


def refuse_non_finite(obj: str, site: str, value: Any, cause: BaseException | None = None) -> None:
    """Raise `NonFiniteError` if the value of a site is not finite, such as a missing value in the data."""
    if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
        fail(
            NonFiniteError,
            obj,
            f"score site {site!r}",
            got=f"a value that is not finite, such as {value[~torch.isfinite(value)].flatten()[0].item()}",
            because="its log density is then no number",
            fix="Leave such data out by poutine.mask or obs_mask=, with any number in their place.",
            cause=cause,
        )


def stack_runs(runs: list[Particles]) -> Particles:
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
    held = tuple(value for run in runs for value in run.held)
    return replace(
        runs[0],
        num_particles=len(runs),
        max_plate_nesting=nesting,
        guide=sides["guide"],
        model=sides["model"],
        params=params,
        result=results,
        cuts=cuts,
        held=held,
        batches=tuple(run.subsample for run in runs),
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
        runs=tuple(sites),
        outcomes=None,
        average=None,
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
