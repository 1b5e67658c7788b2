r"""What a checkpoint has: the state of the engine and what has to agree with it; and the way back."""

from __future__ import annotations

import dataclasses
import platform
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from ..engine import Engine
from ..loss import MonteCarloELBO
from ..objectives import ELBO
from ..optimizers import BlockOptimizer
from ..parameters import Parameters
from .file import FORMAT, read, writable, write
from .generators import generators as current_generators
from .generators import restore_generators
from .plain import decoded, plain, refuse

__all__ = ["check_history", "load", "pack", "restore", "restore_history", "restore_waiting", "save"]


def pack(
    engine: Engine,
    history: Any = None,
    *,
    iteration: int = 0,
    epoch: int = 0,
    status: str = "",
    seed: int | None = None,
) -> dict[str, Any]:
    r"""Return everything that a run changes as tensors, numbers, strings, lists, tuples and dicts.

    Raises:
        CheckpointError: A half-step, a scheduler or a history holds something else; says where.
        StepError: No step was taken yet.
    """
    state, parameters = engine.state, engine.parameters
    packed = {
        "params": {row.name: row.leaf for row in parameters.rows},
        "buffers": list(_constants(parameters).values()),
        "optim": {str(block): _packed_optimizer(o, parameters) for block, o in engine.optimizers.items()},
        "estimator": {name: loss.state for name, loss in _losses(engine).items()},
        "steps": state.steps,
        "count": state.count,
        "skipped": engine.skipped,
        "before": engine.before,
        "data": (parameters.num_data, parameters.subsampled),
        "device": str(device_of(parameters)),
    }
    return {
        "format": FORMAT,
        "versions": {
            "pyro_emvae": sys.modules[__package__.partition(".")[0]].__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "pyro": pyro.__version__,
            "numpy": np.__version__,
        },
        "fingerprint": fingerprint(engine) | _optimizer_names(engine),
        "state": plain(packed, "the state"),
        "rng": current_generators(),
        "history": None if history is None else packed_history(history),
        "iteration": iteration,
        "epoch": epoch,
        "status": status,
        "seed": seed,
        "skipped": engine.skipped,
    }


def fingerprint(engine: Engine) -> dict[str, str]:
    """Return what a checkpoint has to have in common with the model and guide that it is read into.

    Numbers in the names of sites count as one, for the sites of a sequence differ from batch to batch.
    """
    found = {}
    for row in engine.parameters.rows:
        support = re.sub(r", device='[^']*'", "", repr(row.constraint)) if row.constraint is not None else "real"
        found[f"parameter {row.name!r}"] = f"shape {list(row.leaf.shape)}, {row.leaf.dtype}, {support}, {row.block}"
    for name, kind in engine.parameters.sites.items():
        found[f"site {re.sub('[0-9]+', '#', name)!r}"] = kind
    for name, tensor in _constants(engine.parameters).items():
        found[name] = f"shape {list(tensor.shape)}, {tensor.dtype}"
    objective = getattr(engine.loss, "objective", ELBO())
    found["loss"] = type(engine.loss).__name__ + (f", objective={objective}" if objective != ELBO() else "")
    return found | {f"{slot}-step": _kind(step) for slot, step in engine.half_steps.items()}


def _kind(step: Any) -> str:
    sampler = getattr(step, "sampler", None)
    return type(step).__name__ + ("" if sampler is None else f" by {type(sampler).__name__}")


def _constants(parameters: Parameters) -> dict[str, Tensor]:
    """Return what modules hold beside the trainable parameters: buffers, moving or not, and frozen parameters."""
    number = {module: i for i, module in enumerate(parameters.modules)}
    found = {
        f"buffer '{type(b.module).__name__}.{b.key}' of module {number[b.module]}": b.tensor for b in parameters.buffers
    }
    trainable = {id(row.leaf) for row in parameters.rows}
    for module, i in number.items():
        for key, value in module._parameters.items():
            if value is not None and not value.requires_grad and id(value) not in trainable:
                found[f"frozen '{type(module).__name__}.{key}' of module {i}"] = value
    return found


def _losses(engine: Engine) -> dict[str, MonteCarloELBO]:
    """Return the losses whose estimators have a state: the engine's, and those that half-steps brought."""
    return dict(_losses_in("loss", engine.loss)) | {
        name: loss for slot, step in engine.half_steps.items() for name, loss in _losses_in(slot, step)
    }


def _losses_in(name: str, part: Any) -> Iterator[tuple[str, MonteCarloELBO]]:
    if isinstance(part, MonteCarloELBO):
        yield name, part
    elif isinstance(part, list | tuple):
        for i, inner in enumerate(part):
            yield from _losses_in(f"{name}.{i}", inner)
    elif hasattr(part, "maximise") and hasattr(part, "__dict__"):
        for key, inner in vars(part).items():
            yield from _losses_in(f"{name}.{key}", inner)


def device_of(parameters: Parameters) -> torch.device:
    return next((row.leaf.device for row in parameters.rows), torch.device("cpu"))


def _optimizer_names(engine: Engine) -> dict[str, str]:
    """Return the optimizer, and the scheduler if there is one, of every parameter that was stepped."""
    return {
        f"optimizer of {e.name!r} in block {block}": " with ".join(
            type(part).__name__ for part in (e.carrier, e.scheduler) if part is not None
        )
        for block, optimizer in engine.optimizers.items()
        for e in optimizer.entries
    }


def _packed_optimizer(optimizer: BlockOptimizer, parameters: Parameters) -> dict[str, dict[str, Any]]:
    """Return slots, counts, hyperparameters and schedulers by name; ``leaf`` is the parameter's name among the blocks.

    The two differ where a module has one parameter under two names, as Pyro's flow guides have.
    """
    names = {id(row.leaf): row.name for row in parameters.rows}
    return {
        e.name: {
            "leaf": names.get(id(e.param)),
            "slots": dict(e.slots) if e.rule_class else e.saved(),
            "count": e.count,
            "options": {k: v for k, v in e.options.items() if k not in ("params", "param_names")},
            "scheduler": None if e.scheduler is None else e.scheduler.state_dict(),
        }
        for e in optimizer.entries
    }


# Back again -----------------------------------------------------------------------------------------------------


def restore(
    engine: Engine,
    content: Mapping[str, Any],
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    generators: bool = True,
) -> None:
    r"""Write a checkpoint's state into the engine, in place; everything is checked before the first value is written.

    Args:
        args, kwargs: Data, by which an engine that took no step yet finds its parameters.
        generators: Whether the generators go on from the checkpoint too.

    Raises:
        CheckpointError: The checkpoint is of another model, guide, loss, optimizer or half-step; names what differs
            first. Parameters, optimizers and generators are as before.
    """
    engine.refresh()
    known, before = engine.parameters, current_generators()
    on_setup, engine.on_setup = engine.on_setup, None
    try:
        engine.setup(args, kwargs or {})
        optimizers = {f for f in content["fingerprint"] if f.startswith("optimizer of ")}
        saved = {key: value for key, value in content["fingerprint"].items() if key not in optimizers}
        _compare(saved, fingerprint(engine))
        state = content["state"]
        _meet_optimizers(engine, state["optim"])
        _compare({key: content["fingerprint"][key] for key in optimizers}, _optimizer_names(engine))
        _check_slots(engine, state["optim"])
        state = _on_device(state, device_of(engine.parameters))
    except BaseException:
        engine.parameters = known
        raise
    finally:
        restore_generators(before)
        engine.on_setup = on_setup
    _write_state(engine, state)
    if on_setup is not None:
        on_setup()
    if generators:
        restore_generators(content["rng"])


def save(engine: Engine, path: Any) -> None:
    """Write a checkpoint of the engine as it stands, without a history."""
    write(writable(path), pack(engine))


def load(engine: Engine, path: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> None:
    """Read a checkpoint into the engine; without parameters or data its values wait for the first step."""
    content = read(path)
    engine.refresh()
    if engine.parameters is None and not args and not kwargs:
        engine.waiting = content
        restore_generators(content["rng"])
    else:
        restore(engine, content, args, kwargs)


def restore_waiting(engine: Engine, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Write the state that was loaded before the parameters were known, now that there are data."""
    if engine.waiting is not None:
        restore(engine, engine.waiting, args, kwargs, generators=False)


def _compare(saved: Mapping[str, str], live: Mapping[str, str]) -> None:
    for key in [*live, *saved]:
        here, there = live.get(key, "none"), saved.get(key, "none")
        if here != there:
            refuse(
                "be read into this model",
                f"{key}: {there} in the file, {here} here",
                "a checkpoint belongs to one model, guide, loss, optimizer and way to iterate",
                "Read it into those that it was written by, or write resume=False or another path.",
            )


def _meet_optimizers(engine: Engine, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Let the optimizers take the parameters that they had, in the order in which they had met them."""
    leaves = {row.name: row.leaf for row in engine.parameters.rows}
    for block, optimizer in engine.optimizers.items():
        mine = saved.get(str(block), {})
        optimizer.add({name: leaves[own["leaf"]] for name, own in mine.items() if own["leaf"] in leaves})


def _check_slots(engine: Engine, saved: Mapping[str, Mapping[str, Any]]) -> None:
    for block, optimizer in engine.optimizers.items():
        for e in optimizer.entries:
            own = saved[str(block)][e.name]
            e.check(own["slots"], own["options"])


def _write_state(engine: Engine, state: Mapping[str, Any]) -> None:
    parameters = engine.parameters
    with torch.no_grad():
        for row in parameters.rows:
            row.leaf.copy_(state["params"][row.name])
        for live, saved in zip(_constants(parameters).values(), state["buffers"], strict=True):
            live.copy_(saved)
    for block, optimizer in engine.optimizers.items():
        optimizer.drop_waiting()
        for e in optimizer.entries:
            own = state["optim"][str(block)][e.name]
            e.load(own["slots"], own["options"])
            e.count = own["count"]
            if own["scheduler"] is not None:
                e.load_scheduler(own["scheduler"])
    for name, loss in _losses(engine).items():
        loss.state = state["estimator"].get(name, {})
    engine.steps, engine.count, engine.skipped = state["steps"], state["count"], state["skipped"]
    engine.before = state["before"]
    num_data, subsampled = state["data"]
    engine.parameters = dataclasses.replace(parameters, num_data=num_data, subsampled=subsampled)
    engine.failure = engine.waiting = None


def _on_device(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Decode the state; what lay on the device of that run's parameters goes to the device of this run's."""
    found = decoded(state, device)
    return found | {key: _placed(state[key], state["device"], device) for key in ("estimator", "steps")}


def _placed(x: Any, source: str, device: torch.device) -> Any:
    """Decode what was written by a run on the device `source`; see `_on_device`."""
    found = decoded(x, device)
    return _moved(found, device) if source == "cpu" and device.type != "cpu" else found


def _moved(x: Any, device: torch.device) -> Any:
    if isinstance(x, Tensor):
        return x.to(device)
    if type(x) in (dict, OrderedDict):
        return type(x)((k, _moved(v, device)) for k, v in x.items())
    return type(x)(_moved(v, device) for v in x) if type(x) in (list, tuple) else x


# The history ----------------------------------------------------------------------------------------------------


def packed_history(history: Any) -> dict[str, Any]:
    """Return what a history has: plain values as they are, of an object what its ``state_dict`` gives."""
    parts = _parts(history)
    records = {name: value for name, value in vars(history).items() if name not in parts and name != "start"}
    objects = {name: value.state_dict() for name, value in parts.items()}
    return {
        "elapsed": time.perf_counter() - history.start,
        "records": plain(records, "the history"),
        "objects": plain(objects, "the history"),
        "kinds": _kinds(history),
    }


def _parts(history: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(history).items() if hasattr(value, "state_dict")}


def _kinds(history: Any) -> dict[str, str]:
    return {f"history.{name}": type(value).__name__ for name, value in _parts(history).items()}


def check_history(history: Any, content: Mapping[str, Any]) -> None:
    """Raise if a history has other objects than the checkpoint's, such as those of an acceleration."""
    if content["history"] is not None:
        _compare(content["history"]["kinds"], _kinds(history))


def restore_history(history: Any, content: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Fill in what was recorded; objects load their own; the clock goes on from where it stood.

    Args:
        history: Has the objects of the one that was stored.
        content: The checkpoint.
        device: Where this run's parameters are, the CPU by default.
    """
    saved = content["history"]
    if saved is None:
        return
    vars(history).update(decoded(saved["records"]))
    objects = _placed(saved["objects"], content["state"]["device"], device or torch.device("cpu"))
    for name, state in objects.items():
        getattr(history, name).load_state_dict(state)
    history.start = time.perf_counter() - saved["elapsed"]
