"""Random networks that halve a map and bring it back to size: U-Nets and autoencoders."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax
from padded_layers import Geometry
from padded_networks import CONV_PADDING, PaddedBuilder, finish, make_builder


class DecoderBuilder(PaddedBuilder):
    """Draws levels of an encoder and a decoder, one inside the other."""

    def small_conv(self):
        modes = CONV_PADDING if not self.integer(0, 2) else ["SAME"]
        self.conv(modes=modes, strides=(1,) * self.ndim)
        if self.some(True, False):
            self.activation()

    def level(self, depth):
        self.small_conv()
        if not depth or max(self.shape[:-1]) < 2:
            return
        outer, start, steps = self.shape, len(self.layers), self.steps
        factors = tuple(self.some(2, 2, 2, 3) if n > 1 else 1 for n in self.shape[:-1])
        if self.some(True, True, False):
            self.pool(modes=["VALID", "SAME", "ceil"], strides=factors)
        else:
            self.conv(modes=["SAME", "explicit"], strides=factors)
        self.level(depth - 1)
        self.up(factors, outer[:-1])
        self.fit(outer[:-1])
        self.deepest = tuple(map(max, self.deepest, self.steps))
        self.steps = steps
        inner = self.layers[start:]
        self.layers[start:] = [(name, None) for name, _ in inner]
        self.join_skip(outer, [layer for _, layer in inner if layer])
        self.small_conv()

    def join_skip(self, outer, inner):
        """The inner levels beside what went into them, or alone."""
        how = self.some("concatenated", "added", "none")
        channels = self.shape[-1]
        weight = self.param(outer[-1], channels, scale=1 / np.sqrt(outer[-1]))

        def layer(p, x):
            y = x
            for step in inner:
                y = step(p, y)
            if how == "concatenated":
                return jnp.concatenate([x, y], -1)
            return x @ p[weight] + y if how == "added" else y

        self.shape = outer
        self.add(f"skip {how}", layer)

    def up(self, factors, target):
        kinds = {
            "transposed": self.transposed,
            "transposed by hand": self.transposed_by_hand,
            "repeat": lambda *_: self.repeat(factors),
            "resize": self.resize,
            "depth to space": self.depth_to_space,
            "unpool": self.unpool,
        }
        kind = self.some(*kinds, "transposed", "repeat", "resize")
        kinds[kind](factors, target)

    def transposed(self, factors, target):
        padding = self.some("SAME", "VALID")
        kernel = [self.integer(1, 4 if self.ndim < 3 else 3) for _ in factors]
        channels, out = self.shape[-1], self.integer(1, 3)
        weight = self.param(*kernel, channels, out, scale=1 / np.sqrt(prod(kernel) * channels))
        spatial = "DHW"[3 - self.ndim :]
        numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")

        def layer(p, x):
            return lax.conv_transpose(
                x[None], p[weight], factors, padding, dimension_numbers=numbers
            )[0]

        self.add(f"up: conv_transpose {padding}", layer)

    def transposed_by_hand(self, factors, target):
        """With padding of one's own, and now and then a stride or a dilation of the kernel."""
        kernel, padding, dilations = [], [], []
        for size, factor in zip(self.shape[:-1], factors, strict=True):
            k, d = self.integer(1, 4 if self.ndim < 3 else 3), self.some(1, 1, 2)
            extent, dilated = (k - 1) * d + 1, (size - 1) * factor + 1
            low = self.integer(0, extent - 1)
            kernel.append(k)
            dilations.append(d)
            padding.append((low, max(self.integer(0, extent - 1), extent - dilated - low)))
        channels, out = self.shape[-1], self.integer(1, 3)
        weight = self.param(*kernel, channels, out, scale=1 / np.sqrt(prod(kernel) * channels))
        # XLA's compiler crashes on strides together with both dilations.
        strides = tuple(1 if d > 1 else self.some(1, 1, 1, 1, 2) for d in dilations)
        spatial = "DHW"[3 - self.ndim :]
        numbers = (f"NC{spatial}", f"OI{spatial}", f"NC{spatial}")

        def layer(p, x):
            y = lax.conv_general_dilated(
                jnp.moveaxis(x, -1, 0)[None],
                jnp.moveaxis(p[weight], (-1, -2), (0, 1)),
                strides,
                padding,
                lhs_dilation=factors,
                rhs_dilation=dilations,
                dimension_numbers=numbers,
            )[0]
            return jnp.moveaxis(y, 0, -1)

        self.add("up: lhs_dilation", layer)

    def repeat(self, factors):
        def layer(p, x):
            for axis, factor in enumerate(factors):
                x = jnp.repeat(x, factor, axis)
            return x

        self.add("up: repeat", layer)

    def resize(self, factors, target):
        method, exact = self.some("nearest", "linear", "linear"), self.some(True, False)

        def layer(p, x):
            scaled = [n * factor for n, factor in zip(x.shape[:-1], factors, strict=True)]
            return jax.image.resize(x, (*(target if exact else scaled), x.shape[-1]), method)

        self.add(f"up: resize {method}{' to the skip' if exact else ''}", layer)

    def depth_to_space(self, factors, target):
        channels, out = self.shape[-1], self.integer(1, 2)
        weight = self.param(channels, prod(factors) * out, scale=1 / np.sqrt(channels))
        order = [i for axis in self.spatial for i in (axis, self.ndim + axis)] + [2 * self.ndim]

        def layer(p, x):
            sizes = x.shape[:-1]
            x = (x @ p[weight]).reshape(*sizes, *factors, out).transpose(order)
            return x.reshape(*(n * f for n, f in zip(sizes, factors, strict=True)), out)

        self.add("up: depth to space", layer)

    def unpool(self, factors, target):
        """Zeros between the elements, which a convolution fills."""
        interior = [(0, factor - 1, factor - 1) for factor in factors]
        self.add(
            "up: zeros between", lambda p, x: lax.pad(x, x.dtype.type(0), [*interior, (0,) * 3])
        )
        ones = (1,) * self.ndim
        same = Geometry((3,) * self.ndim, ones, ((1, 1),) * self.ndim, ones, "SAME")
        self.add("conv SAME", self.convolution(self.shape[-1], same))

    def fit(self, target):
        """Crops or pads to the size of the skip connection."""
        if self.shape[:-1] == target:
            return
        centred, mode = self.some(True, False), self.some("constant", "edge")
        cuts, pads = [], []
        for size, goal in zip(self.shape[:-1], target, strict=True):
            start = max(size - goal, 0) // (2 if centred else 1)
            cuts.append(slice(start, start + goal))
            low = max(goal - size, 0) // 2 if centred else 0
            pads.append((low, max(goal - size, 0) - low))

        def layer(p, x):
            x = x[tuple(cuts)]
            return jnp.pad(x, [*pads, (0, 0)], mode) if np.any(pads) else x

        self.add(f"fit: jnp.pad {mode}" if np.any(pads) else "fit: crop", layer)


@st.composite
def decoder_cases(draw):
    builder = make_builder(draw(st.randoms()), DecoderBuilder)
    builder.deepest = builder.steps
    builder.level(builder.integer(1, {1: 3, 2: 2, 3: 2}[builder.ndim]))
    if builder.some(True, False):
        builder.conv(modes=["SAME"], strides=(1,) * builder.ndim)
    # Window strides that fit the deepest map, or half of it.
    builder.steps = tuple(n // builder.some(1, 1, 2) or 1 for n in builder.deepest)
    return finish(builder, head=builder.some("map", "map", "mean", "dense", "several"))
