"""Find out from its source whether a method computes with a mask or only passes it on."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from typing import Any

MAKERS = (
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "create_bidirectional_mask",
    "create_bidirectional_sliding_window_mask",
)
PADDING = ("apply_mask_to_padding_states",)  # takes the caller's (B, T) mask; mixers without attention get that one


@functools.cache
def computes(f: types.FunctionType, created: bool = False, added: bool = False) -> bool:
    """Return whether f computes with one of its arguments whose name contains 'mask'; created: with a mask that
    transformers' functions create for it; added: in another way than by adding it. A method without source is assumed
    to."""
    root = tree(f)
    if root is None:
        return True
    parents = {child: node for node in ast.walk(root) for child in ast.iter_child_nodes(node)}
    names = _created(root) if created else {a.arg for a in _arguments(root) if "mask" in a.arg}
    local = {n.id for n in ast.walk(root) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    local |= {a.arg for a in _arguments(root)}
    for node in ast.walk(root):  # from the outside in, so in about the order of the lines
        if isinstance(node, ast.Name) and node.id in names and isinstance(node.ctx, ast.Load):
            if not (added and _is_added(node, parents[node])) and not _passes_on(node, parents, local):
                return True
    return False


@functools.cache
def called_before(f: types.FunctionType, makers: frozenset[str]) -> frozenset[str]:
    """Return the children that a method calls only before it creates a mask, so they get the caller's mask.

    makers: names of methods that create one.
    """
    root = tree(f)
    places: dict[str, list[int]] = {}
    created: list[int] = []
    nodes: list[Any] = list(ast.walk(root)) if root else []
    for node in nodes:
        called: Any = node.func if isinstance(node, ast.Call) else None
        own = isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "self"
        if (isinstance(called, ast.Name) and called.id in MAKERS) or (own and called.attr in makers):
            created.append(node.lineno)
        elif own:
            places.setdefault(called.attr, []).append(node.end_lineno)
    loops: list[Any] = [n for n in nodes if isinstance(n, (ast.For, ast.While))]
    if not created or any(loop.lineno <= line <= loop.end_lineno for loop in loops for line in created):
        return frozenset()
    return frozenset(name for name, lines in places.items() if max(lines) < min(created))


def _is_added(node: ast.Name, parent: Any) -> bool:
    return isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Add) and node is parent.right


def tree(f: types.FunctionType) -> Any:
    """Return the syntax tree of a method, or None if it has no source."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(f))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None


def _arguments(tree: Any) -> list[ast.arg]:
    return [*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs]


def _created(tree: Any) -> set[str]:
    """Return the variables that hold what MAKERS return."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(
            isinstance(n, ast.Name) and n.id in MAKERS for n in ast.walk(node.value)
        ):
            names |= {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return names


def _passes_on(node: Any, parents: dict[Any, Any], local: set[str]) -> bool:
    """Return whether a mask is only compared with None, stored, or given to a module or to a local function here."""
    parent = parents.get(node)
    if isinstance(parent, ast.keyword):
        parent = parents[parent]
    if isinstance(parent, ast.Compare):
        return all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)
    if isinstance(parent, ast.Attribute):  # of a dict of masks
        return parent.attr == "get"
    if isinstance(parent, ast.Subscript):
        plain = node is parent.value and not any(isinstance(n, (ast.Slice, ast.Tuple)) for n in ast.walk(parent.slice))
        return plain and _passes_on(parent, parents, local)
    if isinstance(parent, ast.Call):
        called = parent.func
        if isinstance(called, ast.Name):
            known = called.id.startswith("create_") or called.id in (*PADDING, "isinstance", "dict")
            return called.id in local or known
        root: Any = called
        while isinstance(root, (ast.Attribute, ast.Subscript)):
            root = root.value
        return isinstance(root, ast.Name) and root.id in local
    return isinstance(parent, (ast.Assign, ast.Dict, ast.Tuple, ast.Return, ast.IfExp, ast.BoolOp, ast.If, ast.UnaryOp))
