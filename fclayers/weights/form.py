"""The interface of weight forms, and functions of weights of any form."""

from collections.abc import Callable
from functools import reduce
from math import prod
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from fclayers._util.checks import check_array, describe
from fclayers._util.errors import BadType, BadValue
from fclayers._util.meshes import on_any_mesh, spec_of
from fclayers._util.trees import Select, replace_layers
from fclayers.kernels.convolution import convolve as convolve_kernel
from fclayers.kernels.product import add_bias, matrix_product
from fclayers.kernels.windows import Geometry

Shape = tuple[int, ...]
Weight: TypeAlias = PyTree
Term: TypeAlias = tuple[Array, Weight]


class WeightForm(NamedTuple):
    """How the library uses a form of weight, a `NamedTuple` of arrays that stands for a matrix.

    `in_ndim` is the number of the weight's input axes; `None` means that all axes but the last are
    inputs. The last three functions are optional: they save work over `dense`.

    Attributes:
        shapes: `shapes(weight, in_ndim)` returns the shapes of inputs and outputs, and raises if
            the arrays do not fit together.
        axes: `axes(weight, in_ndim)` returns the same `NamedTuple` with a string in place of
            every array, with the names of its axes: `"in"`, `"out"`, `"rank"` for an inner axis,
            `"block"` for blocks of consecutive inputs that share a number, `"group"` for blocks of
            the last input and output axes. Partition specs, column slices and Muon's dimension
            numbers follow from it.
        dense: `dense(weight, in_ndim)` returns the array `(*in, *out)`.
        multiply: `multiply(weight, x, in_ndim, precision)` returns the product of rows
            `(*batch, fan_in)` and the matrix, `(*batch, fan_out)`, in float32 for half precision.
        terms: `terms(weight, x, in_ndim, precision)` returns pairs of features and weights with one
            input and one output axis, whose products add up to that product. The weights' arrays
            can be sliced along their `"out"` axes.
        convolve: `convolve(weight, x, geometry, precision)` returns the convolution of
            `(N, *spatial, in)` with the kernel `(*kernel, in, out)`.
    """

    shapes: Callable[[Weight, int | None], tuple[Shape, Shape]]
    axes: Callable[[Weight, int], Weight]
    dense: Callable[[Weight, int], Array]
    multiply: Callable[[Weight, Array, int, lax.PrecisionLike], Array] | None = None
    terms: Callable[[Weight, Array, int, lax.PrecisionLike], tuple[Term, ...]] | None = None
    convolve: Callable[[Weight, Array, Geometry, lax.PrecisionLike], Array] | None = None


_FORMS: dict[type, WeightForm] = {}


def register_weight(kind: type, form: WeightForm) -> None:
    """Registers a form of weight with all functions of the library.

    Args:
        kind: A `NamedTuple` of arrays, or of arrays and other weights.
        form: What the library needs to know of it.

    Example:
        >>> from typing import NamedTuple
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> class Diagonal(NamedTuple):
        ...     entries: jax.Array
        >>> fc.register_weight(
        ...     Diagonal,
        ...     fc.WeightForm(
        ...         shapes=lambda weight, in_ndim: (weight.entries.shape, weight.entries.shape),
        ...         axes=lambda weight, in_ndim: Diagonal("out"),
        ...         dense=lambda weight, in_ndim: jnp.diag(weight.entries),
        ...         multiply=lambda weight, x, in_ndim, precision: x * weight.entries,
        ...     ),
        ... )
        >>> fc.apply_linear(fc.LinearParams(Diagonal(jnp.arange(3.0)), None), jnp.ones(3))
        Array([0., 1., 2.], dtype=float32)
    """
    _FORMS[kind] = form


def is_array(weight: object) -> bool:
    """Whether a weight is an array."""
    return hasattr(weight, "shape") and hasattr(weight, "dtype")


def shapes(weight: Weight, in_ndim: int | None = None) -> tuple[Shape, Shape]:
    """The shapes of inputs and outputs; raises unless the arrays fit together."""
    return _form_of(weight).shapes(weight, in_ndim)


def layer_shapes(params: PyTree, in_ndim: int | None = None) -> tuple[Shape, Shape]:
    """The shapes of a layer's inputs and outputs; raises unless its arrays fit together.

    The bias has the axes of the outputs. Without one, `in_ndim` says where they begin; the default
    is one output axis.
    """
    weight, bias = params
    if bias is None:
        return shapes(weight, in_ndim)
    check_array("params.bias", bias)
    ndim = sum(map(len, shapes(weight)))
    in_shape, out_shape = shapes(weight, max(ndim - bias.ndim, 0))
    if bias.shape != out_shape:
        raise BadValue(
            f"the bias must have the last axes of the weight, got a weight of shape "
            f"{in_shape + out_shape} and a bias of shape {bias.shape}"
        )
    return in_shape, out_shape


def compute_dtype(*trees: PyTree) -> jnp.dtype:
    """The dtype of a product by JAX's type promotion; 8-bit integers do not count beside others."""
    arrays = jax.tree.leaves(trees)
    return jnp.result_type(*([a for a in arrays if a.dtype != jnp.int8] or arrays))


def dense(weight: Weight, in_ndim: int) -> Array:
    """The array `(*in, *out)` that a weight stands for."""
    return _form_of(weight).dense(weight, in_ndim)


def multiply(weight: Weight, x: Array, in_ndim: int, precision: lax.PrecisionLike) -> Array:
    """The product of rows `(*batch, fan_in)` and the matrix, for half precision in float32."""
    form = _form_of(weight)
    if form.multiply is not None:
        return form.multiply(weight, x, in_ndim, precision)
    products = (multiply(w, f, 1, precision) for f, w in terms(weight, x, in_ndim, precision))
    return reduce(jnp.add, products)


def terms(weight: Weight, x: Array, in_ndim: int, precision: lax.PrecisionLike) -> tuple[Term, ...]:
    """Pairs of features and weights that can be sliced by columns, whose products add up."""
    form = _form_of(weight)
    if form.terms is not None:
        return form.terms(weight, x, in_ndim, precision)
    return ((x, as_matrix(form.dense(weight, in_ndim), in_ndim)),)


def convolve(
    weight: Weight,
    x: Array,
    geometry: Geometry,
    groups: int,
    precision: lax.PrecisionLike,
    bias: Array | None = None,
) -> Array:
    """The convolution of `(N, *spatial, in)` with a kernel, plus a bias in the dtype of `x`.

    The result of half precision is in float32.
    """
    form = _form_of(weight)
    if form.convolve is not None and groups == 1:
        y = form.convolve(weight, x, geometry, precision)
        return add_bias(y, bias, y.dtype)
    kernel = form.dense(weight, len(geometry.kernel) + 1).astype(x.dtype)
    return convolve_kernel(x, kernel, geometry, groups, precision, bias)


def axes(weight: Weight, in_ndim: int) -> Weight:
    """The names of the axes of every array of a weight, each in one string."""
    return _form_of(weight).axes(weight, in_ndim)


def map_axes(
    function: Callable[[Array, list[str]], object], weight: Weight, in_ndim: int
) -> Weight:
    """Calls `function(array, names of its axes)` on every array of a weight."""
    return jax.tree.map(
        lambda array, names: function(array, names.split()), weight, axes(weight, in_ndim)
    )


def is_matrix(names: list[str]) -> bool:
    """Whether an array with these axes multiplies features, as scales and magnitudes do not."""
    return len({"in", "out", "rank"} & set(names)) > 1


def slice_outputs(weight: Weight, start: int | Array, size: int) -> Weight:
    """Some consecutive columns of a weight with one input and one output axis."""

    def columns(array: Array, names: list[str]) -> Array:
        if "out" not in names:
            return array
        sliced: Array = lax.dynamic_slice_in_dim(array, start, size, names.index("out"))
        return sliced

    return map_axes(columns, weight, 1)


def move_inputs(
    weight: Weight,
    in_ndim: int,
    move: Callable[[Array], Array],
    *,
    keeps_order: bool,
    keeps_last: bool,
) -> Weight:
    """Changes the input axes of a weight by `move`, a function of arrays `(*in, n)`.

    `keeps_order` and `keeps_last` say whether it keeps the order of the inputs and their last axis.
    """

    def apply(array: Array, names: list[str]) -> Array:
        if "block" in names and array.shape[names.index("block")] > 1 and not keeps_order:
            raise BadValue(
                f"the order of the inputs would break up the {array.shape[0]} blocks that share "
                "a scale; materialize the layer first"
            )
        if "group" in names and not keeps_last:
            raise BadValue(
                "the blocks of a block-diagonal weight divide its last input axis, which would not "
                "be the channels; materialize the layer first"
            )
        if "in" not in names:
            return array
        before = names.index("in")
        if names[0] == "group":
            return jax.vmap(move)(array)
        last = range(-before, 0)
        return jnp.moveaxis(move(jnp.moveaxis(array, range(before), last)), last, range(before))

    if not any("in" in names.split() for names in jax.tree.leaves(axes(weight, in_ndim))):
        return move(dense(weight, in_ndim))
    return map_axes(apply, weight, in_ndim)


def by_columns(weight: Weight, in_ndim: int) -> Weight:
    """The weight, with every form that has no `terms` materialized, so that columns are slices."""
    if is_array(weight):
        return weight
    if _form_of(weight).terms is None:
        spec = (*(None,) * in_ndim, *output_spec(weight, in_ndim))
        return on_any_mesh(lambda weight: dense(weight, in_ndim), lambda: spec, weight)
    parts = weight._asdict().items()
    nested = {name: by_columns(part, in_ndim) for name, part in parts if type(part) in _FORMS}
    return weight._replace(**nested)


def output_spec(weight: Weight, in_ndim: int) -> tuple[object, ...]:
    """How the outputs are sharded on an explicit mesh, one entry per output axis."""
    entries: list[tuple[object, ...]] = []

    def collect(array: Array, names: list[str]) -> None:
        spec = spec_of(array)
        found = [entry for entry, name in zip(spec, names, strict=True) if name == "out"]
        if found and is_matrix(names):
            entries.append((*found[:-1], spec[0] if names[0] == "group" else found[-1]))

    map_axes(collect, weight, in_ndim)
    return entries[0] if entries else (None,) * len(shapes(weight, in_ndim)[1])


def replace_weights(
    params: PyTree, select: Select | None, replace: Callable[[str, Weight, int], Weight]
) -> PyTree:
    """Calls `replace(name, weight, in_ndim)` on the weights of the selected layers of a tree."""

    def visit(name: str, layer: PyTree) -> PyTree:
        in_shape, _ = layer_shapes(layer)
        return layer._replace(weight=replace(name, layer.weight, len(in_shape)))

    return replace_layers(params, select, visit)


def as_matrix(array: Array, in_ndim: int) -> Array:
    """An array `(*in, *out)` as `(fan_in, fan_out)`."""
    return array.reshape(prod(array.shape[:in_ndim]), prod(array.shape[in_ndim:]))


def _form_of(weight: Weight) -> WeightForm:
    if is_array(weight):
        return ARRAY
    if type(weight) not in _FORMS:
        forms = ", ".join(kind.__name__ for kind in _FORMS)
        raise BadType(f"expected the weight to be an array, {forms}, got {describe(weight)}")
    for field, value in weight._asdict().items():
        if not is_array(value) and type(value) not in _FORMS:
            check_array(f"{type(weight).__name__}.{field}", value)
    return _FORMS[type(weight)]


def _array_shapes(weight: Array, in_ndim: int | None) -> tuple[Shape, Shape]:
    split = max(weight.ndim - 1, 0) if in_ndim is None else in_ndim
    return weight.shape[:split], weight.shape[split:]


def _multiply_array(weight: Array, x: Array, in_ndim: int, precision: lax.PrecisionLike) -> Array:
    return matrix_product(x, as_matrix(weight.astype(x.dtype), in_ndim), precision)


ARRAY = WeightForm(
    shapes=_array_shapes,
    axes=lambda weight, in_ndim: "in " * in_ndim + "out " * (weight.ndim - in_ndim),
    dense=lambda weight, in_ndim: weight,
    multiply=_multiply_array,
)
