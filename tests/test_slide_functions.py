"""slide on functions of every kind: the cases that failed once, and random ones."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from slide_functions import Case, draw_case, run_case
from slide_operations import OPERATIONS

import fclayers as fc
from fclayers.sliding.rules import RULES

NUM_FUNCTIONS = int(os.environ.get("SLIDE_FUNCTIONS", "4"))
CHUNK = 25


@pytest.mark.parametrize("first", range(0, NUM_FUNCTIONS, CHUNK))
def test_random_functions(first):
    """`SLIDE_FUNCTIONS=2000 python -m pytest tests/test_slide_functions.py -k random`."""
    for seed in range(first, min(first + CHUNK, NUM_FUNCTIONS)):
        run_case(draw_case(seed, OPERATIONS))


def check(fun, shape, window, *, axes=None, stride=1, dtype=np.float32, exact=True, is_wide=False):
    """Holds `slide` of a function against the loop, eagerly and jitted."""
    axes = tuple(range(len(window))) if axes is None else axes
    image = np.random.default_rng(0).integers(-4, 5, shape).astype(dtype)
    strides = stride if isinstance(stride, tuple) else (stride,) * len(window)
    one = [slice(None)] * image.ndim
    for axis, size in zip(axes, window, strict=True):
        one[axis] = slice(size)
    results = jax.tree.leaves(jax.eval_shape(fun, image[tuple(one)]))
    run_case(Case(0, fun, window, strides, axes, image, [], [exact] * len(results), is_wide))


ONE = ((7,), (4,))
TWO = ((6, 7), (3, 4))
ONCE = ((7,), (1,))
FULL = ((3, 4), (3, 4))
NHC = ("NHC", "HIO", "NHC")


@pytest.mark.parametrize("stride", [1, 5])
def test_reshapes_with_dimensions(stride):
    def fun(w):
        return (
            w.ravel(order="F"),
            lax.reshape(w, (w.size,), dimensions=(1, 0)),
            lax.reshape(w, w.shape[::-1], dimensions=(1, 0)),
        )

    check(fun, *TWO, stride=stride)


def test_quantiles_over_several_axes():
    def fun(w):
        return (
            jnp.median(w, axis=(0, 1)),
            jnp.quantile(w, jnp.array([0.25, 0.6]), axis=(0, 1)),
            jnp.percentile(w, 30, axis=(2, 0)),
        )

    check(fun, (5, 6, 3), (3, 4), exact=False)


def test_arrays_without_elements():
    def fun(w):
        return {
            "none": (w[:0], w[:0].sum(), jnp.where(w[:0] > 0, 1, 2).max(initial=0) + w.max()),
            "some": (jnp.concatenate([w[:0], 2 * w, w[1:1]]), jnp.split(w, [0, 2])),
            "product": (w[:0].reshape(0, 5) @ jnp.ones((5, 2)), w[:, :0] @ jnp.ones((0, 2))),
            "scan": lax.scan(lambda c, x: (c + x, x), w[0], w[:0]),
        }

    check(fun, (7, 3), (4,))


def test_images_without_elements():
    check(lambda w: (w, w.sum(), w[0], jnp.pad(w, 1)), (7, 0), (4,))


@pytest.mark.slow
@pytest.mark.parametrize("shape_and_window", [ONE, ONCE, ((4,), (4,)), TWO, ((6, 7), (1, 4))])
@pytest.mark.parametrize("stride", [1, 3])
def test_cumulative_operations(shape_and_window, stride):
    def fun(w):
        pooled = fc.max_pool(w[..., None], (1,) * w.ndim, stride=2)
        return (
            *(jnp.cumsum(w, 0), jnp.cumsum(w), lax.cummax(w, 0, reverse=True)),
            lax.associative_scan(jnp.add, w),
            lax.associative_scan(jnp.maximum, w[::2], reverse=True),
            lax.associative_scan(jnp.add, pooled),
            jnp.cumsum(pooled, 0),
        )

    check(fun, *shape_and_window, stride=stride)


@pytest.mark.parametrize("size", [1, 4, 9])
def test_a_window_that_meets_itself(size):
    def fun(w):
        return (
            w[:, None] * w[None, :],
            (w[:, None] * w[None, :]).reshape(-1),
            jnp.abs(w[:, None] - w[None, :]).max(1),
            jnp.outer(w, w) @ w,
            jnp.einsum("i,j->ij", w, w[::-1]),
            jnp.correlate(w, w, "full"),
        )

    check(fun, (9,), (size,))


def test_attention_within_a_window():
    check(lambda w: jax.nn.softmax(w[:, None] * w[None, :], -1) @ w, *ONE, exact=False)
    check(lambda w: jax.nn.softmax(w @ w.T) @ w, *TWO, exact=False)


@pytest.mark.parametrize(("window", "axes"), [((6, 4), (1, 2)), ((6,), (1,)), ((4,), (2,))])
def test_an_update_where_the_image_is_as_large_as_the_window(window, axes):
    check(lambda w: w.at[:, :, 0].add(w.sum()), (1, 6, 4), window, axes=axes)


def test_updates_at_places_that_follow_from_updates():
    """XLA's CPU backend miscompiles the jitted loop here, and must not miscompile `slide`."""

    def fun(w):
        part = lax.dynamic_slice_in_dim(w.at[w[1]].set(5), w[0] - 2, 2)
        return part.at[part[1]].set(5)

    check(fun, (14,), (11,), dtype=np.int32)


def test_updates_with_an_image_edge_and_one_window():
    fun = fc.slide(lambda w: w.at[:, 0].add(w.sum()), (6, 4), edges="image")
    image = jnp.arange(24.0).reshape(6, 4)
    expected = image.at[:, 0].add(image.sum())
    np.testing.assert_array_equal(fun(image)[0, 0], expected)
    np.testing.assert_array_equal(jax.jit(fun)(image)[0, 0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1])
def test_a_min_pool_with_holes_under_a_mask(axis):
    """A product with the mask would not do: XLA makes it a choice in some programs, without NaN."""

    def fun(w):
        holes = tuple(1 + (i == axis) for i in range(2))
        y = lax.reduce_window(
            w, np.float32(np.inf), lax.min, holes, (1, 1), ((0, 0), (1, 1)), base_dilation=holes
        )
        y = lax.pad(y, np.float32(0), ((0, 0, 1), (1, 1, 0)))
        keep = jax.random.bernoulli(jax.random.key(0), 0.5, y.shape)
        return jnp.where(keep, y / 0.5, 0)

    check(fun, (8, 9), (4,))
    check(fun, (8, 9), (4,), axes=(1,))


def test_slices_at_places_that_are_clamped():
    """The primitive clamps where the function counts from the end."""

    def fun(w):
        places = (w[0, 0] - 20).astype(jnp.int32)
        return lax.dynamic_slice(w, (0, places), (4, 2), allow_negative_indices=False)

    check(fun, (8, 5), (4,))


def test_gathers_of_a_part_of_the_window():
    numbers = lax.GatherDimensionNumbers((1, 2), (), (1,))
    check(lambda w: lax.gather(w, jnp.array([[1]]), numbers, (2, 3)), (8, 5), (4,))


def test_platforms_without_a_default():
    check(lambda w: lax.platform_dependent(w, tpu=jnp.negative, cpu=jnp.abs), *ONE)


@pytest.mark.parametrize("dtype", [np.complex64, bool, np.uint8])
def test_largest_elements_of_every_dtype(dtype):
    check(lambda w: (w.max(), w[1:].sum(0), jnp.sort(w)), *ONE, dtype=dtype)


@pytest.mark.parametrize("out", [jnp.float32, jnp.float64, jnp.int32])
def test_products_of_other_dtypes(out):
    matrix = np.arange(8, dtype=np.int8).reshape(4, 2)

    def fun(w):
        numbers = (((0,), (0,)), ((), ()))
        return lax.dot_general(w.astype(np.int8), matrix, numbers, preferred_element_type=out)

    with jax.enable_x64(True):
        check(fun, *ONE, is_wide=True)


def test_a_padded_convolution_of_groups_of_the_batch():
    kernel = np.arange(12, dtype=np.float32).reshape(3, 1, 4)

    def fun(w):
        return lax.conv_general_dilated(
            w[..., None], kernel, (1,), [(1, 1)], batch_group_count=2, dimension_numbers=NHC
        )

    check(fun, (4, 15), (6,), axes=(1,))


def test_a_step_that_cannot_be_mapped():
    def fun(w):
        return lax.reduce_window(w, w[0], lambda a, b: a * b, (2,), (1,), "VALID")

    check(fun, *ONE)


def test_functions_without_results():
    assert fc.slide(lambda w: (), (3,))(np.zeros(5)) == ()


def test_an_error_of_a_rule_names_the_line_and_falls_back(monkeypatch):
    def broken(grid, eqn, *values):
        raise KeyError("lost")

    monkeypatch.setitem(RULES, "tanh", broken)

    def fun(w):
        return jnp.tanh(w).sum()

    line = fun.__code__.co_firstlineno + 1
    image = np.arange(7, dtype=np.float32)
    expected = r"test_slide_functions\.py:%d: slide runs tanh window by window, .*KeyError: 'lost'"
    with pytest.warns(RuntimeWarning, match=expected % line):
        actual = fc.slide(fun, (3,))(image)
    windows = np.lib.stride_tricks.sliding_window_view(image, 3)
    np.testing.assert_allclose(actual, np.tanh(windows).sum(1), rtol=1e-6)


def test_a_rule_whose_result_does_not_fit_falls_back(monkeypatch):
    rule = RULES["tanh"]
    monkeypatch.setitem(RULES, "tanh", lambda *a: rule(*a)._replace(array=rule(*a).array[1:]))
    image = np.arange(7, dtype=np.float32)
    with pytest.warns(RuntimeWarning, match="does not hold"):
        actual = fc.slide(jnp.tanh, (3,))(image)
    windows = np.lib.stride_tricks.sliding_window_view(image, 3)
    np.testing.assert_allclose(actual, np.tanh(windows), rtol=1e-6)
