"""What the frameworks have in common: layers as named arrays in nested dicts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fclayers._checks import describe
from fclayers._tree import tree_key
from fclayers.conv import ConvParams
from fclayers.forms import LinearParams, dense, is_form

Layer = LinearParams | ConvParams
Path = tuple[Any, ...]


class Layout(NamedTuple):
    """How a framework names a layer's arrays, and how they become a layer and back."""

    weight: str
    bias: str
    read: Callable[[Array, Array | None], Layer]
    write: Callable[[Layer], tuple[Array, Array | None]]


def read_layers(function: str, tree: Any, layout: Layout) -> Any:
    """Puts a layer in the place of every dict of a weight and a bias; names all that is wrong."""
    if not isinstance(tree, Mapping):
        raise TypeError(f"{function}: expected a mapping of names to arrays, got {describe(tree)}")
    problems: list[str] = []
    layers = _read(tree, (), layout, problems)
    raise_problems(function, problems)
    return layers


def write_layers(function: str, params: Any, layout: Layout) -> dict[Path, np.ndarray]:
    """Returns the arrays of all layers in the framework's layout, by path."""
    arrays = {}
    for path, layer in jax.tree.leaves_with_path(params, is_leaf=is_layer):
        if not is_layer(layer):
            raise TypeError(
                f"{function}: expected a tree of layers such as LinearParams and ConvParams, "
                f"got {describe(layer)} at {jax.tree_util.keystr(path) or 'its root'}"
            )
        plain = dense(layer) if is_form(layer) else layer
        weight, bias = layout.write(jax.tree.map(np.asarray, plain))
        keys = tuple(map(tree_key, path))
        arrays[*keys, layout.weight] = np.array(weight, order="C")
        if bias is not None:
            arrays[*keys, layout.bias] = np.array(bias, order="C")
    return arrays


def nest(function: str, arrays: Mapping[Path, Any]) -> dict[Any, Any]:
    """Turns `{("a", "b"): array}` into `{"a": {"b": array}}`."""
    tree: dict[Any, Any] = {}
    for path, array in arrays.items():
        node: Any = tree
        for key in path[:-1]:
            node = node.setdefault(key, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or path[-1] in node:
            name = ".".join(map(str, path))
            raise ValueError(f"{function}: {name} and another entry are one inside the other")
        node[path[-1]] = array
    return tree


def check_entries(
    function: str, actual: Mapping[str, Any], expected: Mapping[str, Any], *, dtypes: bool
) -> None:
    """Raises one error that names every entry that is missing, extra, or of another shape."""
    problems = [
        f"missing: {name} of {_form(expected[name], dtypes)}"
        for name in expected
        if name not in actual
    ]
    problems += [
        f"extra: {name} of {_form(actual[name], dtypes)}" for name in actual if name not in expected
    ]
    problems += [
        f"{name} should be of {_form(expected[name], dtypes)}, is of {_form(actual[name], dtypes)}"
        for name in expected
        if name in actual and _form(actual[name], dtypes) != _form(expected[name], dtypes)
    ]
    raise_problems(function, problems)


def raise_problems(function: str, problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("\n  ".join([f"{function}: nothing was loaded, because of", *problems]))


def is_layer(node: Any) -> bool:
    return is_form(node) or isinstance(node, ConvParams)


def read_in_out(weight: Array, bias: Array | None) -> Layer:
    """Of the layouts `(in, out)` and `(*kernel, in, out)`, which are also this library's."""
    return (LinearParams if weight.ndim == 2 else ConvParams)(weight, bias)


def write_in_out(layer: Layer) -> tuple[Array, Array | None]:
    return layer.weight, layer.bias


def read_out_in(weight: Array, bias: Array | None) -> Layer:
    """Of the layouts `(out, in)` and `(out, in, *kernel)`."""
    if weight.ndim == 2:
        return LinearParams(weight.T, bias)
    return ConvParams(weight.transpose(*range(2, weight.ndim), 1, 0), bias)


def write_out_in(layer: Layer) -> tuple[Array, Array | None]:
    weight, bias = layer
    if isinstance(layer, LinearParams):
        return weight.T, bias
    return weight.transpose(weight.ndim - 1, weight.ndim - 2, *range(weight.ndim - 2)), bias


def _read(tree: Any, path: Path, layout: Layout, problems: list[str]) -> Any:
    parts = {key: value for key, value in tree.items() if not isinstance(value, Mapping)}
    layers = {
        key: _read(value, (*path, key), layout, problems)
        for key, value in tree.items()
        if isinstance(value, Mapping)
    }
    if not parts:
        return layers
    weight, bias = parts.pop(layout.weight, None), parts.pop(layout.bias, None)
    name = ".".join(map(str, path))
    prefix = f"{name}." if name else ""
    extra = [*parts, *layers]
    problems += [f"extra: {prefix}{key}, beside the weight and bias of a layer" for key in extra]
    if weight is None:
        if bias is not None or not extra:
            problems.append(f"missing: {prefix}{layout.weight}")
        return None
    weight = _as_numpy(weight, f"{prefix}{layout.weight}", problems)
    if bias is not None:
        bias = _as_numpy(bias, f"{prefix}{layout.bias}", problems)
    if weight is None:
        return None
    if not 2 <= weight.ndim <= 5 or not jnp.issubdtype(weight.dtype, jnp.inexact):
        problems.append(
            f"{prefix}{layout.weight} has shape {weight.shape} and dtype {weight.dtype}, which is "
            "no fully connected layer's and no convolution's"
        )
        return None
    layer = layout.read(weight, bias)
    if layer.bias is not None and layer.bias.shape != layer.weight.shape[-1:]:
        problems.append(
            f"{prefix}{layout.bias} has shape {bias.shape}, which does not belong to "
            f"{prefix}{layout.weight} of shape {weight.shape}"
        )
    return jax.tree.map(jnp.array, layer)


def _as_numpy(value: Any, name: str, problems: list[str]) -> Any:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if "bfloat16" in str(value.dtype):  # which PyTorch does not give to NumPy
            value = jnp.from_dlpack(value.contiguous())
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        problems.append(f"{name} is {describe(value)}, expected an array")
        return None
    return np.asarray(value)


def _form(array: Any, dtypes: bool) -> str:
    if not hasattr(array, "shape"):
        return describe(array)
    shape = f"shape {tuple(array.shape)}"
    return f"{shape} and dtype {array.dtype}" if dtypes else shape
