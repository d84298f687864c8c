"""Random networks for one window, and the naive loop that `slide` is held against."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

import fclayers as fc


class Case(NamedTuple):
    """A function `f(params, window)`, where its windows lie, and an image."""

    fun: Callable[[Any, jax.Array], Any]
    params: list[np.ndarray]
    window: tuple[int, ...]
    stride: int | tuple[int, ...]
    axes: tuple[int, ...]
    image: np.ndarray
    layers: list[str]

    def __repr__(self):
        return (
            f"Case(layers={self.layers}, window={self.window}, stride={self.stride}, "
            f"axes={self.axes}, image of shape {self.image.shape})"
        )


def naive(case: Case, params: Any, image: Any) -> Any:
    """The function on every window, cut out with plain indexing."""
    strides = case.stride if isinstance(case.stride, tuple) else (case.stride,) * len(case.window)
    sizes = [image.shape[axis] for axis in case.axes]
    counts = [(n - w) // s + 1 for n, w, s in zip(sizes, case.window, strides, strict=True)]
    windows = []
    for position in np.ndindex(*counts):
        index = [slice(None)] * image.ndim
        for axis, i, s, w in zip(case.axes, position, strides, case.window, strict=True):
            index[axis] = slice(i * s, i * s + w)
        windows.append(image[tuple(index)])
    outs = jax.jit(jax.vmap(case.fun, (None, 0)))(params, jnp.stack(windows))
    return jax.tree.map(lambda out: out.reshape(*counts, *out.shape[1:]), outs)


class Builder:
    """Draws layers one by one and keeps track of the map: `(*spatial, channels)`."""

    def __init__(self, random, window, channels):
        self.random = random
        self.rng = np.random.default_rng(self.integer(0, 2**32 - 1))
        self.ndim = len(window)
        self.params: list[np.ndarray] = []
        self.layers: list[tuple[str, Any]] = []
        self.shape = (*window, channels)

    def integer(self, low, high):
        return self.random.randint(low, high)

    def some(self, *options):
        return self.random.choice(options)

    def param(self, *shape, scale=1.0):
        self.params.append(scale * self.rng.standard_normal(shape))
        return len(self.params) - 1

    def add(self, name, layer):
        def traced(x):
            return layer([jnp.asarray(p, x.dtype) for p in self.params], x)

        self.layers.append((name, layer))
        struct = jax.ShapeDtypeStruct(self.shape, jnp.float32)
        self.shape = jax.eval_shape(traced, struct).shape

    def geometry(self, largest=3):
        """A kernel that fits, with stride and dilation."""
        kernel, strides, dilations = [], [], []
        for size in self.shape[:-1]:
            k = self.integer(1, min(largest, size))
            d = self.integer(1, 2) if k > 1 and (k - 1) * 2 < size else 1
            kernel.append(k)
            dilations.append(d)
            strides.append(self.integer(1, 2))
        return tuple(kernel), tuple(strides), tuple(dilations)

    def conv(self, *, pad=0):
        kernel, strides, dilations = self.geometry()
        channels = self.shape[-1]
        groups = self.some(*(g for g in (1, 2, channels) if channels % g == 0))
        out = groups * self.integer(1, 2)
        fan_in = np.prod(kernel) * channels // groups
        weight = self.param(*kernel, channels // groups, out, scale=1 / np.sqrt(fan_in))
        if self.some(False, True) and not pad:
            padding = ((pad, pad),) * self.ndim

            def layer(p, x):
                params = fc.ConvParams(p[weight], None)
                return fc.apply_conv(
                    params, x, stride=strides, padding=padding, dilation=dilations, groups=groups
                )

            return self.add("conv", layer)
        spatial = "DHW"[3 - self.ndim :]
        numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
        first = self.some(False, True)
        if first:
            numbers = (f"NC{spatial}", f"{spatial}IO", f"NC{spatial}")

        def layer(p, x):
            x = jnp.moveaxis(x, -1, 0) if first else x
            y = lax.conv_general_dilated(
                x[None],
                p[weight],
                strides,
                [(pad, pad)] * self.ndim,
                rhs_dilation=dilations,
                dimension_numbers=numbers,
                feature_group_count=groups,
            )[0]
            return jnp.moveaxis(y, 0, -1) if first else y

        return self.add("conv channels first" if first else "conv channels last", layer)

    def padded_conv(self):
        self.conv(pad=1)

    def pool(self):
        kernel, strides, dilations = self.geometry()
        kind = self.some("max", "avg", "min", "product")
        if kind == "max" and self.some(False, True):
            return self.add(
                "fc.max_pool",
                lambda p, x: fc.max_pool(x, kernel, stride=strides, dilation=dilations),
            )
        initial, monoid = {
            "max": (-np.inf, lax.max),
            "min": (np.inf, lax.min),
            "avg": (0.0, lax.add),
            "product": (1.0, lambda a, b: a * b),
        }[kind]

        def layer(p, x):
            return lax.reduce_window(
                x,
                np.array(initial, x.dtype),
                monoid,
                (*kernel, 1),
                (*strides, 1),
                "VALID",
                window_dilation=(*dilations, 1),
            )

        return self.add(f"{kind} pool", layer)

    def activation(self):
        name = self.some("relu", "gelu", "silu", "tanh", "leaky_relu", "where")
        if name == "where":
            self.add(name, lambda p, x: jnp.where(x > 0, x, 0.1 * jnp.abs(x)))
        else:
            self.add(name, lambda p, x: getattr(jax.nn, name)(x))

    def crop(self):
        cuts = []
        for size in self.shape[:-1]:
            start = self.integer(0, min(2, size - 1))
            cuts.append(slice(start, size - self.integer(0, min(1, size - 1 - start))))
        if self.some(False, True):
            cuts[0] = slice(cuts[0].start, cuts[0].stop, 2)
        self.add("crop", lambda p, x: x[tuple(cuts)])

    def joined(self, join):
        """Two branches of one map, cropped to one size and joined."""
        if min(self.shape[:-1]) < 3:
            return
        channels = self.shape[-1]
        shape = (*(3 if n < 3 else self.integer(1, 3) for n in self.shape[:-1]), channels, channels)
        weight = self.param(*shape, scale=1 / np.sqrt(np.prod(shape[:-1])))
        offsets = [self.integer(0, k - 1) for k in shape[: self.ndim]]

        def layer(p, x):
            y = fc.apply_conv(fc.ConvParams(p[weight], None), x)
            crop = tuple(slice(o, o + n) for o, n in zip(offsets, y.shape[:-1], strict=True))
            return join(x[crop], y)

        self.add(join.__name__, layer)

    def residual(self):
        def residual(x, y):
            return x + jax.nn.relu(y)

        self.joined(residual)

    def concatenation(self):
        def concatenation(x, y):
            constant = jnp.full((*x.shape[:-1], 1), 0.5, x.dtype)
            return jnp.concatenate([x, constant, y[..., :1]], -1)

        self.joined(concatenation)

    def norm(self):
        scale = self.param(self.shape[-1])

        def layer_norm(p, x):
            x = x - x.mean(-1, keepdims=True)
            return x / jnp.sqrt(0.1 + (x * x).mean(-1, keepdims=True)) * p[scale]

        def softmax(p, x):
            return jax.nn.softmax(x, -1) + p[scale]

        def normalized_window(p, x):
            return x / (1 + jnp.abs(x).mean()) * p[scale]

        layer = self.some(layer_norm, softmax, layer_norm, normalized_window)
        self.add(layer.__name__, layer)

    def channels(self):
        def reverse(p, x):
            return x[..., ::-1]

        def pick(p, x):
            return x[..., jnp.array([0, -1])]

        def sort(p, x):
            return jnp.sort(x, -1)

        def cumulative_sum(p, x):
            return jnp.cumsum(x, -1) / x.shape[-1]

        def halves(p, x):
            a, b = jnp.split(x[..., : x.shape[-1] // 2 * 2], 2, -1)
            return a * jax.nn.sigmoid(b)

        options = [reverse, pick, sort, cumulative_sum]
        layer = self.some(*options, *([halves] if self.shape[-1] > 1 else []))
        self.add(layer.__name__, layer)

    def dense(self):
        weight = self.param(self.shape[-1], 3, scale=1 / np.sqrt(self.shape[-1]))
        self.add("dense", lambda p, x: x @ p[weight])

    def space_to_depth(self):
        if any(n % 2 for n in self.shape[:-1]):
            return

        def layer(p, x):
            halved = [n for size in x.shape[:-1] for n in (size // 2, 2)]
            x = x.reshape(*halved, x.shape[-1])
            order = [*range(0, 2 * self.ndim, 2), *range(1, 2 * self.ndim, 2), 2 * self.ndim]
            x = x.transpose(order)
            return x.reshape(*x.shape[: self.ndim], -1)[..., :4]

        self.add("space to depth", layer)

    def scanned(self):
        size = self.shape[-1]
        weights = self.param(2, size, size, scale=1 / np.sqrt(size))

        def layer(p, x):
            step = jax.checkpoint(lambda x, w: (jax.nn.relu(x @ w), x.mean()))
            x, _ = lax.scan(step, x, p[weights])
            return x

        self.add("scan", layer)

    def table(self):
        """A constant that differs from place to place of the window."""
        table = self.param(*self.shape)
        self.add("positional table", lambda p, x: x + p[table])

    def batch_axis(self):
        self.add("batch axis", lambda p, x: jax.vmap(lambda x: 2 * x)(x[None])[0])

    def head(self):
        """What the function returns: the map, or something for the whole window."""
        kind = self.some("map", "mlp", "mlp", "axes", "mean", "max", "argmax", "several")
        spatial = tuple(range(self.ndim))
        flat = int(np.prod(self.shape))
        first = self.param(flat, 4, scale=1 / np.sqrt(flat))
        second = self.param(4, 3)
        on_axes = self.param(*self.shape, 2, scale=1 / np.sqrt(flat))

        def mlp(p, x):
            layers = (fc.LinearParams(p[first], None), fc.LinearParams(p[second], None))
            return fc.apply_mlp(layers, x.reshape(-1), final_activation=jax.nn.softmax)

        def axes(p, x):
            return fc.apply_linear(
                fc.LinearParams(p[on_axes], None), x, axis=tuple(range(self.ndim + 1))
            )

        heads = {
            "map": lambda p, x: x,
            "mlp": mlp,
            "axes": axes,
            "mean": lambda p, x: x.mean(spatial),
            "max": lambda p, x: x.max(spatial),
            "argmax": lambda p, x: lax.top_k(mlp(p, x), 2),
            "several": lambda p, x: {"a": mlp(p, x), "b": (x.sum(), x.max(0)), "c": p[second]},
        }
        return kind, heads[kind]


LAYERS = [
    *(Builder.conv, Builder.conv, Builder.pool, Builder.pool, Builder.activation, Builder.crop),
    *(Builder.residual, Builder.concatenation, Builder.norm, Builder.channels, Builder.dense),
    *(Builder.space_to_depth, Builder.scanned, Builder.batch_axis),
]
UNSHARED = [Builder.padded_conv, Builder.table]


@st.composite
def cases(draw, *, layers=(1, 6), unshared=True):
    # One draw for all: hypothesis makes many examples by copying one draw of an example over
    # another, and two networks that differ in one number test little more than one of them.
    random = draw(st.randoms())
    ndim = random.choice([1, 2, 2, 3])
    largest = {1: 16, 2: 10, 3: 6}[ndim]
    window = tuple(random.randint(3, largest) for _ in range(ndim))
    channels = random.randint(1, 3)
    builder = Builder(random, window, channels)
    options = LAYERS + UNSHARED if unshared else LAYERS
    for _ in range(random.randint(*layers)):
        random.choice(options)(builder)
    name, head = builder.head()
    built = [layer for _, layer in builder.layers]

    channels_first = builder.some(False, True)
    axes = tuple(range(1, ndim + 1)) if channels_first else tuple(range(ndim))

    def fun(params, x):
        x = jnp.moveaxis(x, 0, -1) if channels_first else x
        for layer in built:
            x = layer(params, x)
        return head(params, x)

    stride = tuple(random.randint(1, 3) for _ in range(ndim))
    if builder.some(False, True):
        stride = stride[0]
    size = tuple(w + random.randint(0, 5) for w in window)
    shape = (channels, *size) if channels_first else (*size, channels)
    image = builder.rng.standard_normal(shape)
    names = [layer for layer, _ in builder.layers] + [name]
    return Case(fun, builder.params, window, stride, axes, image, names)
