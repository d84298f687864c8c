"""One pass over the logits, chunk by chunk, and its derivatives.

The value of a statistic comes from a pass that merges those of the chunks. Its tangent is that of
`Statistic.sums`, a second pass in which the statistic of whole rows is known. JAX transposes and
differentiates that pass further, in any mode: it computes every tile again and keeps none.
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from fclayers._util.dtypes import accumulation_dtype
from fclayers._util.meshes import varying_with
from fclayers.heads.chunks import Grid, walk
from fclayers.heads.label_functions import Traced, call_labels
from fclayers.heads.statistics import Statistic, Tile
from fclayers.kernels.product import matrix_product
from fclayers.weights.form import Weight, axes, dense, multiply

Features = tuple[Array, ...]


class Head(NamedTuple):
    """A layer as weights with one input and one output axis, the classes, and a bias."""

    weights: tuple[Weight, ...]
    bias: Any


class Operands(NamedTuple):
    """What a pass reads; all but the first three are `None` where no statistic needs them.

    Attributes:
        heads: One head, or two with the same classes.
        features: For every head the features that its weights multiply, each `(rows, n)`.
        classes: The number of the first class; of a tile, those of all, `(classes,)`.
        temperature: What the logits are divided by, `(rows,)`.
        counts: Which rows have labels that count, `(rows,)`, if these are probabilities.
        labels: As in `Tile`, and so are the others; or what the functions of `Settings` close over.
    """

    heads: tuple[Head, ...]
    features: tuple[Features, ...]
    classes: Any
    temperature: Any = None
    counts: Any = None
    labels: Any = None
    class_weights: Any = None
    keys: Any = None
    log_sums: Any = None


class Settings(NamedTuple):
    """Static configuration: `dtypes` are those in which the heads multiply, `labels` functions."""

    grid: Grid
    on_one_device: bool
    softcap: float | None
    dtypes: tuple[DTypeLike, ...]
    precision: lax.PrecisionLike
    labels: tuple[Traced, ...] = ()


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def run_pass(statistic: Statistic, settings: Settings, operands: Operands) -> PyTree:
    """The statistic of every row, a tree of arrays `(rows, ...)`."""

    def add(part: tuple[Operands, None], value: PyTree) -> PyTree:
        more = statistic.of(_tile(settings, part[0]))
        return statistic.merge(jax.tree.map(lambda *a: jnp.stack(a), value, more))

    dtype = jnp.result_type(*map(_wide, settings.dtypes))
    start = statistic.start(settings.grid.rows.total, dtype)
    return _walk(add, settings, operands, None, start)


@partial(run_pass.defjvp, symbolic_zeros=True)
def _run_pass_jvp(
    statistic: Statistic,
    settings: Settings,
    primals: tuple[Operands],
    tangents: tuple[PyTree],
) -> tuple[PyTree, PyTree]:
    value = run_pass(statistic, settings, *primals)
    arrays, structure = jax.tree.flatten(primals[0])
    dots = jax.tree.leaves(tangents[0], is_leaf=_is_zero)
    moving = [i for i, dot in enumerate(dots) if not _is_zero(dot)]

    def sums(moved: list[Array]) -> list[Array]:
        changed = list(arrays)
        for i, array in zip(moving, moved, strict=True):
            changed[i] = array
        operands = jax.tree.unflatten(structure, changed)

        def add(part: tuple[Operands, PyTree], total: list[Array]) -> list[Array]:
            more = statistic.sums(_tile(settings, part[0]), part[1])
            return [a + b for a, b in zip(total, jax.tree.leaves(more), strict=True)]

        start = [jnp.zeros_like(a) for a in jax.tree.leaves(value) if _is_inexact(a)]
        found: list[Array] = _walk(add, settings, operands, value, start)
        return found

    _, found = jax.jvp(sums, ([arrays[i] for i in moving],), ([dots[i] for i in moving],))
    floats = iter(found)
    return value, jax.tree.map(
        lambda a: next(floats) if _is_inexact(a) else np.zeros(a.shape, jax.dtypes.float0), value
    )


def _walk(step: Any, settings: Settings, operands: Operands, value: PyTree, carry: Any) -> Any:
    def names(part: tuple[Operands, PyTree]) -> tuple[Operands, PyTree]:
        return _names(part[0]), jax.tree.map(lambda _: "row", part[1])

    def of_columns(part: tuple[Operands, PyTree], places: Array) -> tuple[Operands, PyTree]:
        classes, labels = part[0].classes + places, part[0].labels
        if settings.labels:
            labels = call_labels(settings.labels, labels, classes)
        # Cotangents of weights are sums over rows, which half precision would round.
        heads = tuple(
            jax.tree.map(lambda a, d=d: a.astype(_wide(d)) if _is_inexact(a) else a, head)
            for head, d in zip(part[0].heads, settings.dtypes, strict=True)
        )
        return part[0]._replace(heads=heads, classes=classes, labels=labels), part[1]

    carry = varying_with(operands, carry)
    return walk(step, settings.grid, (operands, value), names, carry, of_columns=of_columns)


def _names(operands: Operands) -> Operands:
    """The names of the axes of every array, of which `"row"` and `"out"` are cut."""
    heads = [
        Head(
            tuple(axes(weight, 1) for weight in head.weights), None if head.bias is None else "out"
        )
        for head in operands.heads
    ]
    names = Operands(
        tuple(heads),
        jax.tree.map(lambda _: "row in", operands.features),
        classes="",
        temperature="row",
        counts="row",
        labels=_names_of_labels(operands.labels),
        class_weights="out",
        keys="row",
        log_sums=jax.tree.map(lambda _: "row", operands.log_sums),
    )
    return Operands(*(None if a is None else n for a, n in zip(operands, names, strict=True)))  # type: ignore[arg-type]


def _names_of_labels(labels: Any) -> Any:
    if isinstance(labels, tuple):
        return jax.tree.map(lambda _: "", labels)
    return "row" if labels is None or labels.ndim == 1 else "row out"


def _tile(settings: Settings, operands: Operands) -> Tile:
    heads = zip(operands.heads, operands.features, settings.dtypes, strict=True)
    logits = tuple(_logits(*each, settings.precision) for each in heads)
    if settings.softcap is not None:
        cap = settings.softcap
        logits = tuple(cap * jnp.tanh(z / cap) for z in logits)
    if operands.temperature is not None:
        inverse = (1 / operands.temperature)[:, None]
        logits = tuple(z * inverse.astype(z.dtype) for z in logits)
    if operands.counts is not None:
        labels = jnp.where(operands.counts[:, None], operands.labels, 0)
        operands = operands._replace(labels=labels)
    return Tile(logits, operands.classes, settings.on_one_device, *operands[5:])


def _logits(
    head: Head, features: Features, dtype: DTypeLike, precision: lax.PrecisionLike
) -> Array:
    pairs = zip(head.weights, features, strict=True)
    products = [_product(dtype, precision, weight, f) for weight, f in pairs]
    z = reduce(jnp.add, products)
    return z if head.bias is None else z + head.bias


def _product(dtype: DTypeLike, precision: lax.PrecisionLike, weight: Weight, f: Array) -> Array:
    if accumulation_dtype(dtype) is None:
        return multiply(weight, f, 1, precision)
    return _narrow_product(dtype, precision, weight, f)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _narrow_product(
    dtype: DTypeLike, precision: lax.PrecisionLike, weight: Weight, f: Array
) -> Array:
    """The product in half precision of arrays that are float32, and so are their cotangents."""
    return multiply(weight, f.astype(dtype), 1, precision)


@_narrow_product.defjvp
def _narrow_product_jvp(
    dtype: DTypeLike, precision: lax.PrecisionLike, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    def product(weight: Weight, f: Array) -> Array:
        return matrix_product(f, dense(weight, 1).astype(f.dtype), precision)

    return _narrow_product(dtype, precision, *primals), jax.jvp(product, primals, tangents)[1]


def _wide(dtype: DTypeLike) -> DTypeLike:
    return accumulation_dtype(dtype) or dtype


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _is_inexact(array: Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.inexact))
