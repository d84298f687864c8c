"""Paths in parameter trees, and layers replaced along them."""

from collections.abc import Callable
from typing import Any

import jax

from fclayers.forms import Layer, is_form

Where = Callable[[str], bool]


def tree_key(entry: Any) -> Any:
    """The key, index or name that one step of a path in a pytree holds."""
    match entry:
        case jax.tree_util.SequenceKey(key) | jax.tree_util.DictKey(key):
            return key
        case jax.tree_util.GetAttrKey(name):
            return name
    return str(entry)


def path_name(path: Any) -> str:
    """A path with dots, such as `classifier.0`; the root's is empty."""
    return ".".join(str(tree_key(step)) for step in path)


def replace_layers(
    function: str,
    params: Any,
    where: Where | None,
    replace: Callable[[str, Layer], Any],
    *,
    among: type | tuple[type, ...] = (),
) -> Any:
    """Calls `replace(name, layer)` on the layers of a tree, in order, that `where` chooses.

    `among` leaves only layers of these forms to choose from. `name` is for messages.
    """
    if where is not None and not callable(where):
        raise TypeError(
            f"{function}: where must be a function of a layer's path, got {type(where).__name__}"
        )
    chosen = 0

    def visit(path: Any, node: Any) -> Any:
        nonlocal chosen
        name = path_name(path)
        if not is_form(node) or (among and not isinstance(node, among)):
            return node
        if where is not None and not where(name):
            return node
        chosen += 1
        return replace(f"layer {name!r}" if name else "the layer", node)

    replaced = jax.tree.map_with_path(visit, params, is_leaf=is_form)
    if not chosen:
        layers = jax.tree.leaves_with_path(params, is_leaf=is_form)
        found = [f"{path_name(path)!r}" for path, node in layers if is_form(node)]
        raise ValueError(
            f"{function}: found no layer to replace; the layers are {', '.join(found) or 'none'}"
        )
    return replaced
