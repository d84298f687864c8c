"""slide: one equation, for every function."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_calls import bad_calls
from hypothesis import assume, given, settings
from jax import lax
from slide_networks import cases, naive

import fclayers as fc

KEY = jax.random.key(0)
NUM_NETWORKS = int(os.environ.get("SLIDE_NETWORKS", "12"))


def assert_equation_holds(case, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        params = [jnp.asarray(p, dtype) for p in case.params]
        image = jnp.asarray(case.image, dtype)
        sliding = fc.slide(case.fun, case.window, stride=case.stride, axes=case.axes)
        actual = jax.jit(sliding)(params, image)
        expected = naive(case, params, image)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert ours.shape == theirs.shape
            assert ours.dtype == theirs.dtype
            scale = np.abs(theirs).max(initial=1.0)
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * scale)


@settings(max_examples=NUM_NETWORKS)
@given(cases())
def test_equation(case):
    """`SLIDE_NETWORKS=2000 python -m pytest tests/test_slide.py -k equation` draws more."""
    assert_equation_holds(case, "float64", 1e-12)


@settings(max_examples=max(3, NUM_NETWORKS // 5))
@given(cases(layers=(1, 3), unshared=False))
def test_equation_in_float32(case):
    assume(case.layers[-1] != "argmax")
    assert_equation_holds(case, "float32", 1e-5)


@settings(max_examples=max(3, NUM_NETWORKS // 5))
@given(cases(layers=(1, 4)))
def test_gradients(case):
    # JAX has no reverse mode for these pools, products at all and dilated maxima and minima.
    assume(not {"product pool", "max pool", "min pool"} & set(case.layers))
    assume(case.layers[-1] != "argmax")
    with jax.enable_x64(True):
        params, image = list(map(jnp.asarray, case.params)), jnp.asarray(case.image)
        sliding = fc.slide(case.fun, case.window, stride=case.stride, axes=case.axes)

        def loss(function, params, image):
            return sum((out**2).sum() for out in jax.tree.leaves(function(params, image)))

        ours = jax.jit(jax.grad(partial(loss, sliding), (0, 1)))(params, image)
        theirs = jax.grad(partial(loss, partial(naive, case)), (0, 1))(params, image)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max(initial=1.0))


def test_maxima_of_every_second_element_have_gradients():
    def fun(window):
        return window.reshape(2, 2).max(0).sum()

    x = jnp.arange(9.0)
    windows = jax.grad(lambda x: sum(fun(x[i : i + 4]) for i in range(6)))(x)
    chex.assert_trees_all_equal(jax.grad(lambda x: fc.slide(fun, (4,))(x).sum())(x), windows)


@pytest.mark.parametrize("seed", range(4))
def test_maxima_of_sums_rounded_anew_have_gradients(seed):
    """XLA rounded the grouped convolution in two ways, so that no element was the maximum."""

    def loss(sliding, weight, image):
        return (sliding(weight, image) ** 2).sum()

    def fun(weight, window):
        y = fc.apply_conv(fc.ConvParams(weight, None), window, padding=1, groups=2)
        return y.max((0, 1))

    def by_hand(weight, image):
        return jnp.stack([fun(weight, image[:, i : i + 3]) for i in range(3)])

    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        weight, image = rng.standard_normal((2, 1, 1, 2)), rng.standard_normal((3, 5, 2))
        ours = jax.jit(jax.grad(partial(loss, fc.slide(fun, (3, 3)))))(weight, image)
        theirs = jax.grad(partial(loss, by_hand))(weight, image)
        chex.assert_trees_all_close(ours, theirs, rtol=1e-9)


CONV = fc.init_conv(KEY, (3, 3), 1, 4)
SECOND = fc.init_conv(KEY, (3, 3), 4, 6)
HEAD = fc.init_mlp(KEY, [3 * 3 * 6, 8, 5])
PARAMS = (CONV, SECOND, HEAD)


def classify(params, window):
    """18×18 → 16×16 → 8×8 → 6×6 → 3×3 → 5."""
    conv, second, head = params
    x = fc.max_pool(jax.nn.relu(fc.apply_conv(conv, window[..., None])), (2, 2))
    x = fc.max_pool(jax.nn.relu(fc.apply_conv(second, x)), (2, 2))
    return fc.apply_mlp(head, x.reshape(-1))


def dilated_by_hand(params, image):
    conv, second, head = params
    first, last = fc.mlp_to_conv(head, (3, 3))
    x = jax.nn.relu(fc.apply_conv(conv, image[..., None]))
    x = fc.max_pool(x, (2, 2), stride=1)
    x = jax.nn.relu(fc.apply_conv(second, x, dilation=2))
    x = fc.max_pool(x, (2, 2), stride=1, dilation=2)
    return fc.apply_conv(last, jax.nn.relu(fc.apply_conv(first, x, dilation=4)))


def image(*shape):
    return jax.random.normal(jax.random.key(1), shape)


def primitives(jaxpr):
    """Names of all primitives of a jaxpr, at any depth."""
    names = []
    for eqn in jaxpr.eqns:
        names.append(eqn.primitive.name)
        for param in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(param, "jaxpr", param)
            names += primitives(inner) if hasattr(inner, "eqns") else []
    return names


@pytest.mark.slow
def test_it_is_the_network_dilated_by_hand():
    sliding, x = fc.slide(classify, (18, 18)), image(40, 45)
    np.testing.assert_allclose(sliding(PARAMS, x), dilated_by_hand(PARAMS, x), rtol=1e-5, atol=1e-5)
    assert not {"gather", "scan", "while"} & set(
        primitives(jax.make_jaxpr(sliding)(PARAMS, x).jaxpr)
    )
    flops = [
        jax.jit(function).lower(PARAMS, x).cost_analysis()["flops"]
        for function in (sliding, dilated_by_hand)
    ]
    assert flops[0] <= 1.1 * flops[1]


def test_the_networks_own_stride_needs_no_dilation():
    sliding = fc.slide(classify, (18, 18), stride=4)
    text = str(jax.make_jaxpr(sliding)(PARAMS, image(38, 42)))
    assert "conv_general_dilated" in text
    assert {line.strip() for line in text.splitlines() if "rhs_dilation" in line} == {
        "rhs_dilation=(1, 1)"
    }


def test_the_program_does_not_grow_with_the_image():
    """Large convolutions run in tiles on CPUs, by a loop of one size."""
    sliding = fc.slide(classify, (18, 18))
    programs = [jax.make_jaxpr(sliding)(PARAMS, jnp.zeros((n, n))) for n in (64, 1024, 2048)]
    small, large, larger = (len(primitives(program.jaxpr)) for program in programs)
    assert large == larger
    assert large < 4 * small


@pytest.mark.slow
def test_vmap_outside_and_inside():
    images = image(3, 20, 21)
    expected = jnp.stack([fc.slide(classify, (18, 18))(PARAMS, x) for x in images])
    outside = jax.vmap(fc.slide(classify, (18, 18)), (None, 0))(PARAMS, images)
    np.testing.assert_allclose(outside, expected, rtol=1e-5, atol=1e-5)
    inside = fc.slide(jax.vmap(classify, (None, 0)), (18, 18), axes=(1, 2))(PARAMS, images)
    np.testing.assert_allclose(jnp.moveaxis(inside, 2, 0), expected, rtol=1e-5, atol=1e-5)


@jax.custom_jvp
def straight_through(x):
    return jnp.round(x)


straight_through.defjvp(lambda primals, tangents: (jnp.round(*primals), 3 * tangents[0]))


@jax.custom_jvp
def smoothed(x):
    return fc.avg_pool(x[..., None], (2, 2), stride=1)[..., 0]


@smoothed.defjvp
def smoothed_jvp(primals, tangents):
    return smoothed(*primals), 5 * smoothed(*tangents)


@jax.custom_vjp
def clipped(x):
    return x**3


clipped.defvjp(lambda x: (x**3, x), lambda x, g: (x * jnp.clip(g, -1, 1),))


@pytest.mark.slow
@pytest.mark.parametrize("function", [straight_through, smoothed, clipped])
def test_custom_derivatives_are_kept(function):
    def f(window):
        return (function(window) ** 2).sum()

    def loss(function, x):
        return (function(x) ** 2).sum()

    x = 3 * image(7, 8)
    windows = jnp.stack([x[i : i + 4, j : j + 4] for i in range(4) for j in range(5)])
    np.testing.assert_allclose(fc.slide(f, (4, 4))(x).ravel(), jax.vmap(f)(windows), rtol=1e-5)

    def cut_out(x):
        windows = jnp.stack([x[i : i + 4, j : j + 4] for i in range(4) for j in range(5)])
        return jax.vmap(f)(windows)

    ours = jax.grad(partial(loss, fc.slide(f, (4, 4))))(x)
    np.testing.assert_allclose(ours, jax.grad(partial(loss, cut_out))(x), rtol=1e-5)
    assert fc.explain_slide(f, (4, 4))(x).is_shared


def test_a_random_key_is_shared_by_all_windows():
    def noisy(key, window):
        return window.sum() + jax.random.normal(key)

    x = image(6, 6)
    difference = fc.slide(noisy, (3, 3))(KEY, x) - fc.slide(jnp.sum, (3, 3))(x)
    np.testing.assert_allclose(difference, jax.random.normal(KEY), rtol=1e-4)


def test_what_is_run_window_by_window_needs_bounded_memory():
    def f(window):
        return jnp.sort(window.ravel())[:3].sum()

    temporaries = [
        fc.explain_slide(f, (16, 16))(jax.ShapeDtypeStruct((n, n), jnp.float32)).temporary_bytes
        for n in (400, 800)
    ]
    assert max(temporaries) < 2**28
    assert temporaries[1] < 1.5 * temporaries[0]


def test_image_edges_pad_the_image():
    def padded(conv, window):
        return fc.apply_conv(conv, window[..., None], padding=1).sum(-1)

    x = image(9, 8)
    score = fc.slide(padded, (5, 4), edges="image")(CONV, x)
    whole = padded(CONV, x)
    for i, j in np.ndindex(5, 5):
        np.testing.assert_allclose(score[i, j], whole[i : i + 5, j : j + 4], rtol=1e-5, atol=1e-5)
    one = fc.slide(padded, (9, 8), edges="image")(CONV, x)
    np.testing.assert_allclose(one[0, 0], whole, rtol=1e-5, atol=1e-5)


def test_the_report_names_the_line_that_stops_sharing():
    def f(conv, window):
        x = fc.apply_conv(conv, window[..., None], padding=((1, 0), (0, 2)))
        x = x / (1 + jnp.abs(x).mean())
        return x.mean()

    report = fc.explain_slide(f, (8, 8))(CONV, jax.ShapeDtypeStruct((20, 30), jnp.float32))
    line = f.__code__.co_firstlineno + 2
    stop = next(row for row in report.rows if row.kind == "per window")
    reason = "brings a value of a whole window to elements of the window"
    assert (stop.line, stop.reason) == (f"test_slide.py:{line}", reason)
    assert stop.operations == ("div",)
    bordered = next(row for row in report.rows if row.kind.startswith("bordered"))
    assert bordered.kind == "bordered (start 1, end 0; start 0, end 2)"
    assert "conv_general_dilated" in bordered.operations
    assert report.positions == (13, 23)
    assert not report.is_shared
    text = str(report)
    assert f"shared up to test_slide.py:{line}, which {reason}" in text
    assert "13 × 23 = 299" in text
    assert repr(report) == text


def test_the_report_counts_operations_and_memory():
    struct = jax.ShapeDtypeStruct((60, 60), jnp.float32)
    report = fc.explain_slide(classify, (18, 18))(PARAMS, struct)
    assert report.is_shared
    assert report.flops_windows > 20 * report.flops > 0
    assert 0 < report.temporary_bytes < 2**22
    assert "shared all the way" in str(report)


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from test_slide import PARAMS, classify
import fclayers as fc

image = jax.random.normal(jax.random.key(2), (80, 50))
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(kind,))
    sharded = jax.device_put(image, NamedSharding(mesh, P("rows", None)))
    sliding = fc.slide(classify, (18, 18))
    expected = sliding(PARAMS, image)
    with jax.set_mesh(mesh):
        compiled = jax.jit(sliding).lower(PARAMS, sharded).compile()
        actual = compiled(PARAMS, sharded)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
        assert fc.explain_slide(classify, (18, 18))(PARAMS, sharded).is_shared
    assert any(name in compiled.as_text() for name in ("collective-permute", "all-gather"))
"""


@pytest.mark.slow
def test_an_image_sharded_over_its_rows():
    tests = str(Path(__file__).parent)
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]


def prints(window):
    jax.debug.print("{}", window[0, 0])
    return window.sum()


X = np.zeros((20, 30), np.float32)
BAD = {
    "image smaller than the window": (
        lambda: fc.slide(jnp.sum, (21, 5))(X),
        ValueError,
        r"slide: a window of \(21, 5\) does not fit into an image of shape \(20, 30\)",
    ),
    "stride of zero": (
        lambda: fc.slide(jnp.sum, (3, 3), stride=0),
        ValueError,
        "slide: stride must be an integer >= 1 or 2, one per window axis, got 0",
    ),
    "too many strides": (
        lambda: fc.slide(jnp.sum, (3, 3), stride=(1, 2, 3)),
        ValueError,
        r"slide: stride must be an integer >= 1 or 2, one per window axis, got \(1, 2, 3\)",
    ),
    "fractional window": (
        lambda: fc.slide(jnp.sum, (3, 3.5)),
        ValueError,
        r"slide: window_shape must be an integer >= 0, got 3\.5",
    ),
    "window of zero": (
        lambda: fc.slide(jnp.sum, (3, 0)),
        ValueError,
        r"slide: window_shape must have entries >= 1, got \(3, 0\)",
    ),
    "an integer as the window": (
        lambda: fc.slide(jnp.sum, 8),
        ValueError,
        "slide: window_shape must be a tuple with one to three entries, such as .*, got 8",
    ),
    "explain an integer": (
        lambda: fc.explain_slide(jnp.sum, 8),
        ValueError,
        "explain_slide: window_shape must be a tuple .* got 8",
    ),
    "four window axes": (
        lambda: fc.slide(jnp.sum, (3, 3, 3, 3)),
        ValueError,
        r"slide: window_shape must be a tuple with one to three entries.* got \(3, 3, 3, 3\)",
    ),
    "image of too few axes": (
        lambda: fc.slide(jnp.sum, (3, 3, 3))(X),
        ValueError,
        r"slide: a window \(3, 3, 3\) needs an image with 3 axes or more, got shape \(20, 30\)",
    ),
    "axes repeated": (
        lambda: fc.slide(jnp.sum, (3, 3), axes=(0, -2))(X),
        ValueError,
        r"slide: axis \(0, -2\) names an axis of x twice",
    ),
    "axis out of range": (
        lambda: fc.slide(jnp.sum, (3, 3), axes=(0, 2))(X),
        ValueError,
        r"slide: axis 2 is not an axis of x, whose shape is \(20, 30\)",
    ),
    "axes of another number": (
        lambda: fc.slide(jnp.sum, (3, 3), axes=1)(X),
        ValueError,
        "slide: axes must name 2 window axes, got 1",
    ),
    "edges": (
        lambda: fc.slide(jnp.sum, (3, 3), edges="same"),
        ValueError,
        "slide: edges must be 'window' or 'image', got 'same'",
    ),
    "no image": (
        lambda: fc.slide(jnp.sum, (3, 3))(),
        TypeError,
        "slide: expected the image as the last positional argument, got none",
    ),
    "a list": (
        lambda: fc.slide(jnp.sum, (3, 3))([[1.0]]),
        TypeError,
        "slide: expected the image, the last argument, to be an array, got list",
    ),
    "side effects": (
        lambda: fc.slide(prints, (3, 3))(X),
        ValueError,
        "slide: the function has side effects",
    ),
    "explain": (
        lambda: fc.explain_slide(jnp.sum, (21, 5))(X),
        ValueError,
        r"explain_slide: a window of \(21, 5\) does not fit",
    ),
}


test_error = bad_calls(BAD)


def test_the_image_may_be_integers_and_the_function_anything():
    pixels = np.random.default_rng(0).integers(0, 255, (9, 10), np.uint8)

    def f(window):
        window = window.astype(jnp.int32)
        return lax.cond(window.max() > 200, jnp.sum, jnp.min, window), window[0, 0], 7

    total, corner, constant = fc.slide(f, (3, 4))(pixels)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (3, 4)).astype(int)
    expected = np.where(windows.max((2, 3)) > 200, windows.sum((2, 3)), windows.min((2, 3)))
    np.testing.assert_array_equal(total, expected)
    np.testing.assert_array_equal(corner, windows[:, :, 0, 0])
    assert constant.shape == (7, 7)
