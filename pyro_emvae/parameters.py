r"""Who owns which parameter and buffer, found by autograd at fixed latent values; functional substitution.

With $q_\phi$ and $p_\theta$: what moves log q or a drawn value is phi (block ``"guide"``); what moves log p at fixed
values is theta (``"model"``). A name's place in a trace says nothing: modules are registered on both sides, and a guide
made of handlers has its parameters in the model's trace.
"""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import transform_to

from ._checks import BlockError, DegenerateError, ModelError, fail, nearest
from ._pyro import Messenger, constraint_of, leaf_of
from .particles import Particles, draw, quiet

__all__ = ["Buffer", "Parameters", "Row", "assign", "capture", "discover", "substitute"]

GUIDE, MODEL, SHARED, UNUSED = "guide", "model", "shared", "unused"
SIDES = {GUIDE: GUIDE, MODEL: MODEL}


@dataclass(frozen=True)
class Row:
    """One parameter: name, unconstrained leaf, block, and why it is there."""

    name: str
    leaf: Tensor = field(repr=False)
    block: str
    why: str
    constraint: Any = field(default=None, repr=False)

    @property
    def value(self) -> Tensor:
        """The constrained value, attached to the leaf."""
        return _constrain(self.constraint, self.leaf)


@dataclass(frozen=True)
class Buffer:
    """One buffer: the module that holds it, its key there, its block, and whether a run in training mode moves it."""

    module: nn.Module = field(repr=False)
    key: str
    block: str
    moves: bool = True

    @property
    def tensor(self) -> Tensor:
        return self.module._buffers[self.key]


@dataclass(frozen=True)
class Parameters:
    """All parameters and buffers of a pair of model and guide, by block.

    ``num_data`` is the full size of the largest plate with an observed site, 1 without plates; ``subsampled`` is
    whether a plate held a part of its data. ``sides`` says of each block whether it is part of phi (``"guide"``) or of
    theta (``"model"``). ``moving`` are, by guide site, the names of the parameters that move its density or its draw at
    fixed values of the other sites.
    """

    rows: tuple[Row, ...]
    buffers: tuple[Buffer, ...] = ()
    owners: Mapping[str, tuple[tuple[nn.Module, str], ...]] = field(default_factory=dict, repr=False)
    modules: tuple[nn.Module, ...] = field(default=(), repr=False)
    stored: frozenset[str] = field(default=frozenset(), repr=False)
    sites: Mapping[str, str] = field(default_factory=dict, repr=False)
    num_data: int = 1
    subsampled: bool = False
    sides: Mapping[str, str] = field(default_factory=lambda: SIDES, repr=False)
    moving: Mapping[str, frozenset[str]] = field(default_factory=dict, repr=False)

    @property
    def theta(self) -> tuple[str, ...]:
        """The blocks of the model's side."""
        return tuple(block for block, side in self.sides.items() if side == MODEL)

    def leaves(self, *blocks: str) -> dict[str, Tensor]:
        """Return the unconstrained leaves of the given blocks (all in use by default), by name."""
        return {r.name: r.leaf for r in self.rows if (r.block in blocks if blocks else r.block != UNUSED)}

    def block_of(self, name: str) -> str:
        """Return the block of a parameter."""
        for row in self.rows:
            if row.name == name:
                return row.block
        fail(
            BlockError,
            "Parameters",
            f"find {name!r}",
            got="an unknown parameter",
            because="neither model nor guide used it",
            fix=nearest(name, [r.name for r in self.rows]),
        )

    def moving_buffers(self, *, outside: tuple[str, ...] = ()) -> list[Tensor]:
        """Return the buffers that a run in training mode moves, less those of the blocks `outside`."""
        return [b.tensor for b in self.buffers if b.moves and b.block not in outside]

    def is_current(self) -> bool:
        """Whether the store and the modules still hold these leaves: not after the store was cleared or loaded."""
        in_store = all(leaf_of(row.name) is row.leaf for row in self.rows if row.name in self.stored)
        return in_store and all(named.get(key) is leaf for named, key, leaf in self._places)

    def knows(self, leaves: Iterable[Tensor]) -> bool:
        """Whether all these leaves are here: not so after a run that met a parameter for the first time."""
        return self._ids.issuperset(map(id, leaves))

    @cached_property
    def _ids(self) -> set[int]:
        return {id(row.leaf) for row in self.rows}

    @cached_property
    def _places(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Where modules hold the leaves: the module's dict of parameters, the key there, the leaf."""
        return [(m._parameters, key, row.leaf) for row in self.rows for m, key in self.owners.get(row.name, ())]

    def constrained(self) -> dict[str, Tensor]:
        """Return every parameter's constrained value, detached, by name."""
        return {row.name: row.value.detach().clone() for row in self.rows}

    def __str__(self) -> str:
        width = max([len(r.name) for r in self.rows] + [9])
        lines = [f"{'parameter':<{width}}  {'shape':<12}  block   why"]
        lines += [f"{r.name:<{width}}  {list(r.leaf.shape)!s:<12}  {r.block:<6}  {r.why}" for r in self.rows]
        return "\n".join(lines)


# Discovery ----------------------------------------------------------------------------------------------------------


def materialize(model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Run both once, so that every parameter exists; generator and buffers are as before unless some were drawn."""
    before = set(pyro.get_param_store().keys())
    with quiet(), torch.no_grad():
        draw(model, guide, args, kwargs)
        after = torch.get_rng_state()
    if set(pyro.get_param_store().keys()) == before:
        return
    with quiet(), torch.no_grad():
        draw(model, guide, args, kwargs)
        again = torch.get_rng_state()
    if not torch.equal(after, again):
        torch.set_rng_state(after)


def discover(
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    blocks: Any = None,
    sides: Mapping[str, str] = SIDES,
) -> Parameters:
    r"""Find every parameter and buffer of model and guide and the block that owns it.

    Args:
        model, guide: Pyro callables.
        args, kwargs: Data for one quiet run.
        blocks: None or ``"model/guide"``: by what each moves; ``"local/global"``: guide parameters of latents in the
            data's plates are ``"guide"``, all else ``"model"``; a mapping from name or regular expression to block (a
            name goes before a pattern, the first pattern that fits before the others); a regular expression of the
            guide's names; or a callable of name and leaf.
        sides: The blocks that there are, and the side of each.

    Returns:
        The blocks. A parameter that moves both is ``"shared"``, one that moves neither ``"unused"``.

    Raises:
        BlockError: If `blocks` cannot be read, or names a parameter or block that does not exist.
    """
    kwargs = kwargs or {}
    materialize(model, guide, args, kwargs)
    try:
        particles, spy = _probe(model, guide, args, kwargs, train=True)
    except Exception:  # such as batch norm on a single row, which works in eval mode only
        particles, spy = _probe(model, guide, args, kwargs, train=None)
    named = _named_leaves(model, guide, particles)
    rows = _classify(named, particles)
    if blocks is not None and blocks != "model/guide":
        rows = _override(rows, particles, blocks, sides)
    owners = _owners(model, guide, spy, rows)
    stored = frozenset(r.name for r in rows if leaf_of(r.name) is r.leaf)
    sites = dict.fromkeys(particles.guide, "latent") | dict.fromkeys(particles.observed, "observed")
    frames = [frame for site in particles.observed.values() for frame in site.frames]
    num_data = max([frame.full_size or frame.size for frame in frames], default=1)
    subsampled = any(frame.full_size not in (None, frame.size) for frame in frames)
    buffers = tuple(_buffers(spy, rows, sides))
    called, moving = tuple(spy.called), _moving(rows, particles)
    return Parameters(tuple(rows), buffers, owners, called, stored, sites, num_data, subsampled, sides, moving)


def _probe(model, guide, args, kwargs, train: bool | None) -> tuple[Particles, _Spy]:
    spy = _Spy()
    with quiet(train=train, validate=False), torch.enable_grad(), spy:
        particles = draw(spy.side(model, MODEL), spy.side(guide, GUIDE), args, kwargs, treat=lambda msg: "probe")
        spy.note_changes()
    return particles, spy


class _Capture(Messenger):
    """Note every parameter's leaf, and set its ``.grad`` aside before the run adds to it."""

    def __init__(self, leaves: Iterable[Tensor]) -> None:
        super().__init__()
        self.met: dict[str, Tensor] = {}
        self.saved: dict[int, tuple[Tensor, Tensor | None]] = {}
        for leaf in leaves:
            self._set_aside(leaf)

    def _set_aside(self, leaf: Tensor) -> None:
        if id(leaf) not in self.saved and leaf.is_leaf:
            self.saved[id(leaf)] = (leaf, leaf.grad)
            leaf.grad = None

    def _pyro_post_param(self, msg: dict) -> None:
        if msg["value"] is not None:
            leaf = msg["value"].unconstrained()
            self.met[msg["name"]] = leaf
            self._set_aside(leaf)


def capture(fn: Callable[[], Any], leaves: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """Call `fn`, which runs a backward, and put every ``.grad`` back as it was.

    Args:
        fn: Called without arguments.
        leaves: Further leaves, such as modules' parameters that Pyro was not told of.

    Returns:
        What it returned, all trainable leaves by name, and the gradients that it left, by name.
    """
    run = _Capture(leaves.values())
    try:
        with run:
            result = fn()
        known = {id(leaf) for leaf in run.met.values()}
        met = run.met | {n: p for n, p in leaves.items() if id(p) not in known}
        met = {n: p for n, p in met.items() if p.requires_grad and p.is_leaf}
        return result, met, {n: p.grad for n, p in met.items() if p.grad is not None}
    finally:
        for leaf, grad in run.saved.values():
            leaf.grad = grad


@contextlib.contextmanager
def keep_store() -> Iterator[None]:
    """Run code after which the parameter store holds the tensors that it held before, and no other.

    Some of Pyro's losses keep running averages there.
    """
    store = pyro.get_param_store()
    before = store.get_state()
    try:
        yield
    finally:
        after = store.get_state()["params"]
        for name in after.keys() - before["params"].keys():
            del store[name]
        if any(after.get(name) is not leaf for name, leaf in before["params"].items()):
            store.set_state(before)


@contextlib.contextmanager
def own_store() -> Iterator[None]:
    """Run code in a parameter store of its own, which is empty at first and gone at the end."""
    with pyro.get_param_store().scope():
        yield


def is_wrapped() -> bool:
    """Whether handlers of Pyro are at work around the caller."""
    return poutine.runtime.am_i_wrapped()


class _Statements(Messenger):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, traceback.StackSummary]] = []

    def _pyro_post_sample(self, msg: dict) -> None:
        scale = "" if isinstance(msg["scale"], Tensor) else f" with scale {msg['scale']}"
        self.seen.append((msg["name"] + scale, traceback.extract_stack()))


def sample_statements(fn: Callable[[], Any]) -> list[tuple[str, traceback.StackSummary]]:
    """Call `fn` and return the name, the scale if Python holds it, and the stack of every sample statement in it."""
    with _Statements() as statements:
        fn()
    return statements.seen


def module_leaves(*functions: Callable) -> dict[str, Tensor]:
    """Return the trainable parameters of those functions that are modules, by their names in the module."""
    found: dict[str, Tensor] = {}
    known: set[int] = set()
    for function in functions:
        if isinstance(function, nn.Module):
            for name, leaf in function.named_parameters():
                if leaf.requires_grad and id(leaf) not in known:
                    known.add(id(leaf))
                    found[name if name not in found else f"{name}'"] = leaf
    return found


def distinct(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep the first name of every tensor: a parameter that two modules share is one parameter."""
    first: dict[int, str] = {}
    for name, leaf in named.items():
        first.setdefault(id(leaf), name)
    return {name: named[name] for name in first.values()}


def _named_leaves(model: Callable, guide: Callable, particles: Particles) -> dict[str, Tensor]:
    named = distinct(particles.params[GUIDE] | particles.params[MODEL])
    known = {id(leaf) for leaf in named.values()}
    for name, leaf in module_leaves(guide, model).items():
        if id(leaf) not in known:
            known.add(id(leaf))
            named[name if name not in named else f"{name}'"] = leaf
    return {name: leaf for name, leaf in named.items() if leaf.requires_grad}


def nodes_of(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Yield every node of the autograd graph of some tensors, once."""
    seen: set[Any] = set()  # so that none is freed and its id used again
    stack = [tensor.grad_fn for tensor in tensors]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend([parent for parent, _ in node.next_functions])


def reach(tensors: Iterable[Tensor]) -> set[int]:
    """Return the ids of all leaves that a gradient of `tensors` reaches."""
    tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.requires_grad]
    leaves = {id(tensor) for tensor in tensors if tensor.grad_fn is None}
    variables = (getattr(node, "variable", None) for node in nodes_of(tensors))
    return leaves | {id(variable) for variable in variables if variable is not None}


@torch.enable_grad()
def _classify(named: Mapping[str, Tensor], particles: Particles) -> list[Row]:
    cuts = [cut for run in particles.cuts for cut in run]
    moves_q = reach([s.scaled for s in particles.guide.values()] + [drawn for drawn, _ in cuts])
    moves_p = reach(s.scaled for s in particles.model.values())
    points = _point_masses(particles, cuts)
    rows = []
    for name, leaf in named.items():
        in_q, in_p, point = id(leaf) in moves_q, id(leaf) in moves_p, points.get(id(leaf))
        if point is not None:
            block, why = MODEL, f"point mass of the global latent {point!r}"
        elif in_q and in_p:
            block, why = SHARED, "moves log q and, at fixed latents, log p"
        elif in_q:
            block, why = GUIDE, "moves log q or a drawn value"
        elif in_p:
            block, why = MODEL, "moves log p at fixed latents"
        else:
            block, why = UNUSED, "moves neither log q nor log p"
        constraint = constraint_of(name) or particles.constraints.get(name)
        rows.append(Row(name, leaf, block, why, constraint))
    return rows


@torch.enable_grad()
def _moving(rows: list[Row], particles: Particles) -> dict[str, frozenset[str]]:
    drawn = {id(leaf): value for run in particles.cuts for value, leaf in run}
    names = {id(row.leaf): row.name for row in rows}
    return {
        name: frozenset(names[i] for i in reach([site.scaled, drawn.get(id(site.value))]) if i in names)
        for name, site in particles.guide.items()
    }


def local_plates(particles: Particles) -> set[str]:
    """Return the names of the plates in which something is observed."""
    return {frame.name for site in particles.observed.values() for frame in site.frames}


def _point_masses(particles: Particles, cuts: list[tuple[Tensor, Tensor]]) -> dict[int, str]:
    """Return the leaves that are the value of a latent outside every local plate, with its name."""
    local, upstream = local_plates(particles), {id(leaf) for _, leaf in cuts}
    names = {id(site.value): site for site in particles.guide.values()}
    found: dict[int, str] = {}
    for drawn, leaf in cuts:
        site = names[id(leaf)]
        reached = reach([drawn])
        is_point = type(site.fn).__name__ == "Delta" or type(getattr(site.fn, "base_dist", None)).__name__ == "Delta"
        if is_point and not reached & upstream and not {f.name for f in site.frames} & local:
            found.update({i: site.name for i in reached})
    return found


@torch.enable_grad()
def _override(rows: list[Row], particles: Particles, blocks: Any, sides: Mapping[str, str]) -> list[Row]:
    if blocks == "local/global":
        local = local_plates(particles)
        cuts = {id(leaf): drawn for run in particles.cuts for drawn, leaf in run}
        sites = [s for s in particles.guide.values() if {f.name for f in s.frames} & local]
        inside = reach([t for s in sites for t in (s.scaled, cuts.get(id(s.value)))])
        choose = {r.name: GUIDE if id(r.leaf) in inside else MODEL for r in rows if r.block != UNUSED}
        why = "local latents are the guide's, all else is global"
    elif isinstance(blocks, str):
        choose = {r.name: GUIDE if re.search(blocks, r.name) else MODEL for r in rows if r.block != UNUSED}
        why = f"blocks={blocks!r}"
    elif isinstance(blocks, Mapping):
        choose, why = _from_mapping(rows, blocks), "named in blocks="
    elif callable(blocks):
        choose, why = {r.name: blocks(r.name, r.leaf) for r in rows}, "chosen by blocks="
    else:
        fail(
            BlockError,
            "EM",
            "assign parameters to blocks",
            got=f"blocks={blocks!r}",
            because="blocks are given by a name, a mapping, a regular expression or a callable",
            fix='Write blocks="local/global", or blocks={"encoder.*": "guide"}.',
        )
    for name, block in choose.items():
        if block not in (*sides, UNUSED, SHARED):
            known = " and ".join(map(repr, sides)) if len(sides) == 2 else ", ".join(map(repr, sides))
            fail(
                BlockError,
                "EM",
                f"put {name!r} into a block",
                got=repr(block),
                because=f"there are the blocks {known}, and 'unused' for what stays as it is",
                fix=f'Write blocks={{"{name}": "guide"}}, or give the block a phase: EM(..., steps=[..., ("decoder", '
                "steps.Gradient())]).",
            )
    return [replace(r, block=choose[r.name], why=why) if r.name in choose else r for r in rows]


def _from_mapping(rows: list[Row], blocks: Mapping[str, str]) -> dict[str, str]:
    """Read a mapping: a parameter's own name goes before any pattern, the first pattern that fits before the rest."""
    names, chosen = {row.name for row in rows}, {}
    for pattern, block in sorted(blocks.items(), key=lambda item: item[0] not in names):
        hits = [r.name for r in rows if r.name == pattern] or [r.name for r in rows if re.fullmatch(pattern, r.name)]
        if not hits:
            fail(
                BlockError,
                "EM",
                f"put {pattern!r} into a block",
                got="no such parameter",
                because="a key of blocks= is a parameter's name or a regular expression",
                fix=nearest(pattern, [r.name for r in rows]),
            )
        chosen = dict.fromkeys(hits, block) | chosen
    return chosen


class _Spy:
    """Which modules are called in which run, by a forward hook."""

    def __init__(self) -> None:
        self.called: dict[nn.Module, set[str]] = {}
        self.before: dict[nn.Module, dict[str, Tensor]] = {}
        self.moved: set[tuple[nn.Module, str]] = set()
        self.current = GUIDE

    def side(self, function: Callable, name: str) -> Callable:
        if isinstance(poutine.unwrap(function), Messenger):
            return function

        def run(*args: Any, **kwargs: Any) -> Any:
            self.current = name
            return function(*args, **kwargs)

        return run

    def __enter__(self) -> _Spy:
        self.handle = nn.modules.module.register_module_forward_pre_hook(self._note)
        return self

    def _note(self, module: nn.Module, _: Any) -> None:
        self.called.setdefault(module, set()).add(self.current)
        if module not in self.before:
            self.before[module] = {n: b.clone() for n, b in module._buffers.items() if b is not None}

    def note_changes(self) -> None:
        for module, buffers in self.before.items():
            self.moved |= {(module, n) for n, old in buffers.items() if not torch.equal(old, module._buffers[n])}

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


def _buffers(spy: _Spy, rows: list[Row], sides: Mapping[str, str]) -> list[Buffer]:
    block_of = {id(r.leaf): r.block for r in rows}
    found = []
    for module, called in spy.called.items():
        own = {block_of.get(id(p)) for p in module._parameters.values()} & {*sides, SHARED}
        options = own or called
        if len(options) > 1 and all(sides.get(block) == MODEL for block in options):
            options = {MODEL}
        block = next(iter(options)) if len(options) == 1 else SHARED
        keys = [k for k, v in module._buffers.items() if v is not None]
        found += [Buffer(module, k, block, (module, k) in spy.moved) for k in keys]
    return found


def _owners(model: Callable, guide: Callable, spy: _Spy, rows: list[Row]) -> dict[str, tuple]:
    roots = [f for f in (model, guide) if isinstance(f, nn.Module)] + list(spy.called)
    modules = {id(m): m for root in roots for m in root.modules()}
    places: dict[int, list] = {}
    for module in modules.values():
        for key, leaf in module._parameters.items():
            if leaf is not None and not key.endswith("_unconstrained"):
                places.setdefault(id(leaf), []).append((module, key))
    return {r.name: tuple(places.get(id(r.leaf), ())) for r in rows}


# Values -------------------------------------------------------------------------------------------------------------


def _constrain(constraint: Any, unconstrained: Tensor) -> Tensor:
    return unconstrained if constraint is None else transform_to(constraint)(unconstrained)


def assign(parameters: Parameters, values: Mapping[str, Tensor]) -> None:
    r"""Write constrained values into the parameters, in place, so that optimizers keep their state.

    All values are checked before the first is written.

    Raises:
        ModelError: An unknown name, a wrong shape, or a value outside the constraint.
        DegenerateError: A value at the boundary of its constraint, such as a scale of zero.
    """
    rows = {row.name: row for row in parameters.rows}
    new: dict[str, Tensor] = {}
    for name, value in values.items():
        if name not in rows:
            fail(
                ModelError,
                "assign",
                f"write parameter {name!r}",
                got="an unknown name",
                because="only parameters of model and guide can be written",
                fix=nearest(name, rows),
            )
        try:
            new[name] = _unconstrain(rows[name], _as_real(name, value))
        except DegenerateError as error:
            error.values, error.parameter = dict(values), name
            raise
    with torch.no_grad():
        for name, value in new.items():
            rows[name].leaf.copy_(value)


def _as_real(name: str, value: Any) -> Tensor:
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.is_complex():
        fail(
            ModelError,
            "assign",
            f"write parameter {name!r}",
            got=repr(value) if found is None else f"{found.dtype}",
            because="a parameter is a real tensor",
            fix="Let the update return tensors of the parameters' shapes.",
        )
    return found


def _unconstrain(row: Row, value: Tensor) -> Tensor:
    name, leaf, constraint = row.name, row.leaf, row.constraint
    value = value.detach().to(leaf)
    if not bool(torch.isfinite(value).all()):
        fail(
            ModelError,
            "assign",
            f"write parameter {name!r}",
            got=f"values that are not finite, such as {value[~torch.isfinite(value)][0].item()}",
            because="a parameter is a number",
            fix="Guard the update against division by an empty component.",
        )
    if constraint is not None:
        holds = torch.as_tensor(constraint.check(value))
        if not bool(holds.all()):
            edge = _is_boundary(constraint, value)
            fail(
                DegenerateError if edge else ModelError,
                "assign",
                f"write parameter {name!r}",
                got=f"{_first(~holds, value)}, {'at the boundary of' if edge else 'outside'} {constraint}",
                because="parameters stay inside their constraint",
                fix="Start elsewhere, or bound the update: a component on a single datum has a variance of zero."
                if edge
                else "Let the update return values inside the constraint.",
            )
        value = transform_to(constraint).inv(value)  # as the parameter store does
    edge = value.shape == leaf.shape and not bool(torch.isfinite(value).all())
    if value.shape != leaf.shape or edge:
        fail(
            DegenerateError if edge else ModelError,
            "assign",
            f"write parameter {name!r}",
            got=f"a value at the boundary of {constraint}" if edge else f"shape {tuple(value.shape)}",
            because=f"the unconstrained parameter has shape {tuple(leaf.shape)} and is finite",
            fix="Return a value of the parameter's shape, strictly inside its constraint.",
        )
    return value


def _first(bad: Tensor, value: Tensor) -> str:
    """Return the first of the values that are bad, and its place."""
    place = tuple(bad.nonzero()[0].tolist())
    text = str(value[place].tolist())
    return (text if len(text) < 80 else text[:77] + "...") + (f" at {list(place)}" if place else "")


def _is_boundary(constraint: Any, value: Tensor) -> bool:
    """Whether a value outside an open constraint lies in its closure, such as a scale of zero."""
    lower, upper = getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)
    if lower is not None or upper is not None:
        above = True if lower is None else bool((value >= lower).all())
        return above and (True if upper is None else bool((value <= upper).all()))
    if value.dim() < 2:
        return False
    if str(constraint).endswith("LowerCholesky()"):
        return torch.equal(value, value.tril()) and bool((value.diagonal(dim1=-2, dim2=-1) >= 0).all())
    if str(constraint) == "PositiveDefinite()" and torch.equal(value, value.mT):
        eigenvalues = torch.linalg.eigvalsh(value)
        return bool((eigenvalues >= -1e-6 * eigenvalues[..., -1:]).all())
    return False


class _Substitute(Messenger):
    def __init__(self, values: Mapping[str, Tensor], constraints: Mapping[str, Any]) -> None:
        super().__init__()
        self.values, self.constraints = values, constraints

    def _pyro_param(self, msg: dict) -> None:
        tensor = self.values.get(msg["name"])
        if tensor is not None and not msg["done"]:
            known = self.constraints.get(msg["name"]) or constraint_of(msg["name"])
            value = _constrain(known or msg["kwargs"].get("constraint"), tensor)
            value = value if value is not tensor else tensor.view_as(tensor)
            value.unconstrained = lambda: tensor
            msg["value"], msg["done"] = value, True


@contextlib.contextmanager
def substitute(parameters: Parameters, values: Mapping[str, Tensor]) -> Iterator[None]:
    r"""Run model and guide with other unconstrained tensors in place of their parameters; differentiable.

    Args:
        parameters: The blocks, from `discover`.
        values: Unconstrained tensors by name; the other parameters keep their leaves.

    ``pyro.param`` and ``PyroParam`` statements are answered by a handler; parameters of modules are exchanged in their
    modules. Both are undone at the end, also on error.
    """
    saved = []
    try:
        for name, tensor in values.items():
            for module, key in parameters.owners.get(name, ()):
                saved.append((module, key, module._parameters[key]))
                module._parameters[key] = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        in_store = {n: t for n, t in values.items() if not parameters.owners.get(n) or leaf_of(n) is not None}
        with _Substitute(in_store, {row.name: row.constraint for row in parameters.rows}):
            yield
    finally:
        for module, key, leaf in reversed(saved):
            module._parameters[key] = leaf
