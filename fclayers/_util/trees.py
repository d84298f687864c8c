"""Paths in parameter trees, the layers in them, and abstract arrays."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from fclayers._util.errors import BadType, BadValue

Path = tuple[object, ...]
Select = Callable[[str], bool]


def path_name(path: Path) -> str:
    """A path with dots, such as `classifier.0`; the root's is empty."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def is_layer(node: Any) -> bool:
    """Whether a node of a parameter tree is a layer: a `NamedTuple` of a weight and a bias."""
    return getattr(node, "_fields", None) == ("weight", "bias")


def layers_in(params: Any) -> dict[str, Any]:
    """The layers of a tree by their paths."""
    nodes = jax.tree.leaves_with_path(params, is_leaf=is_layer)
    return {path_name(path): node for path, node in nodes if is_layer(node)}


def replace_layers(
    params: Any,
    select: Select | None,
    replace: Callable[[str, Any], Any],
    *,
    among: Callable[[Any], bool] = is_layer,
) -> Any:
    """Calls `replace(name, layer)`, in order, on the layers that `among` and `select` choose."""
    if select is not None and not callable(select):
        raise BadType(f"select must be a function of a layer's path, got {type(select).__name__}")
    chosen = 0

    def visit(path: Path, node: Any) -> Any:
        nonlocal chosen
        name = path_name(path)
        if not is_layer(node) or not among(node) or not (select is None or select(name)):
            return node
        chosen += 1
        return replace(f"layer {name!r}" if name else "the layer", node)

    replaced = jax.tree.map_with_path(visit, params, is_leaf=is_layer)
    if not chosen:
        found = ", ".join(map(repr, layers_in(params)))
        raise BadValue(f"found no layer to replace; the layers are {found or 'none'}")
    return replaced


def abstract(shape: Sequence[Any], dtype: Any) -> jax.ShapeDtypeStruct:
    """A `jax.ShapeDtypeStruct`, with a typed constructor."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype)  # type: ignore[no-untyped-call]
