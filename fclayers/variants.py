"""Smaller forms of the fully connected layer: low-rank, with an adapter, in 8-bit integers.

Each function takes one layer or a whole tree of parameters; what runs them is `apply_linear`.
"""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from fclayers._checks import check_count, check_key
from fclayers._initial import draw, symmetric_uniform
from fclayers._tree import Where, path_name, replace_layers
from fclayers.forms import (
    Layer,
    LinearParams,
    LoraParams,
    LowRankParams,
    QuantizedParams,
    check_layer,
    dense,
    is_form,
)


def low_rank(
    params: Any,
    *,
    rank: int | None = None,
    energy: float | None = None,
    where: Where | None = None,
) -> Any:
    """Replaces weights by the products of two narrow ones that are nearest to them.

    Args:
        params: A layer, or any tree with layers in it.
        rank: Number of columns of the first and rows of the second weight.
        energy: Instead of a rank, the share in (0, 1] of the sum of squares of the weight's
            singular values that the smallest sufficient rank keeps: the relative squared error is
            at most `1 - energy`. The weights must be at hand then, not traced by `jit`.
        where: A predicate on the path of a layer, such as `"classifier.0"`, that chooses layers.
            Default: all of them.

    Returns:
        The tree with `LowRankParams` in place of the chosen layers. `reconstruction_error` tells
        how much was lost.

    Raises:
        ValueError: Not exactly one of `rank` and `energy` is given or it is out of range, the rank
            is larger than a matrix, no layer is chosen, or a weight is not finite.
        TypeError: A chosen layer is not a `LinearParams`.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.init_linear(jax.random.key(0), 4096, 1000)
        >>> shapes = jax.eval_shape(lambda: fc.low_rank(layer, rank=64))
        >>> shapes.down.shape, shapes.up.shape
        ((4096, 64), (64, 1000))

    Source: truncated SVD of fully connected layers, section 3.1 of
    `Girshick 2015, Fast R-CNN <https://arxiv.org/abs/1504.08083>`_.
    """
    name = "low_rank"
    if (rank is None) == (energy is None):
        raise ValueError(f"{name}: give either rank or energy, got {rank=} and {energy=}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"{name}: energy must be in (0, 1], got {energy}")

    def factor(layer_name: str, layer: Layer) -> LowRankParams:
        weight, bias, (in_shape, out_shape) = _plain_layer(name, layer_name, layer)
        if rank is not None:
            _check_rank(name, layer_name, rank, in_shape, out_shape)
        matrix = weight.reshape(prod(in_shape), prod(out_shape)).astype(_wide(weight))
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        kept = _sufficient_rank(s, energy) if energy is not None else rank
        root = jnp.sqrt(s[:kept])
        down, up = u[:, :kept] * root, root[:, None] * vt[:kept]
        return LowRankParams(
            down.reshape(*in_shape, kept).astype(weight.dtype),
            up.reshape(kept, *out_shape).astype(weight.dtype),
            bias,
        )

    return replace_layers(name, params, where, factor)


def add_lora(
    key: Key[Array, ""], params: Any, rank: int, alpha: float, *, where: Where | None = None
) -> Any:
    """Puts a trainable adapter beside layers; the outputs are unchanged until it is trained.

    Args:
        key: A key from `jax.random.key`.
        params: A layer of any other form, or any tree with layers in it.
        rank: Number of features between the adapter's two weights.
        alpha: The adapter's output is multiplied by `alpha / rank`.
        where: As in `low_rank`.

    Returns:
        The tree with `LoraParams` in place of the chosen layers: `down` uniform on ±1/√fan-in, `up`
        zero, in the dtype of the layer's weight.

    Raises:
        TypeError: `key` is not a random key, or a chosen layer has an adapter.
        ValueError: The rank is larger than a matrix, or no layer is chosen.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> mlp = fc.init_mlp(jax.random.key(0), [64, 128, 10])
        >>> adapted = fc.add_lora(jax.random.key(1), mlp, rank=4, alpha=8)
        >>> adapted[0].down.shape, adapted[0].up.shape
        ((64, 4), (4, 128))

    Source: `Hu et al. 2021, LoRA <https://arxiv.org/abs/2106.09685>`_.
    """
    name = "add_lora"
    check_key(name, key)
    keys = iter(_keys(key))

    def adapt(layer_name: str, layer: Layer) -> LoraParams:
        if isinstance(layer, LoraParams):
            raise TypeError(f"{name}: {layer_name} has an adapter; merge_lora it first")
        in_shape, out_shape = check_layer(name, layer)
        _check_rank(name, layer_name, rank, in_shape, out_shape)
        dtype = (layer.scale if isinstance(layer, QuantizedParams) else layer[0]).dtype
        fan_in = prod(in_shape)
        down = draw(symmetric_uniform(fan_in=fan_in), next(keys), (fan_in, rank), dtype)
        up = jnp.zeros((rank, *out_shape), dtype)
        return LoraParams(
            layer, down.reshape(*in_shape, rank), up, jnp.asarray(alpha / rank, dtype)
        )

    return replace_layers(name, params, where, adapt)


def merge_lora(params: Any, *, where: Where | None = None) -> Any:
    """Adds adapters to the weights they are beside.

    Args:
        params: A `LoraParams`, or any tree with some in it.
        where: As in `low_rank`.

    Returns:
        The tree with `LinearParams` in place of the chosen `LoraParams`; a base of another form is
        written out.

    Raises:
        ValueError: No layer with an adapter is chosen.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.init_linear(jax.random.key(0), 64, 10)
        >>> adapted = fc.add_lora(jax.random.key(1), layer, rank=4, alpha=8)
        >>> bool((fc.merge_lora(adapted).weight == layer.weight).all())
        True
    """
    return replace_layers(
        "merge_lora", params, where, lambda _, layer: dense(layer), among=LoraParams
    )


def lora_mask(params: Any) -> Any:
    """Marks what trains when only adapters do.

    Args:
        params: Any tree of parameters.

    Returns:
        The same tree of booleans: true for `down` and `up` of every `LoraParams`, else false. To
        train only those, `optax.partition({True: optimizer, False: optax.set_to_zero()}, mask)`.
        (`optax.masked` alone passes the others' gradients on as they are.)

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.init_linear(jax.random.key(0), 64, 10)
        >>> mask = fc.lora_mask(fc.add_lora(jax.random.key(1), layer, rank=4, alpha=8))
        >>> mask.base, mask.down, mask.up, mask.scale
        (LinearParams(weight=False, bias=False), True, True, False)
    """

    def mark(node: Any) -> Any:
        frozen = jax.tree.map(lambda _: False, node)
        return frozen._replace(down=True, up=True) if isinstance(node, LoraParams) else frozen

    return jax.tree.map(mark, params, is_leaf=lambda node: isinstance(node, LoraParams))


def quantize(params: Any, *, block_size: int | None = None, where: Where | None = None) -> Any:
    """Rounds weights to 8-bit integers times a scale.

    Args:
        params: A layer, or any tree with layers in it.
        block_size: Number of consecutive inputs (of the weight's input axes, flattened) that share
            a scale; it must divide their number. Default: all inputs of an output share one.
        where: As in `low_rank`.

    Returns:
        The tree with `QuantizedParams` in place of the chosen layers; the scale has the weight's
        dtype, the bias is kept. No weight is off by more than half its scale, which is the largest
        absolute value of those that share it over 127, rounded up.

    Raises:
        TypeError: A chosen layer is not a `LinearParams`.
        ValueError: `block_size` does not divide the inputs, a weight is complex or, unless it is
            traced by `jit`, not finite, or no layer is chosen.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.quantize(fc.init_linear(jax.random.key(0), 4096, 1000), block_size=64)
        >>> layer.weight.dtype, layer.weight.shape, layer.scale.shape
        (dtype('int8'), (4096, 1000), (64, 1000))

    Source: symmetric absolute-maximum quantization, section 2.1 of
    `Dettmers et al. 2022, LLM.int8() <https://arxiv.org/abs/2208.07339>`_.
    """
    name = "quantize"
    if block_size is not None and check_count(name, "block_size", block_size) < 1:
        raise ValueError(f"{name}: block_size must be at least 1, got {block_size}")

    def to_int8(layer_name: str, layer: Layer) -> QuantizedParams:
        weight, bias, (in_shape, out_shape) = _plain_layer(name, layer_name, layer)
        fan_in, fan_out = prod(in_shape), prod(out_shape)
        if jnp.iscomplexobj(weight):
            raise ValueError(f"{name}: the weight of {layer_name} is complex")
        if fan_in % (block_size or 1):
            raise ValueError(
                f"{name}: block_size={block_size} does not divide the {fan_in} inputs of "
                f"{layer_name}, whose weight has shape {weight.shape}"
            )
        blocks = fan_in // block_size if block_size else 1
        rounded, scale = _round_blocks(weight.reshape(blocks, fan_in // blocks, fan_out))
        scale = scale.reshape(blocks, *out_shape)
        return QuantizedParams(rounded.reshape(weight.shape), scale, bias)

    return replace_layers(name, params, where, to_int8)


def dequantize(params: Any, *, where: Where | None = None) -> Any:
    """Writes quantized layers out as plain ones.

    Args:
        params: A `QuantizedParams`, or any tree with some in it.
        where: As in `low_rank`.

    Returns:
        The tree with `LinearParams`, in the scale's dtype, in place of the chosen layers.

    Raises:
        ValueError: No quantized layer is chosen.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.quantize(fc.init_linear(jax.random.key(0), 64, 10))
        >>> fc.dequantize(layer).weight.dtype
        dtype('float32')
    """
    return replace_layers(
        "dequantize", params, where, lambda _, layer: dense(layer), among=QuantizedParams
    )


def reconstruction_error(params: Any, other: Any) -> dict[str, float]:
    """Returns the relative error of every layer's weight after a change of form.

    Args:
        params: A layer, or any tree with layers in it.
        other: The same tree with some layers in other forms.

    Returns:
        For every layer's path, `‖W' - W‖ / ‖W‖` in the Frobenius norm; 0 where both are 0.

    Raises:
        ValueError: The trees do not have the same layers.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> mlp = fc.init_mlp(jax.random.key(0), [64, 128, 10])
        >>> errors = fc.reconstruction_error(mlp, fc.quantize(mlp))
        >>> {path: round(error, 3) for path, error in errors.items()}
        {'0': 0.004, '1': 0.004}
    """
    before, after = (
        {
            path_name(path): dense(node).weight
            for path, node in jax.tree.leaves_with_path(tree, is_leaf=is_form)
            if is_form(node)
        }
        for tree in (params, other)
    )
    shapes = [{path: w.shape for path, w in weights.items()} for weights in (before, after)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"reconstruction_error: expected the same layers, got {shapes[0]} and {shapes[1]}"
        )

    return {path: relative_difference(before[path], after[path]) for path in before}


def relative_difference(expected: Any, actual: Any) -> float:
    """Returns `‖actual - expected‖ / ‖expected‖`, 0 where both are 0."""
    expected, actual = (np.asarray(array, np.complex128) for array in (expected, actual))
    difference = float(np.linalg.norm(actual - expected))
    return difference / float(np.linalg.norm(expected)) if difference else 0.0


def _plain_layer(function: str, layer_name: str, layer: Layer) -> tuple[Array, Any, Any]:
    """Weight, bias and shapes of a plain, finite layer."""
    if not isinstance(layer, LinearParams):
        raise TypeError(
            f"{function}: expected {layer_name} to be LinearParams, "
            f"it is already {type(layer).__name__}"
        )
    shapes = check_layer(function, layer)
    weight, bias = layer
    if not isinstance(weight, jax.core.Tracer) and not np.isfinite(np.asarray(weight)).all():
        raise ValueError(f"{function}: the weight of {layer_name} has infinities or NaNs")
    return weight, bias, shapes


def _check_rank(
    function: str, layer_name: str, rank: int, in_shape: tuple[int, ...], out_shape: tuple[int, ...]
) -> None:
    largest = min(prod(in_shape), prod(out_shape))
    if not 1 <= check_count(function, "rank", rank) <= largest:
        raise ValueError(
            f"{function}: rank must be from 1 to {largest} for {layer_name}, whose weight has "
            f"shape {in_shape + out_shape}, got {rank}"
        )


def _sufficient_rank(s: Array, energy: float) -> int:
    """The smallest rank that keeps this share of the sum of squares, at least 1."""
    left = np.cumsum(np.asarray(s, np.float64)[::-1] ** 2)[::-1]
    return max(1, int(np.sum(left > (1 - energy) * left[0]))) if len(left) else 0


def _keys(key: Array) -> Any:
    """Keys without end, the same for the first layer whatever follows."""
    number = 0
    while True:
        yield jax.random.fold_in(key, number)
        number += 1


def _wide(weight: Array) -> Any:
    return jnp.promote_types(weight.dtype, jnp.float32)


@jax.jit
def _round_blocks(weight: Float[Array, "blocks size out"]) -> tuple[Array, Array]:
    """The nearest multiples of a scale per block and output, as int8, and the scales."""
    wide = weight.astype(_wide(weight))
    largest = jnp.abs(wide).max(1, initial=0)
    # A smaller step would be flushed to zero.
    step = jnp.maximum(largest / 127, np.finfo(wide.dtype).tiny)
    scale = _round_up(jnp.where(largest > 0, step, 0), weight.dtype)
    divisor = jnp.where(scale > 0, scale, 1).astype(wide.dtype)
    return jnp.round(wide / divisor[:, None]).clip(-127, 127).astype(jnp.int8), scale


def _round_up(values: Array, dtype: Any) -> Array:
    """Rounds to `dtype`, never down."""
    rounded = values.astype(dtype)
    return jnp.where(rounded < values, jnp.nextafter(rounded, jnp.asarray(jnp.inf, dtype)), rounded)
