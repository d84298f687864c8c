"""The multilayer perceptron: fully connected layers with an activation between them."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Key, Num

from fclayers._util.checks import check_count, check_key, describe
from fclayers._util.errors import BadType, BadValue, public
from fclayers._util.jit import jit
from fclayers._util.trees import is_layer
from fclayers.linear import LinearParams, apply_linear, init_linear

Activation = Callable[[Array], Array]


@public
def init_mlp(
    key: Key[Array, ""],
    sizes: Sequence[int],
    *,
    bias: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[LinearParams, ...]:
    """Makes the parameters of a multilayer perceptron, one `LinearParams` per layer.

    Args:
        key: A key from `jax.random.key`.
        sizes: Number of features from the input, through the hidden layers, to the output:
            `[in, hidden..., out]`.
        bias: Whether the layers have biases.
        weight_init: As in `init_linear`, for every layer.
        bias_init: As in `init_linear`, for every layer.
        dtype: As in `init_linear`.

    Returns:
        A tuple of `len(sizes) - 1` layers; layer `i` has a weight `(sizes[i], sizes[i + 1])`.

    Raises:
        TypeError: `key` is not a random key.
        ValueError: `sizes` has fewer than two entries, or one that is not an integer >= 0.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> [layer.weight.shape for layer in fc.init_mlp(jax.random.key(0), [64, 128, 10])]
        [(64, 128), (128, 10)]
    """
    check_key(key)
    if not isinstance(sizes, Sequence) or len(sizes) < 2:
        raise BadValue(f"sizes must have at least two entries, [in, hidden..., out], got {sizes!r}")
    sizes = [check_count(f"sizes[{i}]", size) for i, size in enumerate(sizes)]
    return tuple(
        init_linear(
            layer_key,
            in_features,
            out_features,
            bias=bias,
            weight_init=weight_init,
            bias_init=bias_init,
            dtype=dtype,
        )
        for layer_key, in_features, out_features in zip(
            jax.random.split(key, len(sizes) - 1), sizes[:-1], sizes[1:], strict=True
        )
    )


@jit("activation", "final_activation", "dropout_rate", "dtype", "precision")
def apply_mlp(
    params: Sequence[LinearParams],
    x: Num[Array, "*batch in"],
    *,
    activation: Activation = jax.nn.relu,
    final_activation: Activation | None = None,
    dropout_rate: float = 0.0,
    key: Key[Array, ""] | None = None,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
) -> Num[Array, "*batch out"]:
    """Applies a multilayer perceptron.

    Args:
        params: The layers, as from `init_mlp`, with weights in any form.
        x: Input, features on the last axis, any number of batch axes.
        activation: Applied after every layer but the last. A new function object for every
            call (a `lambda` in a loop) causes retracing.
        final_activation: Applied after the last layer. Default: none, the outputs are logits.
        dropout_rate: Probability that a hidden unit is zero; the others are divided by
            `1 - dropout_rate`. Zero, the default, for evaluation.
        key: A random key, required by dropout; pass a fresh one at each step.
        dtype: Compute dtype, as in `apply_linear`.
        precision: As in `apply_linear`.

    Returns:
        Array of shape `(*batch, out)`, without `final_activation` the logits.

    Raises:
        TypeError: `params` is not a sequence of layers, or `key` is not a random key.
        ValueError: The features of `x` are not the first layer's, `dropout_rate` is outside
            [0, 1), or dropout is asked for without a key.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_mlp(jax.random.key(0), [64, 128, 10])
        >>> fc.apply_mlp(params, jnp.ones((32, 64))).shape
        (32, 10)
        >>> key = jax.random.key(1)
        >>> fc.apply_mlp(params, jnp.ones((32, 64)), dropout_rate=0.5, key=key).shape
        (32, 10)

    Source of dropout:
    `Srivastava et al. 2014 <https://jmlr.org/papers/v15/srivastava14a.html>`_.
    """
    if not isinstance(params, (tuple, list)) or is_layer(params):
        raise BadType(
            f"expected params to be a sequence of layers such as LinearParams, "
            f"got {describe(params)}"
        )
    if not params:
        raise BadValue("expected at least one layer, got none")
    if not 0 <= dropout_rate < 1:
        raise BadValue(f"dropout_rate must be in [0, 1), got {dropout_rate}")
    if dropout_rate > 0:
        if key is None:
            raise BadValue(f"dropout_rate={dropout_rate} needs a key, got key=None")
        check_key(key)
    *hidden_layers, last_layer = params
    for i, layer in enumerate(hidden_layers):
        x = activation(apply_linear(layer, x, dtype=dtype, precision=precision))
        if key is not None and dropout_rate > 0:
            x = _dropout(jax.random.fold_in(key, i), x, dropout_rate)
    x = apply_linear(last_layer, x, dtype=dtype, precision=precision)
    return x if final_activation is None else final_activation(x)


def _dropout(key: Array, x: Array, rate: float) -> Array:
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)
