"""Batches on meshes with explicit axes, inside of which the compiler decides."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from fclayers._util.checks import is_array
from fclayers._util.meshes import mesh_of, partition, spec_of

Specs = Callable[[PartitionSpec], Any]


def on_any_mesh(
    function: Callable[..., Any], make_specs: Specs, params: PyTree, batch: PyTree, *rest: Any
) -> Any:
    """Returns `function(params, batch, *rest)`; on an explicit mesh, sharded by `make_specs`.

    `make_specs` takes the spec of an axis of examples.
    """
    arrays = [leaf for leaf in jax.tree.leaves((params, batch, *rest)) if is_array(leaf)]
    mesh = mesh_of(arrays)
    if mesh is None:
        return function(params, batch, *rest)
    specs = (spec_of(leaf)[:1] for leaf in jax.tree.leaves(batch))
    examples = partition(*next((spec for spec in specs if spec), ()))
    automatic = jax.sharding.auto_axes(
        function, axes=mesh.explicit_axes, out_sharding=make_specs(examples)
    )
    return automatic(params, batch, *rest)


def specs_like(params: PyTree) -> PyTree[PartitionSpec]:
    """The specs of arrays."""
    return jax.tree.map(lambda leaf: partition(*spec_of(leaf)), params)
