r"""Fewer operations for the same numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from .trace import Traced

__all__ = ["is_random", "mutates", "needed_for", "simplified"]


def is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def simplified(traced: Traced) -> Traced:
    """Fold constants and drop dead operations; random and in-place ones stay, so that the generator's stream does.

    Only constants that the run itself made (``torch.tensor(2.0)``) are folded: a tensor that was there before may be
    changed in place later, as parameters of the other block and annealing factors are.
    """
    graph, root = traced
    touched: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "call_function" and (mutates(node) or node in touched):
            touched.update(node.all_input_nodes)
    constants: dict[fx.Node, Tensor] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr" and node not in touched and all(_is_lift(user) for user in node.users):
            constants[node] = getattr(root, node.target)
        elif _foldable(node, touched) and all(n in constants for n in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: constants[n])
            with torch.no_grad():
                value = node.target(*args, **kwargs)
            if isinstance(value, Tensor):
                constants[node] = value
    for i, (node, value) in enumerate(constants.items()):
        if node.op == "call_function" and any(user not in constants for user in node.users):
            root.register_buffer(f"_folded{i}", value)
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(f"_folded{i}"))
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output") or node.users:
            continue
        if node.op == "get_attr" or not (mutates(node) or is_random(node)):
            graph.erase_node(node)
    return traced


def needed_for(nodes: list[fx.Node], outputs: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the nodes that `outputs` are made from, all inputs, and all that write in place, in their order."""
    needed = set(outputs)
    for node in reversed(nodes):
        if node in needed or node.op == "placeholder" or mutates(node):
            needed.add(node)
            needed.update(node.all_input_nodes)
    return [node for node in nodes if node in needed]


def _is_lift(node: fx.Node) -> bool:
    return node.target in (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)


def _foldable(node: fx.Node, touched: set[fx.Node]) -> bool:
    if node.op != "call_function" or node in touched or mutates(node) or is_random(node):
        return False
    return isinstance(node.target, torch._ops.OpOverload) and "empty" not in node.target.__name__
