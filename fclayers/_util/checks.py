"""Argument checks, whose errors say what was expected and what was given."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fclayers._util.errors import BadType, BadValue


def check_key(key: Any) -> None:
    """Raises unless `key` is one random key, typed (`jax.random.key`) or raw uint32."""
    if is_array(key):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if len(key.shape) == (0 if typed else 1) and (typed or key.dtype == jnp.uint32):
            return
    raise BadType(f"expected one key from jax.random.key, got {describe(key)}")


def check_count(name: str, count: int) -> int:
    """Returns a number of features, which must be an integer >= 0."""
    try:
        valid = not isinstance(count, bool) and operator.index(count) >= 0
    except TypeError:
        valid = False
    if not valid:
        raise BadValue(f"{name} must be an integer >= 0, got {count!r}")
    return operator.index(count)


def check_features(name: str, features: int | Sequence[int]) -> tuple[int, ...]:
    """Returns a number of features, or one per feature axis, as a tuple."""
    counts = features if isinstance(features, (tuple, list)) else (features,)
    return tuple(check_count(name, count) for count in counts)


def check_sizes(name: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the sizes along one to three spatial axes, which must be a tuple."""
    if not isinstance(sizes, (tuple, list)) or not 1 <= len(sizes) <= 3:
        raise BadValue(
            f"{name} must be a tuple with one to three entries, such as (3, 3), got {sizes!r}"
        )
    if any(check_count(name, size) < 1 for size in sizes):
        raise BadValue(f"{name} must have entries >= 1, got {sizes}")
    return tuple(map(operator.index, sizes))


def check_dtype(dtype: DTypeLike) -> None:
    """Raises unless `dtype` is floating-point or complex, as parameters are."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise BadValue(f"dtype must be floating-point or complex, got {dtype}")


def is_array(x: Any) -> bool:
    """Whether `x` is an array, an abstract one included, or a scalar that `jit` made one."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def check_array(name: str, x: Any) -> None:
    """Raises unless `x` is an array."""
    if not is_array(x):
        raise BadType(f"expected {name} to be an array, got {describe(x)}")


def check_axes(axis: int | tuple[int, ...], shape: tuple[int, ...]) -> list[int]:
    """Returns the axes of an array of this shape, counted from the front."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    ndim = len(shape)
    for entry in axes:
        integer = isinstance(entry, (int, np.integer)) and type(entry) is not bool
        if not integer or not -ndim <= entry < ndim:
            raise BadValue(f"axis {entry!r} is not an axis of x, whose shape is {shape}")
    positive = [int(entry) % ndim for entry in axes]
    if len(set(positive)) < len(positive):
        raise BadValue(f"axis {axis} names an axis of x twice; x has shape {shape}")
    return positive


def describe(value: Any) -> str:
    """An array by dtype and shape, anything else by type, for error messages."""
    if is_array(value):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    kind = type(value).__name__
    return f"{value!r} of type {kind}" if np.isscalar(value) else kind
