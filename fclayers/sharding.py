"""Layers on several devices: which axes of their arrays are divided among which devices.

A specification is a tree like the parameters', with a `jax.sharding.PartitionSpec` for every array.
`shard` lays the arrays out by it; XLA then runs the same functions on all devices at once.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fclayers._checks import describe
from fclayers._mesh import mesh_axes, partition
from fclayers._tree import path_name
from fclayers.conv import ConvParams
from fclayers.forms import (
    Layer,
    LinearParams,
    LoraParams,
    LowRankParams,
    QuantizedParams,
    check_layer,
    is_form,
)

Kind = Literal["column", "row", "replicated", "fsdp"]
MeshAxis = str | tuple[str, ...]
Params = TypeVar("Params")


def linear_specs(params: Any, kind: Kind, *, axis: MeshAxis = "model") -> Any:
    """Says how the arrays of layers are divided among the devices along a mesh axis.

    Args:
        params: A layer in any form, a convolution, or any tree with such layers in it. Arrays in no
            layer are replicated.
        kind: `"column"` divides the outputs, by the first output axis: every device has some
            columns of the weight, and that part of the bias. `"row"` divides the inputs, by the
            first input axis; the bias is replicated. Of a `ConvParams` the two divide the
            channels. `"replicated"`: every device has it all. `"fsdp"` divides every weight by its
            longest axis, whatever that means to the layer, and replicates biases and scales.
        axis: The mesh axis, or several.

    Returns:
        A tree like `params` of `jax.sharding.PartitionSpec`. By `"column"` and `"row"` a low-rank
        product or an adapter is divided on the side of the outputs or inputs, and whole on the
        other; so are the scales of an int8 layer by `"column"`.

    Raises:
        TypeError: There is no layer in `params`.
        ValueError: `kind` is none of the four.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.init_linear(jax.random.key(0), 64, 128)
        >>> fc.linear_specs(layer, "column")
        LinearParams(weight=P(None, 'model'), bias=P('model',))
        >>> fc.linear_specs(layer, "fsdp", axis="data")
        LinearParams(weight=P(None, 'data'), bias=P())

    Source: columns and rows are those of
    `Shoeybi et al. 2019, Megatron-LM <https://arxiv.org/abs/1909.08053>`_, section 3; `"fsdp"` is
    stage 3 of `Rajbhandari et al. 2019, ZeRO <https://arxiv.org/abs/1910.02054>`_.
    """
    name = "linear_specs"
    if kind not in ("column", "row", "replicated", "fsdp"):
        raise ValueError(
            f"{name}: kind must be 'column', 'row', 'replicated' or 'fsdp', got {kind!r}"
        )
    if not any(map(_is_layer, jax.tree.leaves(params, is_leaf=_is_layer))):
        raise TypeError(f"{name}: expected params to have a layer in it, got {describe(params)}")

    def specs(node: Any) -> Any:
        return _layer_specs(name, node, kind, axis) if _is_layer(node) else partition()

    return jax.tree.map(specs, params, is_leaf=_is_layer)


def mlp_specs(params: Sequence[Layer], *, axis: MeshAxis = "model") -> tuple[Any, ...]:
    """Says how to divide a multilayer perceptron so that a pair of layers costs one all-reduce.

    Every second layer, from the first, is divided by its outputs, the next by its inputs: what the
    one has left on a device is what the other needs there, and their sum is one all-reduce. The
    last of an odd number of layers is replicated: its outputs, such as ten classes, are few.

    Args:
        params: The layers, as `apply_mlp` takes them.
        axis: The mesh axis, or several.

    Returns:
        A tuple with the specifications of `linear_specs` for every layer.

    Raises:
        TypeError: `params` is not a sequence of layers.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> params = fc.init_mlp(jax.random.key(0), [64, 256, 256, 10])
        >>> for specs in fc.mlp_specs(params):
        ...     print(specs)
        LinearParams(weight=P(None, 'model'), bias=P('model',))
        LinearParams(weight=P('model', None), bias=P())
        LinearParams(weight=P(), bias=P())
    """
    name = "mlp_specs"
    if not isinstance(params, (tuple, list)) or is_form(params) or not all(map(is_form, params)):
        raise TypeError(
            f"{name}: expected params to be a sequence of layers such as LinearParams, "
            f"got {describe(params)}"
        )
    pair: tuple[Kind, ...] = ("column", "row")
    last: tuple[Kind, ...] = ("replicated",)
    kinds = pair * (len(params) // 2) + last * (len(params) % 2)
    return tuple(
        _layer_specs(name, layer, kind, axis) for layer, kind in zip(params, kinds, strict=True)
    )


def shard(params: Params, mesh: Mesh, specs: Any) -> Params:
    """Lays out arrays on the devices of a mesh.

    Args:
        params: Arrays, or any tree of them: parameters, an optimizer's state, a batch. On a mesh of
            several processes, every process must pass the same values, or arrays on that mesh.
        mesh: From `jax.make_mesh`, with explicit or auto axes.
        specs: A tree like `params`, from `linear_specs`, `mlp_specs` or written by hand, with a
            `jax.sharding.PartitionSpec` for every array.

    Returns:
        The arrays, each with a `jax.sharding.NamedSharding`.

    Raises:
        TypeError: `mesh` is not a `jax.sharding.Mesh`, or there is something else than a
            `PartitionSpec` in `specs`.
        ValueError: `specs` is not a tree like `params`, or names an axis that the array or the mesh
            does not have, or one that does not divide evenly.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> params = fc.init_mlp(jax.random.key(0), [64, 256, 10])
        >>> params = fc.shard(params, mesh, fc.mlp_specs(params))
        >>> params[0].weight.sharding.spec
        P(None, 'model')
    """
    name = "shard"
    if not isinstance(mesh, Mesh):
        raise TypeError(f"{name}: expected mesh to be a jax.sharding.Mesh, got {describe(mesh)}")
    structure: Any = jax.tree.structure(params)
    leaves, actual = jax.tree.flatten(specs, is_leaf=_is_spec)
    if actual != structure:
        raise ValueError(f"{name}: expected specs to be a tree like {structure}, got {actual}")
    for spec in leaves:
        if not _is_spec(spec):
            raise TypeError(f"{name}: expected specs of PartitionSpec, got {describe(spec)}")
    arrays = jax.tree.leaves_with_path(params)
    problems = [
        f"{'.'.join(filter(None, ['params', path_name(path)]))} {problem}"
        for (path, array), spec in zip(arrays, leaves, strict=True)
        if (problem := _misfit(np.shape(array), mesh, spec))
    ]
    if problems:
        raise ValueError("\n  ".join([f"{name}: nothing was laid out, because", *problems]))

    def put(array: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(mesh, spec)
        whole = getattr(array, "is_fully_addressable", True)
        if not mesh.is_multi_process or not whole:
            return jax.device_put(array, sharding)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    laid_out: Params = jax.tree.map(put, params, jax.tree.unflatten(structure, leaves))
    return laid_out


def _is_layer(node: Any) -> bool:
    return is_form(node) or isinstance(node, ConvParams)


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def _layer_specs(
    function: str, layer: Any, kind: Kind, axis: MeshAxis, in_ndim: int | None = None
) -> Any:
    """The specifications of one layer; where it has no bias, `in_ndim` says where outputs begin."""

    def along(array: Any, place: int | None) -> Any:
        if place is None or place >= array.ndim:
            return partition()
        return partition(*(axis if i == place else None for i in range(array.ndim)))

    def weight(array: Any, first_input: int | None, first_output: int | None) -> Any:
        longest = max(range(array.ndim), key=array.shape.__getitem__, default=None)
        return along(array, {"column": first_output, "row": first_input, "fsdp": longest}.get(kind))

    def per_output(array: Any, first_output: int = 0) -> Any:
        return None if array is None else along(array, first_output if kind == "column" else None)

    if isinstance(layer, ConvParams):
        ndim = layer.weight.ndim
        return ConvParams(weight(layer.weight, ndim - 2, ndim - 1), per_output(layer.bias))
    if isinstance(layer, LoraParams):
        base = _layer_specs(function, layer.base, kind, axis, layer.down.ndim - 1)
        down, up, scale = weight(layer.down, 0, None), weight(layer.up, None, 1), along(None, None)
        return LoraParams(base, down, up, scale)
    in_ndim = len(check_layer(function, layer, in_ndim)[0])
    first_input = 0 if in_ndim else None
    match layer:
        case LinearParams(matrix, bias):
            return LinearParams(weight(matrix, first_input, in_ndim), per_output(bias))
        case LowRankParams(down, up, bias):
            down, up = weight(down, first_input, None), weight(up, None, 1)
            return LowRankParams(down, up, per_output(bias))
        case QuantizedParams(matrix, scale, bias):
            matrix = weight(matrix, first_input, in_ndim)
            return QuantizedParams(matrix, per_output(scale, 1), per_output(bias))


def _misfit(shape: tuple[int, ...], mesh: Mesh, spec: Any) -> str | None:
    """What is wrong with the specification of an array of this shape, if anything."""
    if len(spec) > len(shape):
        return f"has shape {shape}, too few axes for {spec}"
    for size, entry in zip(shape, spec, strict=False):
        unknown = [name for name in mesh_axes(entry) if name not in mesh.shape]
        if unknown:
            return f"is divided along {unknown[0]!r}, the mesh has the axes {mesh.axis_names}"
        parts = prod(mesh.shape[name] for name in mesh_axes(entry))
        if size % parts:
            return (
                f"has shape {shape}, whose axis of size {size} cannot be divided among "
                f"{parts} devices along {entry!r}"
            )
    return None
