"""Layers on several devices: which axes of their arrays are sharded along which mesh axes.

A specification is a tree like the parameters', with a `jax.sharding.PartitionSpec` for every array.
`shard` places the arrays accordingly; XLA then runs the same functions on all devices.
"""

from collections.abc import Sequence
from math import prod
from typing import Literal, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from fclayers._util.checks import describe
from fclayers._util.errors import BadType, BadValue, public
from fclayers._util.meshes import mesh_axes, partition
from fclayers._util.trees import is_layer, layers_in, path_name
from fclayers.conv import ConvParams
from fclayers.linear import LinearParams
from fclayers.weights.form import is_matrix, layer_shapes, map_axes

Kind = Literal["column", "row", "replicated", "fsdp"]
MeshAxis = str | tuple[str, ...]
Params = TypeVar("Params")


@public
def partition_specs(params: PyTree, kind: Kind, *, mesh_axis: MeshAxis = "model") -> PyTree:
    """Returns partition specs for the arrays of layers.

    Args:
        params: A layer, or any tree with layers in it. Arrays outside of layers are replicated.
        kind: `"column"` shards the outputs, by the first output axis, and with them the bias.
            `"row"` shards the inputs, by the first input axis (of a convolution, by the channels);
            the bias is replicated. `"replicated"` copies all arrays to every device. `"fsdp"`
            shards every matrix along its longest axis, and replicates biases, scales and
            magnitudes.
        mesh_axis: The mesh axis, or several.

    Returns:
        A tree like `params` of `jax.sharding.PartitionSpec`. By `"column"` and `"row"`, of the
        factors of a low-rank product or an adapter the one with the outputs or inputs is sharded;
        block-diagonal weights are sharded by their blocks.

    Raises:
        TypeError: There is no layer in `params`.
        ValueError: `kind` is none of the four.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.init_linear(jax.random.key(0), 64, 128)
        >>> fc.partition_specs(layer, "column")
        LinearParams(weight=P(None, 'model'), bias=P('model',))
        >>> fc.partition_specs(layer, "fsdp", mesh_axis="data")
        LinearParams(weight=P(None, 'data'), bias=P())

    Source: columns and rows are those of
    `Shoeybi et al. 2019, Megatron-LM <https://arxiv.org/abs/1909.08053>`_, section 3; `"fsdp"` is
    stage 3 of `Rajbhandari et al. 2019, ZeRO <https://arxiv.org/abs/1910.02054>`_.
    """
    if kind not in ("column", "row", "replicated", "fsdp"):
        raise BadValue(f"kind must be 'column', 'row', 'replicated' or 'fsdp', got {kind!r}")
    if not layers_in(params):
        raise BadType(f"expected params to have a layer in it, got {describe(params)}")

    def specs(node: PyTree) -> PyTree:
        return _layer_specs(node, kind, mesh_axis) if is_layer(node) else partition()

    return jax.tree.map(specs, params, is_leaf=is_layer)


@public
def mlp_specs(
    params: Sequence[LinearParams], *, mesh_axis: MeshAxis = "model"
) -> tuple[LinearParams, ...]:
    """Returns partition specs for a multilayer perceptron with one all-reduce per pair of layers.

    The first layer of each pair is sharded by its outputs, the second by its inputs, so
    that only the sum of the latter's products is an all-reduce. The last of an odd number of layers
    is replicated: its outputs, such as ten classes, are few.

    Args:
        params: The layers, as `apply_mlp` takes them.
        mesh_axis: The mesh axis, or several.

    Returns:
        A tuple with the specs of `partition_specs` for every layer.

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
    if not isinstance(params, (tuple, list)) or is_layer(params) or not all(map(is_layer, params)):
        raise BadType(
            f"expected params to be a sequence of layers such as LinearParams, "
            f"got {describe(params)}"
        )
    pair: tuple[Kind, ...] = ("column", "row")
    last: tuple[Kind, ...] = ("replicated",)
    kinds = pair * (len(params) // 2) + last * (len(params) % 2)
    return tuple(
        _layer_specs(layer, kind, mesh_axis) for layer, kind in zip(params, kinds, strict=True)
    )


@public
def shard(params: Params, mesh: Mesh, specs: PyTree) -> Params:
    """Places arrays on the devices of a mesh.

    Args:
        params: Arrays, or any tree of them: parameters, an optimizer's state, a batch. On a mesh of
            several processes, every process must pass the same values, or arrays on that mesh.
        mesh: From `jax.make_mesh`, with explicit or auto axes.
        specs: A tree like `params`, from `partition_specs`, `mlp_specs` or written by hand, with a
            `jax.sharding.PartitionSpec` for every array.

    Returns:
        The arrays, each with a `jax.sharding.NamedSharding`.

    Raises:
        TypeError: `mesh` is not a `jax.sharding.Mesh`, or an entry of `specs` is not a
            `PartitionSpec`.
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
    if not isinstance(mesh, Mesh):
        raise BadType(f"expected mesh to be a jax.sharding.Mesh, got {describe(mesh)}")
    paths, structure = jax.tree.flatten_with_path({"params": params})
    leaves, actual = jax.tree.flatten({"params": specs}, is_leaf=_is_spec)
    if str(actual) != str(structure):
        raise BadValue(f"expected specs to be a tree like {structure}, got {actual}")
    for spec in leaves:
        if not _is_spec(spec):
            raise BadType(f"expected specs of PartitionSpec, got {describe(spec)}")
    problems = [
        f"{path_name(path)} {problem}"
        for (path, array), spec in zip(paths, leaves, strict=True)
        if (problem := _misfit(np.shape(array), mesh, spec))
    ]
    if problems:
        raise BadValue("\n  ".join(["nothing was laid out, because", *problems]))

    def put(array: ArrayLike, spec: PartitionSpec) -> Array:
        sharding = NamedSharding(mesh, spec)
        whole = getattr(array, "is_fully_addressable", True)
        if not mesh.is_multi_process or not whole:
            placed: Array = jax.device_put(array, sharding)
            return placed
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    laid_out: Params = jax.tree.map(put, params, specs)
    return laid_out


def _is_spec(node: object) -> bool:
    return isinstance(node, PartitionSpec)


def _layer_specs(layer: PyTree, kind: Kind, mesh_axis: MeshAxis) -> PyTree:
    in_shape, _ = layer_shapes(layer)

    def spec(array: Array, names: list[str]) -> PartitionSpec:
        place: int | None = None
        if kind == "fsdp" and is_matrix(names):
            place = max(range(array.ndim), key=array.shape.__getitem__)
        elif kind in ("column", "row") and "group" in names:
            place = names.index("group")
        elif kind == "column" and "out" in names:
            place = names.index("out")
        elif kind == "row" and "in" in names:
            channels = isinstance(layer, ConvParams)
            place = names.index("in") + (len(in_shape) - 1 if channels else 0)
        return partition() if place is None else _along(place, array.ndim, mesh_axis)

    bias = layer.bias
    if bias is not None:
        sharded = kind == "column" and bias.ndim
        bias = _along(0, bias.ndim, mesh_axis) if sharded else partition()
    return layer._replace(weight=map_axes(spec, layer.weight, len(in_shape)), bias=bias)


def _along(place: int, ndim: int, mesh_axis: MeshAxis) -> PartitionSpec:
    return partition(*(mesh_axis if i == place else None for i in range(ndim)))


def _misfit(shape: tuple[int, ...], mesh: Mesh, spec: PartitionSpec) -> str | None:
    """What is wrong with the specification of an array of this shape, if anything."""
    if len(spec) > len(shape):
        return f"has shape {shape}, too few axes for {spec}"
    for size, entry in zip(shape, spec, strict=False):
        unknown = [name for name in mesh_axes(entry) if name not in mesh.shape]
        if unknown:
            return f"is sharded along {unknown[0]!r}, the mesh has the axes {mesh.axis_names}"
        parts = prod(mesh.shape[name] for name in mesh_axes(entry))
        if size % parts:
            return (
                f"has shape {shape}, whose axis of size {size} cannot be sharded over "
                f"{parts} devices along {entry!r}"
            )
    return None
