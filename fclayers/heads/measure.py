"""Statistics of the logits of layers: from arguments of public functions to a pass, and back."""

from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from fclayers._util.checks import check_count
from fclayers._util.dtypes import accumulation_dtype
from fclayers._util.errors import BadValue
from fclayers._util.meshes import auto_devices, mesh_of
from fclayers.heads.chunks import choose_grid, chunk_lengths
from fclayers.heads.label_functions import LabelFunction, Traced, trace_labels
from fclayers.heads.passes import Features, Head, Operands, Settings, run_pass
from fclayers.heads.shards import Inputs, per_shard
from fclayers.heads.statistics import Statistic
from fclayers.linear import LinearParams, check_input, rows_of_features
from fclayers.weights.form import by_columns, terms


class Options(NamedTuple):
    """The arguments that all functions of heads share."""

    axis: int | tuple[int, ...]
    chunk_size: int | None
    row_chunk_size: int | None
    dtype: DTypeLike | None
    precision: lax.PrecisionLike
    softcap: float | None = None


class Rows(NamedTuple):
    """Arrays `(*batch)`, or `None`.

    Where `counts` is false, the input is taken as zeros; `numbers` tell the positions apart; the
    others are those of `Operands`.
    """

    counts: Any = None
    temperature: Any = None
    labels: Any = None
    numbers: Any = None
    log_sums: Any = None


class Checked(NamedTuple):
    """A layer whose weight can be sliced by classes, their number, the batch, the compute dtype."""

    params: LinearParams
    classes: int
    batch: tuple[int, ...]
    dtype: DTypeLike


def check_head(params: LinearParams, x: Array, options: Options) -> Checked:
    """Checks a layer, its input, and how to compute it."""
    contracted, (in_shape, out_shape), dtype = check_input(params, x, options.axis, options.dtype)
    if len(out_shape) != 1:
        raise BadValue(
            f"expected a layer with one output axis, the classes, got outputs of shape {out_shape}"
        )
    for name, size in zip(("chunk_size", "row_chunk_size"), options[1:3], strict=True):
        if size is not None and check_count(name, size) < 1:
            raise BadValue(f"{name} must be at least 1, got {size}")
    if options.softcap is not None and not 0 < options.softcap < float("inf"):
        raise BadValue(f"softcap must be > 0, got {options.softcap}")
    params = params._replace(weight=by_columns(params.weight, len(in_shape)))
    batch = tuple(size for a, size in enumerate(x.shape) if a not in contracted)
    return Checked(params, out_shape[0], batch, dtype)


def measure(
    statistic: Statistic,
    options: Options,
    layers: tuple[LinearParams, ...],
    inputs: tuple[Array, ...],
    *,
    rows: Rows,
    class_weights: Array | None = None,
    probabilities: Array | LabelFunction | None = None,
    key: Array | None = None,
    at_least: int = 1,
) -> PyTree:
    """The statistic of the logits of layers that `check_head` returned, arrays `(*batch, ...)`.

    `class_weights` is `(classes,)`, `probabilities` `(*batch, classes)` instead of labels, or a
    function that gives them; with a `key`, every row gets its own, by its number. A chunk has
    `at_least` so many classes.
    """
    soft = probabilities is not None
    label_function = probabilities if callable(probabilities) else None
    if label_function is not None:
        probabilities = None

    def of_shard(shard: Any, arguments: Inputs) -> PyTree:
        layers, inputs, rows, class_weights, probabilities, key = arguments
        _, classes, batch, _ = check_head(layers[0], inputs[0], options)
        flat: Rows = jax.tree.map(lambda a: a.reshape(prod(batch)), rows)
        heads, features, dtypes = zip(*map(read, layers, inputs), strict=True)
        if flat.counts is not None:
            features = jax.tree.map(lambda f: jnp.where(flat.counts[:, None], f, 0), features)
        if probabilities is not None:
            probabilities = probabilities.reshape(prod(batch), classes)
        keys = None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, flat.numbers)
        devices = auto_devices(arguments)
        grid = choose_grid(
            prod(batch),
            classes,
            sum(f.shape[1] for f in jax.tree.leaves(features)),
            row_chunk_size=options.row_chunk_size,
            chunk_size=options.chunk_size,
            devices=devices,
            at_least=at_least,
            all_rows=label_function is not None,
        )
        labels = flat.labels if probabilities is None else probabilities
        traced: tuple[Traced, ...] = ()
        if label_function is not None:
            traced, labels = trace_labels(label_function, chunk_lengths(grid.classes), batch)
        operands = Operands(
            heads,
            features,
            jnp.asarray(shard * classes, jnp.int32),
            flat.temperature,
            flat.counts if soft else None,
            labels,
            class_weights,
            keys,
            flat.log_sums,
        )
        settings = Settings(grid, devices == 1, options.softcap, dtypes, options.precision, traced)
        found = run_pass(statistic, settings, operands)
        return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), found)

    def read(params: LinearParams, x: Array) -> tuple[Head, Features, DTypeLike]:
        x, (in_shape, _), dtype = rows_of_features(params, x, options.axis, options.dtype)
        x = x.reshape(prod(x.shape[:-1]), x.shape[-1])
        pairs = terms(params.weight, x, len(in_shape), options.precision)
        features, weights = zip(*pairs, strict=True)
        # Cotangents of features are sums over chunks, which half precision would round.
        wide = accumulation_dtype(dtype) or dtype
        bias = None if params.bias is None else params.bias.astype(dtype)
        return Head(weights, bias), tuple(f.astype(wide) for f in features), dtype

    arguments = Inputs(layers, inputs, rows, class_weights, probabilities, key)
    if label_function is not None and mesh_of(arguments) is not None:
        raise BadValue("labels must be an array on a mesh with explicit axes, got a function")
    return per_shard(of_shard, statistic.merge, options.axis, arguments)
