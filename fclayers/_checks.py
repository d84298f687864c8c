"""Argument checks that name the function, what it expected and what came."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def check_key(function: str, key: Any) -> None:
    """Raises unless `key` is one random key, typed (`jax.random.key`) or raw uint32."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is not None and shape is not None:
        if jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ():
            return
        if dtype == jnp.uint32 and len(shape) == 1:
            return
    raise TypeError(f"{function}: expected one key from jax.random.key, got {describe(key)}")


def check_count(function: str, name: str, count: int) -> int:
    """Returns a number of features, which must be an integer >= 0."""
    try:
        valid = not isinstance(count, bool) and operator.index(count) >= 0
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"{function}: {name} must be an integer >= 0, got {count!r}")
    return operator.index(count)


def check_features(function: str, name: str, features: int | Sequence[int]) -> tuple[int, ...]:
    """Returns a number of features, or one per feature axis, as a tuple."""
    counts = features if isinstance(features, (tuple, list)) else (features,)
    return tuple(check_count(function, name, count) for count in counts)


def check_dtype(function: str, dtype: DTypeLike) -> None:
    """Raises unless `dtype` is floating-point or complex, as parameters are."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(f"{function}: dtype must be floating-point or complex, got {dtype}")


def check_array(function: str, name: str, x: Any) -> None:
    """Raises unless `x` is an array (or a scalar that `jit` made one)."""
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise TypeError(f"{function}: expected {name} to be an array, got {describe(x)}")


def check_axes(function: str, axis: int | tuple[int, ...], shape: tuple[int, ...]) -> list[int]:
    """Returns the axes of an array of this shape, counted from the front."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    ndim = len(shape)
    for entry in axes:
        if (
            type(entry) is bool
            or not isinstance(entry, (int, np.integer))
            or not -ndim <= entry < ndim
        ):
            raise ValueError(
                f"{function}: axis {entry!r} is not an axis of x, whose shape is {shape}"
            )
    positive = [int(entry) % ndim for entry in axes]
    if len(set(positive)) < len(positive):
        raise ValueError(f"{function}: axis {axis} names an axis of x twice; x has shape {shape}")
    return positive


def describe(value: Any) -> str:
    """An array by dtype and shape, anything else by type, for error messages."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    return (
        f"{value!r} of type {type(value).__name__}" if np.isscalar(value) else type(value).__name__
    )
