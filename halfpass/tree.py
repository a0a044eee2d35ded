"""Inputs and targets of a batch: one tensor, or nested tuples and dicts of tensors. Samples are first in each."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from halfpass.errors import InputError

Tree: TypeAlias = Tensor | tuple[Any, ...] | dict[str, Any]  # of trees again


def leaves(tree: Tree) -> list[Tensor]:
    """Its tensors, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree
    return [leaf for part in parts for leaf in leaves(part)]


def map_leaves(function: Callable[[Tensor], Any], tree: Tree) -> Any:
    """The same nesting with `function` of each tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_leaves(function, part) for key, part in tree.items()}
    return tuple(map_leaves(function, part) for part in tree)


def sample_count(tree: Tree) -> int:
    """How many samples it holds: what its first tensor says."""
    return len(leaves(tree)[0])


def flatten(tree: Tree, prefix: str = "") -> dict[str, Tensor]:
    """Its tensors by name: "" for one alone, else keys and `#0`, `#1` … of tuples, joined by slashes.

    `{"a": x, "b": (y, z)}` → `{"a": x, "b/#0": y, "b/#1": z}`.
    """
    if isinstance(tree, Tensor):
        return {prefix: tree}
    parts = tree.items() if isinstance(tree, dict) else ((f"#{i}", part) for i, part in enumerate(tree))
    slash = f"{prefix}/" if prefix else ""
    return {name: leaf for key, part in parts for name, leaf in flatten(part, f"{slash}{key}").items()}


def unflatten(named: Mapping[str, Any]) -> Any:
    """The inverse of `flatten`. Raises InputError for names that are no tree."""
    if set(named) == {""}:
        return named[""]
    groups: dict[str, dict[str, Any]] = {}
    for name, leaf in named.items():
        key, _, rest = name.partition("/")
        if not key:
            raise InputError("named tensors", "names of a tree", repr(list(named)), "run the same halfpass")
        groups.setdefault(key, {})[rest] = leaf
    if list(groups) == [f"#{i}" for i in range(len(groups))]:
        return tuple(map(unflatten, groups.values()))
    return {key: unflatten(group) for key, group in groups.items()}


def call(module: nn.Module | Callable[..., Any], inputs: Tree) -> Any:
    """`module(x)`, `module(*inputs)` of a tuple, `module(**inputs)` of a dict."""
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)
