"""Layers on meshes with explicit axes, and inside `jax.shard_map`.

With explicit axes, the sharding of an array is part of its type, and JAX raises an error for
products and reshapes whose sharding is ambiguous. Inside a layer the compiler decides; the sharding
of the result follows from the arguments. Inside `jax.shard_map`, the axes over which an array
varies are part of its type.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike

Tree = TypeVar("Tree")


def varying_with(others: Any, tree: Tree) -> Tree:
    """A tree whose arrays vary over the mesh axes of `jax.shard_map` that any of the others does.

    There the operands of a primitive have to vary over the same axes, and what a loop carries has
    to vary from the start as its body's result does.
    """
    axes = frozenset[str]().union(*map(_varying_axes, jax.tree.leaves((others, tree))))

    def vary(array: ArrayLike) -> ArrayLike:
        missing = tuple(axes - _varying_axes(array))
        return lax.pcast(array, missing, to="varying") if missing else array

    varying: Tree = jax.tree.map(vary, tree) if axes else tree
    return varying


def _varying_axes(array: ArrayLike) -> frozenset[str]:
    axes: frozenset[str] = jax.typeof(array).manual_axis_type.varying
    return axes


def mesh_of(tree: Any) -> AbstractMesh | None:
    """The mesh with explicit axes on which arrays are sharded, if any."""
    meshes = (jax.typeof(array).sharding.mesh for array in jax.tree.leaves(tree))
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def spec_of(array: Array) -> tuple[Any, ...]:
    """The mesh axes, or `None`, of every axis of an array."""
    return tuple(jax.typeof(array).sharding.spec)


def partition(*entries: Any) -> PartitionSpec:
    """A `PartitionSpec`, with a typed constructor."""
    return PartitionSpec(*entries)  # type: ignore[no-untyped-call]


def on_any_mesh(
    function: Callable[..., Array], make_spec: Callable[[], Sequence[Any]], *args: Any
) -> Array:
    """Returns `function(*args)`; on an explicit mesh, sharded by `make_spec()` as far as it fits.

    `make_spec` is called after `function`, and thus after the arguments have been checked.
    """
    mesh = mesh_of(args)
    if mesh is None:
        return function(*args)

    def run(spec: PartitionSpec) -> Callable[..., Array]:
        auto: Callable[..., Array] = jax.sharding.auto_axes(
            function, axes=mesh.explicit_axes, out_sharding=NamedSharding(mesh, spec)
        )
        return auto

    shape = jax.eval_shape(run(partition()), *args).shape
    return run(fitting_spec(mesh, shape, make_spec()))(*args)


def fitting_spec(mesh: AbstractMesh, shape: Sequence[int], spec: Sequence[Any]) -> PartitionSpec:
    """Drops mesh axes that an earlier axis uses, or that do not divide the size of their axis."""
    used: set[str] = set()
    entries = []
    for size, entry in zip(shape, spec, strict=True):
        kept: list[str] = []
        for name in mesh_axes(entry):
            shards = mesh.shape[name]
            if name not in used and size % shards == 0:
                kept.append(name)
                size //= shards
        used.update(kept)
        entries.append(tuple(kept) or None)
    return partition(*entries)


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a `PartitionSpec` names."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def auto_devices(tree: Any) -> int:
    """How many devices the compiler may share arrays among; those of the largest mesh."""
    meshes = (jax.typeof(array).sharding.mesh for array in jax.tree.leaves(tree))
    return max((prod(mesh.shape[name] for name in mesh.auto_axes) for mesh in meshes), default=1)
