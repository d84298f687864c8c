"""What slide shares of functions that pad, upsample or have a backward pass of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fclayers as fc
from fclayers.kernels.crossovers import CROSSOVERS
from fclayers.sliding import costs, strips

FIRST = fc.init_conv(jax.random.key(0), (3, 3), 2, 4)
SECOND = fc.init_conv(jax.random.key(1), (3, 3), 4, 4)
WINDOW, IMAGE = (24, 20), (44, 40, 2)


def image(*shape):
    return jax.random.normal(jax.random.key(2), shape or IMAGE)


def conv(x, *, padding="SAME", params=SECOND):
    return jax.nn.relu(fc.apply_conv(params, x, padding=padding))


def first(x):
    return conv(x, params=FIRST)


def counted_average(x):
    """As frameworks write padded average pools that do not count the padding."""
    window, strides = (3, 3, 1), (1, 1, 1)
    total = lax.reduce_window(x, 0.0, lax.add, window, strides, "SAME")
    return total / lax.reduce_window(jnp.ones_like(x), 0.0, lax.add, window, strides, "SAME")


def frame(x):
    mask = np.ones(x.shape[:2], np.float32)
    mask[2:-1, 1:-1] = 0
    return x * mask[..., None]


def numbered_frame(x):
    rows = jnp.arange(x.shape[0])[:, None, None]
    return jnp.where((rows < 2) | (rows >= x.shape[0] - 1), 0.0, x)


def u_net(up):
    def fun(x):
        skip = first(x)
        deep = conv(fc.max_pool(skip, (2, 2)))
        return conv(jnp.concatenate([skip[..., :2], up(deep, skip.shape)[..., :2]], -1))

    return fun


def padded(mode, *widths, **values):
    return lambda x: conv(jnp.pad(x, (*widths, (0, 0)), mode, **values), params=FIRST).sum()


def dense(x):
    return x.reshape(-1) @ np.sin(np.arange(x.size, dtype=np.float32))


def ceil_mode(x):
    x = conv(x, padding="VALID", params=FIRST)
    return fc.max_pool(x, (3, 3), stride=2, padding=((0, 1), (0, 1)))


SHARED = {
    "same": lambda x: first(x).mean((0, 1)),
    "two, a pool and a dense layer": lambda x: dense(fc.max_pool(conv(first(x)), (2, 2))),
    "strides": lambda x: conv(fc.max_pool(first(x), (3, 3), stride=2, padding="SAME")).sum(),
    "dilation": lambda x: fc.apply_conv(SECOND, first(x), dilation=2, padding=2).sum((0, 1)),
    "one side of one axis": lambda x: conv(x, padding=((0, 2), (0, 0)), params=FIRST).sum((0, 1)),
    "pool": lambda x: fc.max_pool(x, (3, 3), stride=2, padding="SAME").sum((0, 1)),
    "pool in ceil mode": lambda x: dense(ceil_mode(x).transpose(2, 1, 0)),
    "average with counts": lambda x: counted_average(first(x)).sum((0, 1)),
    "constant": padded("constant", (1, 1), (2, 1), constant_values=3),
    "negative": lambda x: conv(lax.pad(first(x), 0.0, ((-1, 2, 0), (1, -2, 0), (0, 0, 0)))).sum(),
    "edge": padded("edge", (1, 1), (2, 0)),
    "reflect": padded("reflect", (1, 1), (2, 0)),
    "symmetric": padded("symmetric", (1, 1), (2, 2)),
    "wrap": padded("wrap", (1, 1), (2, 2)),
    "roll": lambda x: (x * jnp.roll(x, 2, 0)).sum(),
    "joined along the window": lambda x: dense(jnp.concatenate([x[:2], x, x[3:5]])),
    "residual": lambda x: jax.nn.relu(first(x) + conv(conv(first(x)))).mean((0, 1)),
    "frame": lambda x: conv(frame(x), params=FIRST).sum(),
    "numbered frame": lambda x: conv(numbered_frame(x), params=FIRST).sum(),
    "repeat": u_net(lambda x, shape: jnp.repeat(jnp.repeat(x, 2, 0), 2, 1)),
    "nearest": u_net(lambda x, shape: jax.image.resize(x, shape, "nearest")),
    "bilinear": u_net(lambda x, shape: jax.image.resize(x, shape, "linear")),
    "transposed": u_net(lambda x, _: lax.conv_transpose(x[None], SECOND.weight, (2, 2), "SAME")[0]),
}


FAST = {"two, a pool and a dense layer", "pool in ceil mode", "nearest"}


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        pytest.param(
            name,
            stride,
            marks=[] if name in FAST and stride == 2 else pytest.mark.slow,
            id=f"{name}, stride {stride}",
        )
        for name in SHARED
        for stride in (1, 2, (4, 3))
    ],
)
def test_functions_that_pad_are_shared(name, stride):
    fun, x = SHARED[name], image()
    strides = stride if isinstance(stride, tuple) else (stride, stride)
    sliding = jax.jit(fc.slide(fun, WINDOW, stride=stride))
    y = sliding(x)
    for i, j in ((0, 0), (y.shape[0] - 1, y.shape[1] // 2)):
        top, left = i * strides[0], j * strides[1]
        one = fun(x[top : top + WINDOW[0], left : left + WINDOW[1]])
        np.testing.assert_allclose(y[i, j], one, rtol=1e-4, atol=1e-4 * np.abs(one).max())
    report = fc.explain_slide(fun, WINDOW, stride=stride)(x)
    assert report.is_shared
    assert name in {"roll", "joined along the window"} or any(
        row.kind.startswith("bordered") for row in report.rows
    )


@pytest.mark.slow
def test_the_report_says_how_wide_the_borders_are():
    def fun(x):
        x = conv(conv(first(x)))
        x = fc.max_pool(x, (2, 2))
        return conv(x, padding=((2, 0), (1, 1))).mean((0, 1))

    report = fc.explain_slide(fun, WINDOW)(jax.ShapeDtypeStruct(IMAGE, jnp.float32))
    kinds = dict.fromkeys(row.kind for row in report.rows)
    assert list(kinds) == [
        "shared",
        "bordered (start 1, end 1)",
        "bordered (start 2, end 2)",
        "bordered (start 3, end 3)",
        "bordered (start 4, end 2; start 3, end 3)",
        "per position",
    ]
    assert report.flops == sum(row.flops for row in report.rows)
    assert report.flops_windows > 2 * report.flops


@pytest.mark.slow
def test_borders_that_meet_are_run_window_by_window():
    def fun(x):
        for _ in range(4):
            x = conv(x)
        return x.mean((0, 1))

    struct = jax.ShapeDtypeStruct((300, 300, 4), jnp.float32)
    report = fc.explain_slide(fun, (8, 8))(struct)
    reasons = [row.reason for row in report.rows if row.kind == "per window"]
    assert reasons[0] == "has borders that meet inside the window"
    assert report.temporary_bytes < 2**29
    x = image(20, 30, 4)
    y = fc.slide(fun, (8, 8))(x)
    np.testing.assert_allclose(y[5, 9], fun(x[5:13, 9:17]), rtol=1e-5, atol=1e-5)


def test_a_constant_that_varies_everywhere_is_not_shared():
    table = np.random.default_rng(0).standard_normal((24, 20, 2)).astype(np.float32)
    struct = jax.ShapeDtypeStruct((200, 200, 2), jnp.float32)
    report = fc.explain_slide(lambda x: (x + table).max((0, 1)), WINDOW)(struct)
    assert {row.reason for row in report.rows} >= {"takes a constant that varies across the window"}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_positions(monkeypatch):
    monkeypatch.setattr(strips, "_MAX_BYTES", 2**24)
    explain = fc.explain_slide(lambda x: conv(first(x)).mean((0, 1)), WINDOW)
    temporaries = [
        explain(jax.ShapeDtypeStruct((n, n, 2), jnp.float32)).temporary_bytes for n in (200, 400)
    ]
    assert max(temporaries) < 2**27
    assert temporaries[1] < 1.5 * temporaries[0]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2**14, 2**17])
def test_strips_of_positions_give_the_same(monkeypatch, limit):
    fun, x = SHARED["two, a pool and a dense layer"], image()
    expected = jax.jit(fc.slide(fun, WINDOW, stride=(1, 2)))(x)
    monkeypatch.setattr(costs, "CHUNK_BYTES", 2**12)
    monkeypatch.setattr(strips, "_MAX_BYTES", limit)
    monkeypatch.setattr(strips, "CROSSOVERS", CROSSOVERS._replace(strip_bytes=2**12))
    actual = jax.jit(fc.slide(fun, WINDOW, stride=(1, 2)))(x)
    assert "scan" in str(jax.make_jaxpr(fc.slide(fun, WINDOW, stride=(1, 2)))(x))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


@jax.custom_vjp
def clipped(x):
    return conv(x)


clipped.defvjp(
    lambda x: (clipped(x), x),
    lambda x, g: (jax.vjp(conv, x)[1](jnp.clip(g, -0.01, 0.01))[0],),
)


@pytest.mark.slow
def test_a_custom_backward_pass_is_kept_and_the_function_shared():
    def fun(params, x):
        return (clipped(conv(x, params=params)) ** 2).mean()

    x = image(28, 23, 2)
    report = fc.explain_slide(fun, WINDOW)(FIRST, x)
    assert report.is_shared

    def windows(params, x):
        cut = jnp.stack([x[i : i + 24, j : j + 20] for i in range(5) for j in range(4)])
        return jax.vmap(fun, (None, 0))(params, cut)

    sliding = fc.slide(fun, WINDOW)
    np.testing.assert_allclose(sliding(FIRST, x).ravel(), windows(FIRST, x), rtol=1e-5)

    def loss(function, *args):
        return (function(*args) ** 2).sum()

    ours = jax.jit(jax.grad(lambda *args: loss(sliding, *args), (0, 1)))(FIRST, x)
    theirs = jax.jit(jax.grad(lambda *args: loss(windows, *args), (0, 1)))(FIRST, x)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize("edges", ["window", "image"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("name", ["pool in ceil mode", "two, a pool and a dense layer", "bilinear"])
def test_tiles_of_functions_that_pad(name, stride, edges):
    fun, x = SHARED[name], np.asarray(image(43, 37, 2))
    expected = jax.jit(fc.slide(fun, WINDOW, stride=stride, edges=edges))(x)
    out = np.full(expected.shape, 99, np.float32)
    tiling = fc.slide_tiles(
        fun, WINDOW, stride=stride, edges=edges, tile_shape=(4, 3), progress=False
    )
    tiling(x, out)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
