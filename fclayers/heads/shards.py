"""Heads on meshes with explicit axes: a function of every shard of the classes."""

from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, PyTree

from fclayers._util.checks import check_axes
from fclayers._util.meshes import mesh_axes, mesh_of, partition, spec_of
from fclayers.linear import LinearParams
from fclayers.sharding import partition_specs
from fclayers.weights.form import output_spec


def per_shard(
    function: Callable[..., PyTree],
    params: LinearParams,
    x: Array,
    axis: int | tuple[int, ...],
    *per_position: Array | None,
) -> PyTree:
    """Calls `function(shard, params, x, *per_position)` for every shard of the classes.

    The results, whose first axes are those of the batch, get a leading axis: the shards. There is
    one shard, unless the arrays are sharded on a mesh with explicit axes.
    """
    mesh = mesh_of((params, x, *per_position))
    if mesh is None:
        return jax.tree.map(lambda a: a[None], function(0, params, x, *per_position))
    axes = check_axes(axis, x.shape)
    x_spec = partition(*(None if a in axes else s for a, s in enumerate(spec_of(x))))
    batch_spec = [s for a, s in enumerate(x_spec) if a not in axes]
    in_batch = {name for entry in batch_spec for name in mesh_axes(entry)}
    (entry,) = output_spec(params.weight, len(axes))
    shards = tuple(name for name in mesh_axes(entry) if name not in in_batch)
    in_specs = (
        partition_specs(params, "column", mesh_axis=shards),
        x_spec,
        *(jax.tree.map(lambda _: partition(*batch_spec), a) for a in per_position),
    )

    def run(*args: PyTree) -> PyTree:
        shard = lax.axis_index(shards) if shards else 0
        return jax.tree.map(lambda a: a[None], function(shard, *args))

    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=partition(shards or None, *batch_spec),
        axis_names=set(mesh.explicit_axes),
        check_vma=False,
    )
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), in_specs)
    arrays = (params, x, *per_position)
    return sharded(*jax.sharding.reshard(arrays, shardings))  # type: ignore[no-untyped-call]
