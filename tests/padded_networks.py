"""Random networks that pad, as nearly all in use do, for `slide` and for the loop over windows."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax
from padded_layers import FLATTEN, Geometry, pad_axis, reads_everywhere, reduce_windows
from slide_networks import Builder, Case

import fclayers as fc

# Mode of padding, and how often it is drawn.
CONV_PADDING = ["SAME", "SAME", "SAME_LOWER", "explicit", "explicit", "VALID"]
POOL_PADDING = ["SAME", "ceil", "explicit", "ceil", "VALID"]
# Whose sums are exact in any order, so that areas of padding have the same rounding everywhere.
PAD_VALUES = [0.0, 0.5, -1.0, 2.0]


class PaddedBuilder(Builder):
    """Draws layers that pad."""

    def __init__(self, random, window, channels):
        super().__init__(random, window, channels)
        self.window = window
        self.image_channels = channels
        self.steps = (1,) * self.ndim
        self.spatial = tuple(range(self.ndim))

    def room(self, axis):
        """How much an axis may grow: maps stay below twice the window."""
        return max(0, min(3, (2 * self.window[axis] - self.shape[axis]) // 2))

    def stepped(self, strides):
        self.steps = tuple(a * b for a, b in zip(self.steps, strides, strict=True))

    def draw_geometry(self, modes, *, pool=False, strides=None, largest=3):
        mode = self.some(*modes)
        dilated = not self.integer(0, 4)
        axes = []
        for axis, size in enumerate(self.shape[:-1]):
            k = self.integer(1 + pool, largest)
            s = self.integer(2, 3) if mode == "ceil" else self.some(1, 1, 2, 3)
            s = strides[axis] if strides else s
            d = self.integer(1, 2) if dilated else 1
            if mode == "VALID":
                k = min(k, size)
                d = d if (k - 1) * d < size else 1
            if mode == "explicit":
                largest_pad = min(self.room(axis), k - 1) if pool else self.room(axis)
                drawn = self.integer(0, largest_pad), self.integer(0, largest_pad)
            else:
                drawn = (0, 0)
            pair = pad_axis(size, k, s, d, mode, drawn)
            if pool and not reads_everywhere(size, k, s, pair, d):
                d, pair = 1, pad_axis(size, k, s, 1, mode, drawn)
            axes.append((k, s, pair, d))
        return Geometry(*zip(*axes, strict=True), mode)

    def convolution(self, channels, geometry, out=None):
        """A function `layer(params, x)`, in one of the ways that networks are written."""
        groups = self.some(*(g for g in (1, 1, 2, channels) if channels % g == 0))
        if out is None or out % groups:
            groups, out = (1, out or 2) if out or channels > 6 else (groups, None)
        out = out or groups * self.integer(1, 2)
        fan_in = prod(geometry.kernel) * channels // groups
        shape = (*geometry.kernel, channels // groups, out)
        weight = self.param(*shape, scale=1 / np.sqrt(fan_in))
        bias = self.param(out, scale=0.3)
        _, strides, padding, dilations, mode = geometry
        written = self.some("fc", "channels last", "channels first")
        if written == "fc":
            padding = mode if mode in ("SAME", "VALID") else padding

            def layer(p, x):
                params = fc.ConvParams(p[weight], p[bias])
                return fc.apply_conv(
                    params, x, stride=strides, padding=padding, dilation=dilations, groups=groups
                )

            return layer
        spatial = "DHW"[3 - self.ndim :]
        first = written == "channels first"
        data = f"NC{spatial}" if first else f"N{spatial}C"
        numbers = (data, f"{spatial}IO", data)

        def layer(p, x):
            x = jnp.moveaxis(x, -1, 0) if first else x
            y = lax.conv_general_dilated(
                x[None],
                p[weight],
                strides,
                padding,
                rhs_dilation=dilations,
                dimension_numbers=numbers,
                feature_group_count=groups,
            )[0]
            return (jnp.moveaxis(y, 0, -1) if first else y) + p[bias]

        return layer

    def conv(self, *, modes=CONV_PADDING, strides=None):
        largest = 5 if self.ndim < 3 and not self.integer(0, 3) else 3
        geometry = self.draw_geometry(modes, strides=strides, largest=largest)
        layer = self.convolution(self.shape[-1], geometry)
        self.stepped(geometry.strides)
        self.add(geometry.name("conv"), layer)

    def pool(self, *, modes=POOL_PADDING, strides=None):
        geometry = self.draw_geometry(modes, pool=True, strides=strides)
        kind = self.some("max", "max", "min", "sum", "avg", "avg by counts", "avg by counts")
        kernel, step, padding, dilation, _ = geometry
        given = {"stride": step, "padding": padding, "dilation": dilation}
        written = self.some("fc", "lax", "lax")
        if kind == "max" and written == "fc":
            # Unlike reduce_window, it has gradients with dilation.
            name, layer = "fc.max pool", lambda p, x: fc.max_pool(x, kernel, **given)
        elif kind.startswith("avg") and written == "fc":
            include = kind == "avg"
            name, layer = (
                f"{kind} pool",
                lambda p, x: fc.avg_pool(x, kernel, **given, count_include_pad=include),
            )
        else:
            name, layer = f"{kind} pool", reduce_windows(kind, geometry, self.some(True, False))
        self.stepped(step)
        self.add(geometry.name(name), layer)

    def pad(self):
        mode = self.some("constant", "edge", "reflect", "symmetric", "wrap")
        pairs = []
        for axis, size in enumerate(self.shape[:-1]):
            most = min(self.room(axis), size - 1 if mode == "reflect" else size)
            pairs.append((self.integer(0, most), self.integer(0, most)))
        if not np.any(pairs):
            return
        values = {"constant_values": self.some(*PAD_VALUES)} if mode == "constant" else {}
        pairs.append((0, int(mode == "constant" and not self.integer(0, 4))))
        self.add(f"jnp.pad {mode}", lambda p, x: jnp.pad(x, pairs, mode, **values))

    def lax_pad(self):
        config = []
        for axis, size in enumerate(self.shape[:-1]):
            low = self.integer(-min(2, size - 1), self.room(axis))
            config.append((low, self.integer(max(-2, 1 - size - low), self.room(axis)), 0))
        value = self.some(*PAD_VALUES)
        name = "lax.pad" if np.max(config) > 0 else "lax.pad that crops"
        self.add(name, lambda p, x: lax.pad(x, x.dtype.type(value), [*config, (0, 0, 0)]))

    def join(self):
        """Pieces of one window axis, concatenated."""
        kinds = {
            "wrap": lambda x: [x[-1:], x, x[:1]],
            "mirror": lambda x: [x[1:2], x, x[-2:-1]],
            "ends": lambda x: [x[:2], x[-2:]],
            "constants": lambda x: [jnp.full_like(x[:2], 0.5), x],
            "roll": lambda x: [jnp.roll(x, 1, 0)],
        }
        kind, axis = self.some(*kinds), self.integer(0, self.ndim - 1)
        if not self.room(axis):
            return

        def layer(p, x):
            x = jnp.moveaxis(x, axis, 0)
            return jnp.moveaxis(jnp.concatenate(kinds[kind](x)), 0, axis)

        self.add(f"join {kind}", layer)

    def frame(self):
        """A constant that varies near the border only."""
        sizes = self.shape[:-1]
        inside = np.zeros(sizes, bool)
        borders = [(self.integer(0, 2), self.integer(0, 2)) for _ in sizes]
        inside[tuple(slice(a, n - b) for n, (a, b) in zip(sizes, borders, strict=True))] = True
        values = np.where(inside, 1.5, self.rng.standard_normal(sizes))[..., None]
        inside = inside[..., None]
        how = self.some("times", "plus", "where")
        layers = {
            "times": lambda p, x: x * values.astype(x.dtype),
            "plus": lambda p, x: x + values.astype(x.dtype),
            "where": lambda p, x: jnp.where(inside, x, 0.25),
        }
        self.add(f"frame {how}", layers[how])

    def iota_frame(self):
        axis, width = self.integer(0, self.ndim - 1), self.integer(1, 3)
        ramp = self.some(True, False)

        def layer(p, x):
            size = x.shape[axis]
            i = lax.broadcasted_iota(jnp.int32, x.shape, axis)
            if ramp:
                distance = jnp.minimum(i, size - 1 - i) + 1
                return x * jnp.clip(distance.astype(x.dtype) / width, 0, 1)
            return jnp.where((i >= width) & (i < size - 1), x, 0)

        self.add(f"iota {'ramp' if ramp else 'mask'}", layer)

    def batch_norm(self):
        mean, variance, scale, offset = (self.param(self.shape[-1]) for _ in range(4))

        def layer(p, x):
            normalized = (x - p[mean]) * lax.rsqrt(p[variance] ** 2 + 0.1)
            return normalized * p[scale] + p[offset]

        self.add("batch norm", layer)

    def squeeze_excite(self):
        channels = self.shape[-1]
        first, second = self.param(channels, 2), self.param(2, channels)

        def layer(p, x):
            hidden = jax.nn.relu(x.mean(self.spatial) @ p[first])
            return x * jax.nn.sigmoid(hidden @ p[second])

        self.add("squeeze and excite", layer)

    def residual(self):
        """Two convolutions beside the identity, or beside a 1×1 convolution with their stride."""
        strides = tuple(self.some(1, 2, 2) for _ in range(self.ndim))
        projected = self.some(True, False)
        if not projected:
            strides = (1,) * self.ndim
        channels = self.shape[-1]
        out = self.integer(1, 4) if projected else channels
        ones = (1,) * self.ndim
        one_by_one = Geometry(ones, strides, ((0, 0),) * self.ndim, ones, "VALID")
        project = self.convolution(channels, one_by_one, out) if projected else None
        geometry = self.draw_geometry(["SAME", "SAME_LOWER"], strides=strides)
        first = self.convolution(channels, geometry, out)
        shape = self.shape
        self.shape = (*(-(-n // s) for n, s in zip(shape, strides, strict=False)), out)
        second = self.convolution(out, self.draw_geometry(["SAME"], strides=ones), out)
        self.shape = shape
        self.stepped(strides)

        def layer(p, x):
            y = second(p, jax.nn.relu(first(p, x)))
            return jax.nn.relu((project(p, x) if project else x) + y)

        self.add(geometry.name("residual projected" if projected else "residual identity"), layer)

    def inception(self):
        """A map, a convolution and a pool of it, as more channels."""
        channels, ones = self.shape[-1], (1,) * self.ndim
        if channels > 6:
            return
        geometry = self.draw_geometry(["SAME"], strides=ones)
        conv = self.convolution(channels, geometry, 2)
        pooled = self.draw_geometry(["SAME"], pool=True, strides=ones)
        pool = reduce_windows("avg by counts", pooled, True)
        self.add(
            geometry.name("inception"),
            lambda p, x: jnp.concatenate([x, conv(p, x), pool(p, x)[..., :1]], -1),
        )

    def head(self, kind=None):
        """What the function returns; nothing whose choice could hang on rounding."""
        kind = kind or self.some("map", "dense", "dense", "mlp", "axes", "mean", "max", "several")
        channels, flat = self.shape[-1], prod(self.shape)
        order = self.some(*FLATTEN)
        wide = self.param(flat, 4, scale=1 / np.sqrt(flat))
        small, pooled = self.param(4, 3), self.param(channels, 3)
        on_axes = self.param(*self.shape, 2, scale=1 / np.sqrt(flat))
        axes = (*self.spatial, self.ndim)

        def dense(p, x):
            return fc.apply_linear(fc.LinearParams(p[wide], None), FLATTEN[order](x))

        def mlp(p, x):
            return jax.nn.softmax(jax.nn.relu(dense(p, x)) @ p[small])

        heads = {
            "map": lambda p, x: x,
            "dense": dense,
            "mlp": mlp,
            "axes": lambda p, x: fc.apply_linear(fc.LinearParams(p[on_axes], None), x, axis=axes),
            "mean": lambda p, x: x.mean(self.spatial) @ p[pooled],
            "max": lambda p, x: x.max(self.spatial),
            "several": lambda p, x: {"a": mlp(p, x), "b": (x.sum(), x.max(0)), "c": p[small]},
        }
        return f"{kind} {order}" if kind in ("dense", "mlp") else kind, heads[kind]


B = PaddedBuilder
PADS = [
    *(B.conv, B.conv, B.conv, B.conv, B.pool, B.pool, B.pool, B.pad, B.pad, B.lax_pad, B.join),
    *(B.residual, B.residual, B.inception),
]
OTHERS = [
    *(B.activation, B.activation, B.batch_norm, B.batch_norm, B.norm, B.squeeze_excite),
    *(B.frame, B.frame, B.iota_frame, B.channels, B.dense, B.crop, B.space_to_depth, B.scanned),
    B.table,
]


@st.composite
def padded_cases(draw, *, layers=(1, 7)):
    builder = make_builder(draw(st.randoms()))
    for _ in range(builder.integer(*layers)):
        options = PADS if builder.integer(0, 9) < 7 else OTHERS
        builder.some(*options)(builder)
    return finish(builder)


def make_builder(random, kind=PaddedBuilder):
    ndim = random.choice([1, 2, 2, 2, 3])
    largest = {1: 24, 2: 14, 3: 7}[ndim]
    window = tuple(random.randint(4, largest) for _ in range(ndim))
    return kind(random, window, random.randint(1, 3))


def finish(builder, *, head=None):
    """The drawn layers with a head, and an image that has a few windows."""
    name, head = builder.head(head)
    built = [layer for _, layer in builder.layers if layer]
    names = [layer for layer, _ in builder.layers] + [name]
    channels_first, batched = builder.some(False, True), builder.some(False, False, False, True)
    first = channels_first + batched
    axes = tuple(range(first, first + builder.ndim))

    def one(params, x):
        x = jnp.moveaxis(x, 0, -1) if channels_first else x
        for layer in built:
            x = layer(params, x)
        return head(params, x)

    def fun(params, x):
        return jax.vmap(one, (None, 0))(params, x) if batched else one(params, x)

    most = {1: 8, 2: 8, 3: 4}[builder.ndim]
    stride, size = [], []
    for window, step in zip(builder.window, builder.steps, strict=True):
        s = builder.some(1, step, builder.integer(1, 8))
        stride.append(s)
        size.append(window + (builder.integer(1, most) - 1) * s + builder.integer(0, s - 1))
    channels = (builder.image_channels,)
    shape = (*channels, *size) if channels_first else (*size, *channels)
    image = builder.rng.standard_normal((2, *shape) if batched else shape)
    return Case(fun, builder.params, builder.window, tuple(stride), axes, image, names)
