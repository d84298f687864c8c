"""Heads on meshes with explicit axes: a function of every shard of the classes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, PyTree

from fclayers._util.checks import check_axes
from fclayers._util.meshes import mesh_axes, mesh_of, partition, spec_of
from fclayers.linear import LinearParams
from fclayers.sharding import partition_specs
from fclayers.weights.form import output_spec


class Inputs(NamedTuple):
    """Arguments by their axes: trees of arrays, or `None`.

    Attributes:
        layers: One layer, or two with the same classes.
        inputs: Their inputs.
        per_row: `(*batch, ...)`.
        per_class: `(classes,)`.
        per_logit: `(*batch, classes)`.
        common: Arrays that no axis belongs to.
    """

    layers: tuple[LinearParams, ...]
    inputs: tuple[Array, ...]
    per_row: Any = None
    per_class: Any = None
    per_logit: Any = None
    common: Any = None


def per_shard(
    function: Callable[[int | Array, Inputs], PyTree],
    merge: Callable[[PyTree], PyTree],
    axis: int | tuple[int, ...],
    inputs: Inputs,
) -> PyTree:
    """Calls `function(shard, inputs)` for every shard of the classes, and merges the results.

    The first axes of the results are those of the batch; `merge` gets them stacked along another
    axis before. There is one shard, and nothing to merge, unless the arrays are sharded on a mesh
    with explicit axes.
    """
    mesh = mesh_of(inputs)
    if mesh is None:
        return function(0, inputs)
    axes = [check_axes(axis, x.shape) for x in inputs.inputs]
    batch = [s for a, s in enumerate(spec_of(inputs.inputs[0])) if a not in axes[0]]
    in_batch = {name for entry in batch for name in mesh_axes(entry)}
    (entry,) = output_spec(inputs.layers[0].weight, len(axes[0]))
    shards = tuple(name for name in mesh_axes(entry) if name not in in_batch)

    def input_spec(x: Array, axes: list[int]) -> Any:
        entries = iter(batch)
        return partition(*(None if a in axes else next(entries) for a in range(x.ndim)))

    specs = Inputs(
        tuple(partition_specs(layer, "column", mesh_axis=shards) for layer in inputs.layers),
        tuple(map(input_spec, inputs.inputs, axes)),
        jax.tree.map(lambda _: partition(*batch), inputs.per_row),
        jax.tree.map(lambda _: partition(shards or None), inputs.per_class),
        jax.tree.map(lambda _: partition(*batch, shards or None), inputs.per_logit),
        jax.tree.map(lambda _: partition(), inputs.common),
    )

    def run(inputs: Inputs) -> PyTree:
        shard = lax.axis_index(shards) if shards else 0
        return jax.tree.map(lambda a: a[None], function(shard, inputs))

    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=partition(shards or None, *batch),
        axis_names=set(mesh.explicit_axes),
        check_vma=False,
    )
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    found = sharded(jax.sharding.reshard(inputs, shardings))  # type: ignore[no-untyped-call]
    merged: Callable[..., PyTree] = jax.sharding.auto_axes(
        merge, axes=mesh.explicit_axes, out_sharding=NamedSharding(mesh, partition(*batch))
    )
    return merged(found)
