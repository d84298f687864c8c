"""The largest outputs of a fully connected layer, without materializing the logits."""

from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Int, Num

from fclayers._util.checks import check_count
from fclayers._util.errors import BadValue
from fclayers._util.jit import jit
from fclayers._util.meshes import auto_devices, mesh_of
from fclayers.heads.measure import Checked, Options, Rows, check_head, measure
from fclayers.heads.statistics import Largest, largest
from fclayers.linear import LinearParams


@jit("axis", "chunk_size", "row_chunk_size", "dtype", "precision")
def linear_argmax(
    params: LinearParams,
    x: Num[Array, "*batch_and_in"],
    *,
    axis: int | tuple[int, ...] = -1,
    chunk_size: int | None = None,
    row_chunk_size: int | None = None,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
) -> Int[Array, "*batch"]:
    """The class with the largest logit, without materializing the logits.

    Equal to `apply_linear(params, x).argmax(-1)`.

    Args:
        params: As in `linear_cross_entropy`.
        x: Input.
        axis: As in `apply_linear`.
        chunk_size: As in `linear_cross_entropy`.
        row_chunk_size: As in `linear_cross_entropy`.
        dtype: As in `apply_linear`.
        precision: As in `apply_linear`.

    Returns:
        int32 array of shape `(*batch)`; of equal logits the first wins, and NaN wins over all.

    Raises:
        TypeError: `params` is not a `LinearParams`.
        ValueError: `params` has several output axes or no class, or an argument is out of range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_linear(jax.random.key(0), 64, 50_000)
        >>> fc.linear_argmax(params, jnp.ones((8, 64))).shape
        (8,)
    """
    options = Options(axis, chunk_size, row_chunk_size, dtype, precision)
    best: Array = largest_logits(check_head(params, x, options), x, 1, options).classes[..., 0]
    return best


@jit("k", "axis", "chunk_size", "row_chunk_size", "dtype", "precision")
def linear_top_k(
    params: LinearParams,
    x: Num[Array, "*batch_and_in"],
    k: int,
    *,
    axis: int | tuple[int, ...] = -1,
    chunk_size: int | None = None,
    row_chunk_size: int | None = None,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
) -> tuple[Num[Array, "*batch k"], Int[Array, "*batch k"]]:
    """The `k` largest logits and their classes, without materializing the logits.

    Equal to `lax.top_k(apply_linear(params, x), k)`.

    Args:
        params: As in `linear_cross_entropy`.
        x: Input.
        k: How many, at most the number of classes.
        axis: As in `apply_linear`.
        chunk_size: As in `linear_cross_entropy`; a chunk has at least `k` classes.
        row_chunk_size: As in `linear_cross_entropy`.
        dtype: As in `apply_linear`.
        precision: As in `apply_linear`.

    Returns:
        Logits and int32 classes, each of shape `(*batch, k)`, the largest first; of equal logits
        the first comes first, and NaN before all. The logits are differentiable.

    Raises:
        TypeError: `params` is not a `LinearParams`.
        ValueError: `params` has several output axes, or an argument is out of range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_linear(jax.random.key(0), 64, 50_000)
        >>> logits, classes = fc.linear_top_k(params, jnp.ones((8, 64)), 5)
        >>> logits.shape, classes.shape
        ((8, 5), (8, 5))
    """
    options = Options(axis, chunk_size, row_chunk_size, dtype, precision)
    head = check_head(params, x, options)
    logits, classes = largest_logits(head, x, k, options)
    return logits.astype(head.dtype), classes


def largest_logits(head: Checked, x: Array, k: int, options: Options) -> Largest:
    """The `k` largest logits of every position, and their classes; half precision gives float32."""
    if not 1 <= check_count("k", k) <= head.classes:
        raise BadValue(f"k must be from 1 to the {head.classes} classes, got {k}")
    arrays = head.params, x
    on_one_device = mesh_of(arrays) is None and auto_devices(arrays) == 1
    statistic = largest(k, in_order=on_one_device)
    found: Largest = measure(statistic, options, (head.params,), (x,), rows=Rows(), at_least=k)
    return found
