r"""Fewer operations for the same numbers."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from .trace import Place, Traced, writing

__all__ = ["is_random", "mutates", "needed_for", "simplified"]

aten = torch.ops.aten
LARGEST = 2**16  # bytes of a constant that would otherwise be made anew each time
FILLED = {getattr(aten, name).default for name in ("ones_like", "zeros_like", "new_ones", "new_zeros")}
JOINED = {aten.view.default: aten.sum.dim_IntList, aten.expand.default: aten.expand.default}
PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar}


def is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def mutates(node: fx.Node) -> bool:
    return bool(writing(node.target))


def simplified(traced: Traced) -> Traced:
    r"""Make each tensor once, fold constants, and drop dead operations; all numbers are the same to the bit.

    A tensor that lies where an earlier one does (`Place`: ``detach``, ``t`` of ``t``, a view of the same shape) is that
    one. An operation on the same arguments as an earlier one has its result, and so has one that changes no bit
    (``x * 1``), unless any of these tensors is written in place in between, or the result at any time. Random
    operations and those that write stay, so that generators and buffers move as before. Results of the graph stay
    tensors of their own: none becomes another one, an input or a constant, since whoever gets them may write into them.

    Only constants that the run itself made (``torch.tensor(2.0)``) are folded: a tensor that was there before may be
    changed in place later, as parameters of the other block and annealing factors are.
    """
    graph, root = traced
    *nodes, output = graph.nodes
    values = _Values(nodes, output.all_input_nodes)
    for node in nodes:
        values.visit(node, root)
    _lead(output, values.equal)
    _drop(graph)
    _install(traced, values.constants)
    for node in graph.nodes:
        if not values.moved:
            _join(node)
    _drop(graph)
    return traced


class _Values:
    """What is known of the nodes of a graph, visited in their order.

    `last` says when a storage is written last, `leaving` are the storages of the results, `there` those of inputs and
    of tensors from outside, `shared` those of several of them, which is so by chance (an input may be a part of a
    tensor from outside, and another part the next time), `folded` those of constants. `under` says where tensors lie
    that took the place of those of a storage, so that a view of one is known for what it now is.
    """

    def __init__(self, nodes: list[fx.Node], outputs: Iterable[fx.Node]) -> None:
        self.order = {node: i for i, node in enumerate(nodes)}
        self.last = {s: i for node, i in self.order.items() for s in node.meta.get("writes", ())}
        self.leaving = {s for node in _with_parts(outputs) for s in _storages(node)}
        self.under: dict[int, set[int]] = {}
        self.folded: set[int] = set()
        roots = [s for node in nodes if node.op in ("placeholder", "get_attr") for s in _storages(node)]
        self.there = set(roots)
        self.shared = {s for s, number in Counter(roots).items() if number > 1}
        self.moved = any(node.meta.get("moved") for node in nodes)
        self.equal: dict[fx.Node, fx.Node] = {}
        self.constants: dict[fx.Node, Tensor] = {}
        self.ones: dict[fx.Node, bool] = {}
        self.places: dict[int, dict[Place, fx.Node]] = {}
        self.made: dict[Any, fx.Node] = {}

    def visit(self, node: fx.Node, root: nn.Module) -> None:
        """Find what a node is equal to: an earlier node, which takes its place, or a constant."""
        if node.op == "get_attr" and all(_is_lift(user) for user in node.users):
            self.constants[node] = getattr(root, node.target)
        for storage in node.meta.get("writes", ()):
            self.places.pop(storage, None)
        same = None if self.moved else self._same_place(node)
        if same is None and self._is_pure(node):
            same = self._made_before(node)
            if same is None:
                self._fold(node)
                same = self._number(node)
        if same is not None:
            self.equal[node] = same
            for storage in _storages(node):
                self.under.setdefault(storage, set()).update(self._lies(same))
            node.replace_all_uses_with(same, delete_user_cb=lambda user: user.op != "output")

    def _same_place(self, node: fx.Node) -> fx.Node | None:
        """Return the earlier node that lies where this one lies, if nothing was written there in between."""
        if not _is_tensor(node) or node.meta["places"][0].storage in self.shared:
            return None
        (place,) = node.meta["places"]
        earlier = self.places.setdefault(place.storage, {}).setdefault(place, node)
        if earlier is node or node.op != "call_function":
            return None
        return self.equal.get(earlier, earlier)

    def _is_pure(self, node: fx.Node) -> bool:
        """Whether a node is an operation whose result depends on its arguments alone, and is never written."""
        if node.op != "call_function" or is_random(node) or self._is_written(node):
            return False
        if node.target is operator.getitem:
            return True
        return isinstance(node.target, torch._ops.OpOverload) and "empty" not in node.target.__name__

    def _made_before(self, node: fx.Node) -> fx.Node | None:
        """Return the earlier node that has the numbers of this one in a memory of its own."""
        if self.moved or not all(map(_is_strided, [node, *node.all_input_nodes])):
            return None
        if getattr(node.target, "namespace", "aten") != "aten":
            return None
        key = node.target, repr((node.args, node.kwargs))
        found = self.made.setdefault(key, node)
        if found is not node:
            earlier = self.equal.get(found, found)
            if self._are_unwritten(node.all_input_nodes, found) and self._may_be(node, earlier):
                return earlier
            self.made[key] = node
        return self._unchanged(node)

    def _unchanged(self, node: fx.Node) -> fx.Node | None:
        """Return the argument of an operation that changes no bit of it."""
        x, since = self._kept(node), node
        if x is None and node.target is aten.neg.default and node.args[0].target is aten.neg.default:
            if self._is_written(node.args[0]):
                return None
            x, since = node.args[0].args[0], node.args[0]
        if not isinstance(x, fx.Node) or not _is_strided(x):
            return None
        alike = _form(x) == _form(node) and not x.meta["places"][0].dtype.is_complex
        return x if alike and self._are_unwritten([x], since) and self._may_be(node, x) else None

    def _kept(self, node: fx.Node) -> Any:
        """Return the factor beside a one, or what is raised to the first power."""
        if node.target in PRODUCTS or node.target in (aten.div.Tensor, aten.pow.Tensor_Scalar):
            x, y = node.args
            if self._is_one(y):
                return x
            if node.target in PRODUCTS and self._is_one(x):
                return y
        return None

    def _is_one(self, x: Any) -> bool:
        if not isinstance(x, fx.Node):
            return type(x) in (int, float) and x == 1
        if x in self.constants and x not in self.ones:
            self.ones[x] = bool((self.constants[x] == 1).all())
        return self.ones.get(x, False)

    def _fold(self, node: fx.Node) -> None:
        """Compute what depends on constants alone, or on the shape of its argument; results of the graph stay."""
        if getattr(node.target, "namespace", "") != "aten" or not self.leaving.isdisjoint(_storages(node)):
            return
        filled = node.target in FILLED and node.meta["bytes"] <= LARGEST and all(map(_is_strided, node.all_input_nodes))
        if filled or all(n in self.constants for n in node.all_input_nodes):
            find = _like if filled else self.constants.__getitem__
            args, kwargs = fx.map_arg((node.args, node.kwargs), find)
            with torch.no_grad():
                value = node.target(*args, **kwargs)
            if isinstance(value, Tensor):
                self.constants[node] = value
                self.folded |= _storages(node)

    def _number(self, node: fx.Node) -> fx.Node | None:
        """Return the earlier constant of the same number."""
        value = self.constants.get(node)
        if value is None or value.dim() or value.device.type != "cpu" or self.moved or not _is_strided(node):
            return None
        earlier = self.made.setdefault((value.dtype, repr(value.item())), node)
        return None if earlier is node else earlier

    def _is_written(self, node: fx.Node) -> bool:
        return any(s in self.last for s in _storages(node))

    def _are_unwritten(self, nodes: Iterable[fx.Node], since: fx.Node) -> bool:
        """Whether nothing is written any more from when `since` was made."""
        return all(self.last.get(s, -1) < self.order[since] for node in nodes for s in _storages(node))

    def _may_be(self, node: fx.Node, earlier: fx.Node) -> bool:
        """Whether a node may lie in the memory of an earlier one; a result of the graph keeps one that is its own."""
        if self.leaving.isdisjoint(self._lies(node)):
            return True
        if not (self.leaving | self.there | self.folded).isdisjoint(self._lies(earlier)):
            return False
        self.leaving.update(self._lies(earlier))
        return True

    def _lies(self, node: fx.Node) -> set[int]:
        """Return the storages in which a node may lie."""
        found, left = set(), [*_storages(node)]
        while left:
            storage = left.pop()
            if storage not in found:
                found.add(storage)
                left.extend(self.under.get(storage, ()))
        return found


def _with_parts(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return nodes, and of those that are sparse what they are made from."""
    found, left = set(), [*nodes]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left.extend(() if _is_strided(node) else node.all_input_nodes)
    return found


def _storages(node: fx.Node) -> set[int]:
    return {place.storage for place in node.meta["places"]}


def _is_tensor(node: fx.Node) -> bool:
    """Whether a node is one tensor, and not the several results of an operation."""
    return len(node.meta["places"]) == 1 and all(user.target is not operator.getitem for user in node.users)


def _form(node: fx.Node) -> tuple:
    """Return all of a tensor's place but the storage and where in it the tensor begins."""
    (place,) = node.meta["places"]
    return place[1:-1]


def _is_strided(node: fx.Node) -> bool:
    return all(place.offset >= 0 for place in node.meta["places"])


def _is_lift(node: fx.Node) -> bool:
    return node.target in (aten.lift_fresh.default, aten.lift_fresh_copy.default)


def _like(node: fx.Node) -> Tensor:
    (place,) = node.meta["places"]
    return torch.empty_strided(place.shape, place.stride, dtype=place.dtype, device=place.device)


def _install(traced: Traced, constants: dict[fx.Node, Tensor]) -> None:
    """Put constants in the place of the operations that made them."""
    graph, root = traced
    for i, (node, value) in enumerate(constants.items()):
        if node.op == "call_function" and any(user not in constants for user in node.users):
            root.register_buffer(f"_folded{i}", value)
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(f"_folded{i}"))


def _drop(graph: fx.Graph) -> None:
    """Drop operations whose results nobody uses."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        silent = node.op == "call_function" and not node.meta["places"]  # an assertion
        if node.op == "get_attr" or not (mutates(node) or is_random(node) or silent):
            graph.erase_node(node)


def _lead(output: fx.Node, equal: dict[fx.Node, fx.Node]) -> None:
    """Let the graph return earlier tensors for equal ones, where each result stays a tensor of its own."""
    (results,) = output.args
    taken, chosen = {node for node in results if node not in equal}, {}
    for node in dict.fromkeys(results):
        earlier = equal.get(node)
        if earlier is not None and earlier.op == "call_function" and earlier not in taken:
            taken.add(earlier)
            chosen[node] = earlier
    output.args = (tuple(chosen.get(node, node) for node in results),)


def _join(node: fx.Node) -> None:
    """Make one operation of two whose first result nobody else uses: a sum and its view, an expansion of another."""
    first = node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else node
    if first.target is not JOINED.get(node.target) or len(first.users) > 1:
        return
    shape = _form(node)[0]
    if node.target is aten.expand.default and 1 not in shape:
        node.args = (first.args[0], [*shape])
    elif node.target is aten.view.default and first.args[1] and first.args[2:] == (True,):
        whole = _form(first)[0]
        dims = {dim % len(whole) for dim in first.args[1]}
        if shape == tuple(size for dim, size in enumerate(whole) if dim not in dims):
            first.args = first.args[:2]
            node.replace_all_uses_with(first)


def needed_for(nodes: list[fx.Node], outputs: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the nodes that `outputs` are made from, all inputs, and all that write in place, in their order."""
    needed = set(outputs)
    for node in reversed(nodes):
        if node in needed or node.op == "placeholder" or mutates(node):
            needed.add(node)
            needed.update(node.all_input_nodes)
    return [node for node in nodes if node in needed]
