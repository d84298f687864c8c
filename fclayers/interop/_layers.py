"""Layers as named arrays in nested dicts, as all frameworks have them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, GetAttrKey, KeyEntry, SequenceKey

from fclayers._util.checks import describe, is_array
from fclayers._util.errors import BadType, BadValue
from fclayers._util.trees import Path, is_layer, path_name
from fclayers.bilinear import BilinearParams
from fclayers.conv import ConvParams
from fclayers.linear import LinearParams
from fclayers.weights.form import dense, layer_shapes

AnyArray: TypeAlias = Any  # JAX's or NumPy's
Layer = LinearParams | ConvParams | BilinearParams


def read_in_out(weight: AnyArray, bias: AnyArray | None) -> Layer:
    """Of the layouts `(in, out)` and `(*kernel, in, out)`, which are also this library's."""
    return (LinearParams if weight.ndim == 2 else ConvParams)(weight, bias)


def write_in_out(layer: Layer) -> tuple[AnyArray, AnyArray | None]:
    if isinstance(layer, BilinearParams):
        raise BadType("expected LinearParams and ConvParams, got BilinearParams")
    if isinstance(layer, LinearParams) and layer.weight.ndim != 2:
        raise BadValue(
            f"expected fully connected layers with weights (in, out), got a weight of shape "
            f"{layer.weight.shape}; flatten its input and output axes"
        )
    return layer.weight, layer.bias


def read_out_in(weight: AnyArray, bias: AnyArray | None) -> Layer:
    """Of the layouts `(out, in)` and `(out, in, *kernel)`."""
    return read_in_out(weight.transpose(*range(2, weight.ndim), 1, 0), bias)


def write_out_in(layer: Layer) -> tuple[AnyArray, AnyArray | None]:
    weight, bias = write_in_out(layer)
    *kernel, inputs, outputs = range(weight.ndim)
    return weight.transpose(outputs, inputs, *kernel), bias


class Layout(NamedTuple):
    """How a framework names a layer's arrays, and how they become a layer and back."""

    weight: str
    bias: str
    read: Callable[[AnyArray, AnyArray | None], Layer] = read_in_out
    write: Callable[[Layer], tuple[AnyArray, AnyArray | None]] = write_in_out


def check_mapping(tree: Any, of: str = "names to arrays") -> None:
    if not isinstance(tree, Mapping):
        raise BadType(f"expected a mapping of {of}, got {describe(tree)}")


def read_layers(tree: Any, layout: Layout) -> Any:
    """Replaces every dict of a weight and a bias by a layer; the error names all problems."""
    check_mapping(tree)
    problems: list[str] = []
    layers = _read(tree, (), layout, problems)
    _raise_problems(problems)
    return layers


def write_layers(params: Any, layout: Layout) -> dict[Path, np.ndarray]:
    """Returns the arrays of all layers in the framework's layout, by path."""
    arrays = {}
    for path, layer in jax.tree.leaves_with_path(params, is_leaf=is_layer):
        if not is_layer(layer):
            raise BadType(
                f"expected a tree of layers such as LinearParams and ConvParams, "
                f"got {describe(layer)} at {path_name(path) or 'its root'}"
            )
        plain = layer._replace(weight=dense(layer.weight, len(layer_shapes(layer)[0])))
        weight, bias = layout.write(jax.tree.map(np.asarray, plain))
        keys = tuple(map(tree_key, path))
        arrays[*keys, layout.weight] = np.array(weight, order="C")
        if bias is not None:
            arrays[*keys, layout.bias] = np.array(bias, order="C")
    return arrays


def nest(arrays: Mapping[Path, Any]) -> dict[Any, Any]:
    """Turns `{("a", "b"): array}` into `{"a": {"b": array}}`."""
    tree: dict[Any, Any] = {}
    for path, array in arrays.items():
        node: Any = tree
        for key in path[:-1]:
            node = node.setdefault(key, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or path[-1] in node:
            name = ".".join(map(str, path))
            raise BadValue(f"{name} and another entry are one inside the other")
        node[path[-1]] = array
    return tree


def check_entries(
    actual: Mapping[str, Any], expected: Mapping[str, Any], *, dtypes: bool, source: str = ""
) -> None:
    """Raises one error that names every entry that is missing, extra, or of another shape."""

    def form(array: Any) -> str:
        if not hasattr(array, "shape"):
            return describe(array)
        return f"shape {tuple(array.shape)}" + (f" and dtype {array.dtype}" if dtypes else "")

    found = {name: form(array) for name, array in actual.items()}
    wanted = {name: form(array) for name, array in expected.items()}
    problems = [f"missing: {name} of {wanted[name]}" for name in wanted if name not in found]
    problems += [f"extra: {name} of {found[name]}" for name in found if name not in wanted]
    problems += [
        f"{name} should be of {wanted[name]}, is of {found[name]}"
        for name in wanted
        if found.get(name, wanted[name]) != wanted[name]
    ]
    _raise_problems(problems, source)


def tree_key(entry: KeyEntry) -> Any:
    """The key, index or name that one step of a path in a pytree holds."""
    match entry:
        case SequenceKey(key) | DictKey(key):
            return key
        case GetAttrKey(name):
            return name
    return str(entry)


def _read(tree: Any, path: Path, layout: Layout, problems: list[str]) -> Any:
    def name(key: object) -> str:
        return ".".join(map(str, (*path, key)))

    parts = {key: value for key, value in tree.items() if not isinstance(value, Mapping)}
    layers = {
        key: _read(value, (*path, key), layout, problems)
        for key, value in tree.items()
        if isinstance(value, Mapping)
    }
    if not parts:
        return layers
    weight, bias = parts.pop(layout.weight, None), parts.pop(layout.bias, None)
    weight_name, bias_name = name(layout.weight), name(layout.bias)
    extra = [*parts, *layers]
    problems += [f"extra: {name(key)}, beside the weight and bias of a layer" for key in extra]
    if weight is None:
        if bias is not None or not extra:
            problems.append(f"missing: {weight_name}")
        return None
    weight = _as_numpy(weight, weight_name, problems)
    if bias is not None:
        bias = _as_numpy(bias, bias_name, problems)
    if weight is None:
        return None
    if not 2 <= weight.ndim <= 5 or not jnp.issubdtype(weight.dtype, jnp.inexact):
        problems.append(
            f"{weight_name} has shape {weight.shape} and dtype {weight.dtype}, which is "
            "neither a fully connected layer's nor a convolution's"
        )
        return None
    layer = layout.read(weight, bias)
    if layer.bias is not None and layer.bias.shape != layer.weight.shape[-1:]:
        problems.append(
            f"{bias_name} has shape {bias.shape}, which does not belong to "
            f"{weight_name} of shape {weight.shape}"
        )
    # The copies are made asynchronously, and the caller may write to its arrays.
    copies = jax.tree.map(jnp.array, layer)
    return jax.block_until_ready(copies)  # type: ignore[no-untyped-call]


def _as_numpy(value: Any, name: str, problems: list[str]) -> Any:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if "bfloat16" in str(value.dtype):  # PyTorch does not convert it to NumPy
            value = jnp.from_dlpack(value.contiguous())
    if not is_array(value):
        problems.append(f"{name} is {describe(value)}, expected an array")
        return None
    return np.asarray(value)


def _raise_problems(problems: list[str], source: str = "") -> None:
    if problems:
        raise BadValue("\n  ".join([f"{source}nothing was loaded, because of", *problems]))
