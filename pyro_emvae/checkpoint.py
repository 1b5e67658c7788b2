r"""Checkpoints: all that a run changes in one file, written whole or not at all, that executes nothing when read.

A run that was killed goes on from its file with the very numbers that it would have had. For that the file has the
`State`, every generator, the history, and where the run stood.
"""

from __future__ import annotations

import contextlib
import io
import os
import platform
import random
import re
import sys
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyro
import torch
from torch import Tensor

from ._checks import CheckpointError, fail
from .engine import Engine
from .loss import MonteCarloELBO
from .optimizers import BlockOptimizer
from .parameters import Parameters
from .particles import quiet

__all__ = ["FORMAT", "Checkpoints", "Position", "load", "pack", "read", "restore", "restore_waiting", "save", "write"]

FORMAT = 1
KEYS = ("versions", "fingerprint", "state", "rng", "history", "iteration", "epoch", "status", "seed", "skipped")
GOES_ON = ("", "MAX_ITER", "INTERRUPTED", "NAN")


@dataclass(frozen=True)
class Position:
    """Where a run starts: iterations and epochs made, how it had ended, what it had left out, whence it was read."""

    iteration: int = 0
    epoch: int = 0
    status: str = ""
    skipped: int = 0
    source: str = ""

    @property
    def ended(self) -> bool:
        """Whether a stopping rule had ended the run, so that it does not go on."""
        return self.status not in GOES_ON


class Checkpoints:
    r"""The file of one run: read before it, written between iterations, with a loader between epochs.

    Args:
        engine: What the run changes.
        path: The file, in a folder that exists; None: nothing is read or written.
        resume: ``"auto"``: go on if the file exists, else start; True: the file has to exist; False: start anew, the
            first checkpoint replaces the file.
        data: The loader, whose generators belong to the run.
        seed: The run's seed; that of the file has to be the same.

    One run writes one file. A process that is killed while it writes leaves ``.<name>.tmp`` beside it, which the next
    checkpoint overwrites.

    Raises:
        CheckpointError: The path cannot be written, the file is missing, damaged, of another format or another model.

    Example:
        >>> import tempfile
        >>> from pyro_emvae import SVI, problems
        >>> pyro.clear_param_store()
        >>> model, guide, (x,) = (p := problems.linear_gaussian()).model, p.guide, p.args
        >>> path = Path(tempfile.mkdtemp()) / "run.pt"
        >>> for number in (10, 30):
        ...     svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}))
        ...     fit = svi.run(number, x, checkpoint=path, seed=0)
        ...     print(fit.num_iterations, fit.provenance.get("resumed_from", "")[:15])
        10
        30 iteration 10 of
    """

    def __init__(
        self, engine: Engine, path: Any, resume: Any = "auto", data: Any = None, seed: int | None = None
    ) -> None:
        if resume is not True and resume is not False and resume != "auto":
            _refuse("resume", repr(resume), "there are three ways to start", 'Write resume="auto", True or False.')
        if path is None and resume is True:
            _refuse("resume", "no path", "a run goes on from a file", "Write checkpoint=path.")
        self.engine, self.resume, self.data, self.seed = engine, resume, data, seed
        self.path = None if path is None else _writable(path)
        self.skipped = engine.skipped

    def begin(self, history: Any, first: Callable[[], tuple[tuple, Mapping[str, Any]]]) -> Position:
        """Go on from the file, if there is one and it is wanted.

        Args:
            history: Gets what the file's run had recorded.
            first: Returns the arguments of a batch, by which a new process finds its parameters.
        """
        if self.path is None or self.resume is False or (self.resume == "auto" and not self.path.exists()):
            return Position()
        content = read(self.path)
        if self.seed is not None and content["seed"] not in (None, self.seed):
            _refuse(
                f"go on from {self.path}",
                f"seed={self.seed}",
                f"its run has seed {content['seed']}",
                f"Write seed={content['seed']}, another path, or resume=False.",
            )
        if content["iteration"]:
            self._check_loader(content["rng"].get("loader"))
        engine = self.engine
        engine.refresh()
        restore(engine, content, *(((), {}) if engine.parameters is not None else self._peek(first)))
        _restore_loader(self.data, content["rng"].get("loader"))
        _restore_history(history, content["history"])
        self.skipped = content["skipped"]
        self.seed = content["seed"]
        source = f"iteration {content['iteration']} of {self.path}"
        return Position(content["iteration"], content["epoch"], content["status"], self.skipped, source)

    def _check_loader(self, saved: Any) -> None:
        here, there = _kind_of_data(_loader_state(self.data)), _kind_of_data(saved)
        if here != there:
            _refuse(
                f"go on from {self.path}",
                f"{here}, {there} in the file",
                "the order of the data belongs to the run",
                "Give the data as before, such as DataLoader(..., generator=...).",
            )

    def _peek(self, first: Callable[[], tuple[tuple, Mapping[str, Any]]]) -> tuple[tuple, Mapping[str, Any]]:
        if isinstance(self.data, Iterator):
            _refuse(
                f"go on from {self.path}",
                f"an iterator of type {type(self.data).__name__}",
                "a new process finds its parameters by a first batch, and an iterator would lose it",
                "Pass a list or a DataLoader, or take a step first.",
            )
        before = _loader_state(self.data)
        with quiet():
            batch = first()
        _restore_loader(self.data, before)
        return batch

    def write(self, history: Any, iteration: int, epoch: int, status: str = "") -> None:
        """Write the file, if there is to be one."""
        if self.path is None:
            return
        content = pack(self.engine, history, iteration=iteration, epoch=epoch, status=status, seed=self.seed)
        content["skipped"] = self.skipped
        loader = _loader_state(self.data)
        content["rng"]["loader"] = None if loader is None else plain(loader, "the loader's state")
        write(self.path, content)


# The content ----------------------------------------------------------------------------------------------------


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
        "device": str(_device(parameters)),
    }
    return {
        "format": FORMAT,
        "versions": {
            "pyro_emvae": sys.modules[__package__].__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "pyro": pyro.__version__,
            "numpy": np.__version__,
        },
        "fingerprint": fingerprint(engine) | _optimizer_names(engine),
        "state": plain(packed, "the state"),
        "rng": _generators(),
        "history": None if history is None else _packed_history(history),
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
    found["loss"] = type(engine.loss).__name__
    return found | {f"{slot}-step": type(step).__name__ for slot, step in engine.half_steps.items()}


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


def _device(parameters: Parameters) -> torch.device:
    return next((row.leaf.device for row in parameters.rows), torch.device("cpu"))


def _optimizer_names(engine: Engine) -> dict[str, str]:
    """Return the optimizer, and the scheduler if there is one, of every parameter that was stepped."""
    return {
        f"optimizer of {e.name!r} in block {block}": " with ".join(
            type(part).__name__ for part in (e.carrier, e.scheduler) if part is not None
        )
        for block, optimizer in engine.optimizers.items()
        for e in optimizer.objects.values()
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
        for e in optimizer.objects.values()
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
    known, before = engine.parameters, _generators()
    try:
        engine.setup(args, kwargs or {})
        optimizers = {f for f in content["fingerprint"] if f.startswith("optimizer of ")}
        saved = {key: value for key, value in content["fingerprint"].items() if key not in optimizers}
        _compare(saved, fingerprint(engine))
        state = content["state"]
        _meet_optimizers(engine, state["optim"])
        _compare({key: content["fingerprint"][key] for key in optimizers}, _optimizer_names(engine))
        _check_slots(engine, state["optim"])
        state = _on_device(state, _device(engine.parameters))
    except BaseException:
        engine.parameters = known
        raise
    finally:
        _restore_generators(before)
    _write_state(engine, state)
    if generators:
        _restore_generators(content["rng"])


def save(engine: Engine, path: Any) -> None:
    """Write a checkpoint of the engine as it stands, without a history."""
    write(_writable(path), pack(engine))


def load(engine: Engine, path: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> None:
    """Read a checkpoint into the engine; without parameters or data its values wait for the first step."""
    content = read(path)
    engine.refresh()
    if engine.parameters is None and not args and not kwargs:
        engine.waiting = content
        _restore_generators(content["rng"])
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
            _refuse(
                "be read into this model",
                f"{key}: {there} in the file, {here} here",
                "a checkpoint belongs to one model, guide, loss and optimizer",
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
        for e in optimizer.objects.values():
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
        for e in optimizer.objects.values():
            own = state["optim"][str(block)][e.name]
            e.load(own["slots"], own["options"])
            e.count = own["count"]
            if own["scheduler"] is not None:
                e.load_scheduler(own["scheduler"])
    for name, loss in _losses(engine).items():
        loss.state = state["estimator"].get(name, {})
    engine.steps, engine.count, engine.skipped = state["steps"], state["count"], state["skipped"]
    engine.before = state["before"]
    engine.failure = engine.waiting = None


def _on_device(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Decode the state; what lay on the device of that run's parameters goes to the device of this run's."""
    state = decoded(state, device)
    if state["device"] == "cpu" and device.type != "cpu":
        state |= {key: _moved(state[key], device) for key in ("estimator", "steps")}
    return state


def _moved(x: Any, device: torch.device) -> Any:
    if isinstance(x, Tensor):
        return x.to(device)
    if type(x) in (dict, OrderedDict):
        return type(x)((k, _moved(v, device)) for k, v in x.items())
    return type(x)(_moved(v, device) for v in x) if type(x) in (list, tuple) else x


# Generators and the loader --------------------------------------------------------------------------------------


def _generators() -> dict[str, Any]:
    """Return the states of torch's, Python's and numpy's generators."""
    numpy = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (numpy[0], torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:]),
    }


def _restore_generators(saved: Mapping[str, Any]) -> None:
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["cuda"])
    random.setstate(saved["python"])
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def _loader_generators(data: Any) -> list[torch.Generator]:
    """Return the generators that a DataLoader and its samplers were given, each once."""
    batches = getattr(data, "batch_sampler", None)
    owners = (data, getattr(data, "sampler", None), batches, getattr(batches, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _has_state(data: Any) -> bool:
    return callable(getattr(data, "state_dict", None)) and callable(getattr(data, "load_state_dict", None))


def _loader_state(data: Any) -> Any:
    if data is None:
        return None
    return data.state_dict() if _has_state(data) else [g.get_state() for g in _loader_generators(data)]


def _kind_of_data(state: Any) -> str:
    if state is None:
        return "arguments"
    return f"a loader with {len(state)} generators of its own" if isinstance(state, list) else "a loader with a state"


def _restore_loader(data: Any, saved: Any) -> None:
    if data is None or saved is None:
        return
    saved = decoded(saved)
    if _has_state(data):
        data.load_state_dict(saved)
        return
    for generator, state in zip(_loader_generators(data), saved, strict=False):
        generator.set_state(state)


# The history ----------------------------------------------------------------------------------------------------


def _packed_history(history: Any) -> dict[str, Any]:
    records = {name: value for name, value in vars(history).items() if name != "start"}
    return {"elapsed": time.perf_counter() - history.start, "records": plain(records, "the history")}


def _restore_history(history: Any, saved: Mapping[str, Any] | None) -> None:
    """Fill in what was recorded; the clock goes on from where it stood."""
    if saved is not None:
        vars(history).update(decoded(saved["records"]))
        history.start = time.perf_counter() - saved["elapsed"]


# Plain values ---------------------------------------------------------------------------------------------------

SCALARS = (bool, int, float, complex, str, type(None))
ELSEWHERE, ARRAY, ARRAYS, ROWS, NUMBERS = "__elsewhere__", "__array__", "__arrays__", "__rows__", "__numbers__"


def plain(x: Any, where: str) -> Any:
    r"""Return `x` as tensors on the CPU, numbers, strings, lists, tuples and dicts; `decoded` is the inverse.

    Arrays, long lists of numbers and lists of rows of numbers become tensors; a tensor elsewhere is marked.

    Raises:
        CheckpointError: Something else, with its place.

    Example:
        >>> plain({"rows": [(0, 1.5), (1, 2.5)]}, "the history")
        {'rows': {'__rows__': [tensor([0, 1]), tensor([1.5000, 2.5000], dtype=torch.float64)]}}
    """
    kind = type(x)
    if kind in SCALARS or isinstance(x, torch.Size | Counter):
        return x
    if isinstance(x, Tensor):
        copied = x.detach().to("cpu", copy=True)
        return copied if x.device.type == "cpu" else {ELSEWHERE: copied}
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, np.ndarray) and x.dtype.kind in "biufc":
        return {ARRAY: torch.from_numpy(x.copy())}
    if kind is list:
        packed = _packed_list(x)
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(x)] if packed is None else packed
    if kind is tuple:
        return tuple(plain(v, f"{where}[{i}]") for i, v in enumerate(x))
    if kind in (dict, OrderedDict) and all(type(k) in SCALARS for k in x):
        return kind((k, plain(v, f"{where}[{k!r}]")) for k, v in x.items())
    _refuse(
        f"hold {where}",
        f"{x!r:.80} of type {kind.__name__}",
        "a file that executes nothing when it is read holds tensors, numbers, strings, lists, tuples and dicts",
        "Keep it as one of these.",
    )


def _packed_list(x: list) -> dict[str, Any] | None:
    """Return a list of arrays, of numbers or of rows of numbers as few tensors; None if it is another list."""
    if not x:
        return None
    if isinstance(x[0], np.ndarray):
        alike = all(isinstance(a, np.ndarray) and (a.dtype, a.shape) == (x[0].dtype, x[0].shape) for a in x)
        return {ARRAYS: torch.from_numpy(np.stack(x))} if alike and x[0].dtype.kind in "biufc" else None
    if set(map(type, x)) == {tuple} and x[0] and set(map(len, x)) == {len(x[0])}:
        columns = [_column(column) for column in zip(*x, strict=True)]
        return None if any(c is None for c in columns) else {ROWS: columns}
    column = _column(x)
    return None if column is None else {NUMBERS: column}


def _column(x: Sequence) -> Tensor | None:
    """Return numbers of one type as a tensor that gives them back bit for bit; None if they are not of one."""
    dtype = {(float,): np.float64, (int,): np.int64}.get(tuple(set(map(type, x))))
    try:
        return None if dtype is None else torch.from_numpy(np.array(x, dtype=dtype))
    except OverflowError:
        return None


def decoded(x: Any, device: torch.device | None = None) -> Any:
    """Return what `plain` was given; tensors that were not on the CPU go to `device`."""
    if isinstance(x, dict):
        if len(x) == 1 and (tag := next(iter(x))) in DECODERS:
            return DECODERS[tag](x[tag], device)
        return type(x)((k, decoded(v, device)) for k, v in x.items()) if not isinstance(x, Counter) else x
    if type(x) in (list, tuple):
        return type(x)(decoded(v, device) for v in x)
    return x


DECODERS: dict[str, Callable[[Any, Any], Any]] = {
    ELSEWHERE: lambda x, device: x.to(device),
    ARRAY: lambda x, device: x.numpy().copy(),
    ARRAYS: lambda x, device: [np.array(a) for a in x.numpy()],
    ROWS: lambda x, device: list(zip(*(c.tolist() for c in x), strict=True)),
    NUMBERS: lambda x, device: x.tolist(),
}


# The file -------------------------------------------------------------------------------------------------------


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is there whole or not at all: a temporary one beside it, fsync, rename, fsync of the folder."""
    waiting = path.with_name(f".{path.name}.tmp")
    try:
        with open(waiting, "wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(waiting, path)
    except BaseException as cause:
        with contextlib.suppress(OSError):
            waiting.unlink()
        if isinstance(cause, OSError | RuntimeError):
            _refuse(f"be written to {path}", f"{cause}", "the file system refused it", "Choose another path.", cause)
        raise
    with contextlib.suppress(OSError):  # a folder cannot be opened on every system
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Any) -> dict[str, Any]:
    r"""Read a file without executing anything; every byte of its values is checked.

    Raises:
        CheckpointError: There is no such file, it is damaged, holds other than plain values, or has another format.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as cause:
        _refuse(f"be read from {path}", f"{cause}", "it has to be a file", "Give the path of a checkpoint.", cause)
    try:
        damaged = zipfile.ZipFile(io.BytesIO(data)).testzip()
        content = None if damaged else torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as cause:
        _refuse(
            f"be read from {path}",
            f"{len(data)} bytes that are no checkpoint ({type(cause).__name__}: {str(cause)[:200]})",
            "the file is damaged, or it was not written by save or run",
            "Give a whole checkpoint, or write resume=False to start anew.",
            cause,
        )
    if damaged:
        _refuse(
            f"be read from {path}",
            f"a wrong checksum of its part {damaged!r}",
            "the file is damaged",
            "Give a whole checkpoint, or write resume=False to start anew.",
        )
    number = content.get("format") if isinstance(content, dict) else None
    if number != FORMAT or not set(KEYS) <= content.keys():
        _refuse(
            f"be read from {path}",
            f"format {number!r}",
            f"this version reads format {FORMAT}",
            "Read it with the version that wrote it, or write resume=False to start anew.",
        )
    return content


def _writable(path: Any) -> Path:
    """Return the path if a file can be there, so that a run does not fail at its first checkpoint."""
    try:
        path = Path(os.fspath(path)).absolute()
    except TypeError as cause:
        _refuse("be written", f"{path!r}", "a path is a string or a pathlib.Path", "Write checkpoint='run.pt'.", cause)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        got = "a folder" if path.is_dir() else f"the folder {path.parent}, which is missing or not writable"
        _refuse(f"be written to {path}", got, "it is a file in a folder that exists", "Make the folder first.")
    return path


def _refuse(act: str, got: str, because: str, fix: str, cause: BaseException | None = None) -> NoReturn:
    fail(CheckpointError, "checkpoint", act, got=got, because=because, fix=fix, cause=cause)
