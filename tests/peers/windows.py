"""The windows cut out one by one, which the tests of `slide` compare with."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

KEY = jax.random.key(0, impl="unsafe_rbg")  # the generator that compiles fastest


def naive(fun, window, *, stride=1, axes=(0, 1)):
    """`fun` of every window, cut out one by one."""

    def every_window(params, image):
        rows, columns = (
            range(0, image.shape[axis] - size + 1, stride)
            for axis, size in zip(axes, window, strict=True)
        )
        at = [slice(None)] * image.ndim
        windows = []
        for row in rows:
            for column in columns:
                at[axes[0]] = slice(row, row + window[0])
                at[axes[1]] = slice(column, column + window[1])
                windows.append(image[tuple(at)])
        stacked = np.stack(windows) if isinstance(image, np.ndarray) else jnp.stack(windows)
        y = one_by_one(fun, params, stacked)
        return y.reshape(len(rows), len(columns), *y.shape[1:])

    return every_window


@eqx.filter_jit
def one_by_one(fun, params, windows):
    return jax.vmap(lambda window: fun(params, window))(windows)


def assert_close(actual, expected, tolerance=1e-5):
    """Equal up to rounding, relative to the largest magnitude."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def shaken(tree):
    """Statistics, scales and biases as training leaves them: not all zeros and ones."""
    rng = np.random.default_rng(0)

    def shake(x):
        is_vector = x.size == max(x.shape, default=1)
        return x + jnp.array(rng.uniform(0.1, 0.9, x.shape), x.dtype) if is_vector else x

    return jax.tree.map(shake, tree)
